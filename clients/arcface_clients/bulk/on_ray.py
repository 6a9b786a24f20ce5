"""A job on Ray: actors with engines of their own, a bounded number of units on the way, no faces in this process.

The driver hands out units and counts parts; actors read the sources and write the parts, so both must be reachable
from all of Ray's machines (a URL, or a shared folder). An actor or a machine that dies is replaced, and its units are
handed out again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from glob import has_magic
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_clients.bulk.files import Files, is_url, plain
from arcface_clients.bulk.job import Job
from arcface_clients.bulk.parts import Part
from arcface_clients.bulk.schedule import Schedule
from arcface_clients.bulk.spec import METADATA, JobSpec
from arcface_clients.bulk.units import Unit, unit_size
from arcface_clients.bulk.work import PATIENCE_S, UnitWorker, set_aside
from arcface_clients.errors import ArcFaceError, ConfigError, DependencyMissing
from arcface_clients.ray_cluster import SAY_AFTER_S, TRIES, Cluster, connected, raised_by, short

if TYPE_CHECKING:
    from arcface_clients.engines.protocol import EmbeddingEngine

QUEUED = 2  # units that an actor has: one to do, and the next
START_TRIES = 5  # actors that may fail to start, none having started, before the job ends


@dataclass
class _Actor:
    """An actor and what it was given, the oldest first; `ready` once it has started."""

    handle: Any
    units: deque[int] = field(default_factory=deque)
    ready: bool = False


def run_on_ray(
    job: Job,
    make_engine: Callable[[str], EmbeddingEngine],
    urls: Sequence[str],
    cluster: Cluster | None = None,
    advance: Callable[[int], object] = lambda count: None,
    say: Callable[[str], object] = lambda text: None,
    patience_s: float = PATIENCE_S,
) -> None:
    """Do what is pending with Ray actors; connects to the Ray that is configured or runs here, or starts one.

    Args:
        job: held by this process.
        make_engine: from a URL; sent to the actors, so it must pickle.
        urls: servers; actor i begins with urls[i mod len(urls)], and moves on when that is lost.
        cluster: what of Ray is used.
        advance: told how many entries are done.
        say: told what the operator should know.
        patience_s: how long a unit waits for servers that are overloaded or away.

    Raises:
        DependencyMissing: Ray is not installed, cannot be reached or does not start; or no machine can run an actor.
        ArcFaceError: what a unit raised. The job can be gone on with.
    """
    cluster = cluster or Cluster()
    with connected(cluster) as ray:
        actors = _Actors(ray, job, make_engine, urls, cluster, patience_s)
        try:
            _hand_out(job, actors, Schedule(job.pending()), cluster, advance, say)
        finally:
            actors.end()


def _hand_out(
    job: Job,
    actors: _Actors,
    schedule: Schedule,
    cluster: Cluster,
    advance: Callable[[int], object],
    say: Callable[[str], object],
) -> None:
    say_at_s = time.monotonic() + SAY_AFTER_S
    while True:
        actors.fill(schedule)
        if schedule.is_done:
            return
        for number, answer in actors.answers():
            if isinstance(answer, Part):
                if job.note(number, answer):
                    advance(answer.rows + answer.refused)
                schedule.finished(number)
                continue
            unit = schedule.lost(number, killed=answer is _DIED)
            if isinstance(answer, ArcFaceError) and schedule.is_wanted(number):
                raise answer
            if unit is not None:
                reason = f"set aside: the unit with it killed {TRIES} workers"
                job.note(number, set_aside(job.folder, number, unit, job.spec, reason))
                advance(unit_size(unit))
                say(f"unit {number} was set aside: it killed {TRIES} workers; what is in it is listed as refused")
        if actors.ready:
            say_at_s = time.monotonic() + SAY_AFTER_S
        elif time.monotonic() > say_at_s:
            say(f"waiting for the cluster: no actor of {cluster.cpus:g} CPU could be started yet; see `ray status`")
            say_at_s = time.monotonic() + SAY_AFTER_S


_DIED, _DROPPED = object(), object()  # over this unit; with it in the queue


class _Actors:
    """The actors of a job, each replaced when it dies."""

    def __init__(
        self,
        ray: Any,
        job: Job,
        make_engine: Callable[[str], EmbeddingEngine],
        urls: Sequence[str],
        cluster: Cluster,
        patience_s: float,
    ) -> None:
        self._ray, self._cluster = ray, cluster
        self._arguments = (job.folder.path, job.spec, job.files, make_engine, list(urls), patience_s, seen_here(job))
        self._begun = self._failed_starts = 0
        self._answers: dict[Any, tuple[_Actor, int | None]] = {}  # None: that it has started
        self._make = ray.remote(_Worker).options(max_restarts=0, **cluster.options())
        self._all: list[_Actor] = []
        for _ in range(cluster.actors):
            self._begin()

    @property
    def ready(self) -> int:
        """Actors that have started."""
        return sum(actor.ready for actor in self._all)

    def _begin(self) -> None:
        actor = _Actor(self._make.remote(self._begun, *self._arguments))
        self._begun += 1
        self._all.append(actor)
        self._answers[actor.handle.hello.remote()] = (actor, None)

    def fill(self, schedule: Schedule) -> None:
        """Give every actor what it has room for, those with nothing first."""
        for room in range(QUEUED):
            for actor in self._all:
                while actor.ready and len(actor.units) <= room:
                    entry = schedule.take(is_idle=not actor.units)
                    if entry is None:
                        return
                    number, unit = entry
                    actor.units.append(number)
                    self._answers[actor.handle.do.remote(number, unit)] = (actor, number)

    def answers(self, wait_s: float = 1.0) -> list[tuple[int, Any]]:
        """What came in: (number, its part or what was raised or _DIED or _DROPPED)."""
        if not self._answers:
            return []
        found: list[tuple[int, Any]] = []
        done, _ = self._ray.wait(list(self._answers), num_returns=1, timeout=wait_s)
        more, _ = self._ray.wait(list(self._answers), num_returns=len(self._answers), timeout=0)
        for reference in {*done, *more}:
            entry = self._answers.pop(reference, None)
            if entry is None:
                continue  # its actor died, and took it along
            actor, number = entry
            try:
                answer = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as exc:
                answer = raised_by(exc)
            except self._ray.exceptions.RayActorError as exc:
                found += self._buried(actor, exc)
                continue
            except self._ray.exceptions.RayError:  # the answer was lost with its machine
                answer = _DROPPED
            if number is None:
                actor.ready, self._failed_starts = True, 0
            else:
                actor.units.remove(number)
                found.append((number, answer))
        return found

    def _buried(self, actor: _Actor, why: Exception) -> list[tuple[int, Any]]:
        """Replace an actor that died; its oldest unit killed it, the others were only waiting.

        Raises:
            DependencyMissing: actors die as they start, and none is alive.
        """
        self._all.remove(actor)
        self._answers = {ref: entry for ref, entry in self._answers.items() if entry[0] is not actor}
        if not actor.ready:
            self._failed_starts += 1
            if self._failed_starts >= START_TRIES and not self.ready:
                raise DependencyMissing(
                    f"no Ray actor starts ({short(why)}). The machines of the cluster need this package: give them a "
                    "runtime environment (docs/bulk.md): --runtime-env env.json"
                ) from why
        self._begin()
        return [(number, _DROPPED if place else _DIED) for place, number in enumerate(actor.units)]

    def end(self) -> None:
        """Kill what is left: copies of units that are done."""
        for actor in self._all:
            self._ray.kill(actor.handle)


def seen_here(job: Job) -> list[str]:
    """The job's own file and its sources (of a glob the folder), those that are of this host and there."""
    local = [Path(job.files.below, plain(source)) for source in job.spec.sources if not is_url(plain(source))]
    roots = [str(Path(*takewhile(lambda part: not has_magic(part), path.parts))) for path in local]
    return [path for path in (job.folder.of(METADATA), *roots) if not is_url(path) and Path(path).exists()]


class _Worker:
    """The actor: engines for all servers, beginning with its own; one unit at a time."""

    def __init__(
        self,
        index: int,
        folder: str,
        spec: JobSpec,
        files: Files,
        make_engine: Callable[[str], EmbeddingEngine],
        urls: list[str],
        patience_s: float,
        seen: list[str],
    ) -> None:
        self._seen = seen
        engines = [make_engine(url) for url in urls]
        self._worker = UnitWorker(files.folder(folder), spec, engines, files, first=index, patience_s=patience_s)

    def hello(self) -> None:
        """It has started."""

    def do(self, number: int, unit: Unit) -> Part:
        """Embed a unit.

        Raises:
            ConfigError: this machine does not see what the driver sees; it would list every file as one that is gone.
        """
        for path in self._seen:
            if not Path(path).exists():
                raise ConfigError(
                    f"a Ray worker does not see {path}: expected a shared folder at the same path on all machines. "
                    "Share it, give URLs, or leave out --engine ray"
                )
        return self._worker.do(number, unit)
