"""The consensus of many people on Ray: a task a person, and every record handed to this process, which keeps them.

The files must be reachable from all of Ray's machines by the same paths: a shared folder.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_clients.contract import CONTRACT_DIGITS, named_by
from arcface_clients.errors import ConfigError, ContractMismatch
from arcface_clients.faces.images import load_faces
from arcface_clients.people.persons import Limits, Loader, consensus_of_person, record_of_failure, signature
from arcface_clients.ray_cluster import SAY_AFTER_S, TRIES, Cluster, connected, raised_by, short

if TYPE_CHECKING:
    from arcface_clients.engines.protocol import EmbeddingEngine


@dataclass(frozen=True)
class _Task:
    """What all tasks of a run share."""

    engine: bytes  # pickled, so that a worker knows the one that it has made already
    contract: str | None
    limits: Limits
    detector: str | None
    detector_id: str | None
    folder: str  # where the driver runs, from which relative names of files count


def consensus_on_ray(
    people: Mapping[str, Sequence[str]],
    make_engine: Callable[[], EmbeddingEngine],
    contract_id: str | None,
    keep: Callable[[dict[str, Any]], object],
    limits: Limits | None = None,
    *,
    detector: str | None = None,
    detector_id: str | None = None,
    cluster: Cluster | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> None:
    """Hand the records of `consensus_of_person` to `keep`, in order of completion; `cluster.actors` people at a time.

    A person whose worker or machine dies is tried again; after three deaths the record says so, and is undecided.

    Args:
        people: name → files.
        make_engine: called once in each worker, so it must pickle.
        contract_id: which the engines of all workers must have; or its first 32 digits, where only answers name it.
        keep: called in this process.
        limits: for agreement.
        detector: YuNet's file, at the same path on all machines: the files are photos; None: they are crops.
        detector_id: which detector that has to be; None: any.
        cluster: what of Ray is used.
        say: told what the operator should know.

    Raises:
        DependencyMissing: Ray is not installed, cannot be reached or does not start.
        ContractMismatch, DetectorMismatch: a worker's engine is of another contract, or its detector another one.
        ConfigError: a worker does not see the files that this process sees.
        ArcFaceError: what a task raised; no more people are started.
    """
    if not people:
        return
    cluster = cluster or Cluster()
    with connected(cluster) as ray:
        engine, limits, here = ray.cloudpickle.dumps(make_engine), limits or Limits(), str(Path.cwd())
        task = _Task(engine, contract_id, limits, detector, detector_id, here)
        # Not Ray's retries: deaths are counted here, whether a worker crashed, its machine was lost or memory ran out.
        begin = partial(ray.remote(_record).options(max_retries=0, **cluster.options()).remote, task)
        waiting = iter(people.items())
        under_way: dict[Any, tuple[str, Sequence[str], int]] = {}
        has_answered = False
        try:
            while True:
                while len(under_way) < cluster.actors and (person := next(waiting, None)) is not None:
                    under_way[begin(*person)] = (*person, 0)
                if not under_way:
                    return
                ready, _ = ray.wait(list(under_way), num_returns=1, timeout=SAY_AFTER_S)
                if not ready and not has_answered:
                    say(f"no task of {cluster.cpus:g} CPU has answered yet: see `ray status`, or wait")
                for reference in ready:
                    name, files, deaths = under_way.pop(reference)
                    answer = _answer(ray, reference)
                    if isinstance(answer, str) and deaths + 1 < TRIES:
                        under_way[begin(name, files)] = (name, files, deaths + 1)
                        continue
                    has_answered = True
                    keep(_given_up(name, files, answer, say) if isinstance(answer, str) else _same(name, files, answer))
        finally:
            for reference in under_way:
                with suppress(ray.exceptions.RayError):
                    ray.cancel(reference, force=True)


def _answer(ray: Any, reference: Any) -> dict[str, Any] | str:
    """The record; or how the worker or its machine died.

    Raises:
        ArcFaceError: what the task raised, or why Ray could not run it.
    """
    errors = ray.exceptions
    try:
        record: dict[str, Any] = ray.get(reference)
    except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.ObjectLostError) as exc:
        return short(exc)
    except errors.RayError as exc:  # what the task raised, or a runtime environment that could not be made
        raise raised_by(exc) from exc
    return record


def _given_up(name: str, files: Sequence[str], death: str, say: Callable[[str], object]) -> dict[str, Any]:
    """The record of a person who killed too many workers, the last one so."""
    reason = f"failed: this person killed {TRIES} workers ({death})"
    say(f"{name}: {reason}")
    return record_of_failure(name, files, reason)


def _same(name: str, files: Sequence[str], record: dict[str, Any]) -> dict[str, Any]:
    """The record, if the worker saw the files that this process sees.

    Raises:
        ConfigError: it did not.
    """
    if record["signature"] != signature(files):
        raise ConfigError(
            f"a Ray worker sees other files of {name} than this process: expected a shared folder at the same path "
            "everywhere, and nobody writing there. Share it, or leave out --engine ray"
        )
    return record


def _record(task: _Task, name: str, files: Sequence[str]) -> dict[str, Any]:
    """The task: one person, with the engine and the detector that this worker has."""
    engine = _engine(task.engine, task.contract)
    if engine.contract_id is not None or task.contract is None or len(task.contract) == CONTRACT_DIGITS:
        _check_contract(task, engine)
    load = load_faces if task.detector is None else _load_detected(task.detector, task.detector_id)
    with _working_in(task.folder):
        record = consensus_of_person(name, files, engine, task.limits, load=load)
    if record["distances"]:  # it has answered, and so named its contract
        _check_contract(task, engine)
    return record


def _check_contract(task: _Task, engine: EmbeddingEngine) -> None:
    if (named := named_by(engine)) != task.contract:
        raise ContractMismatch(
            f"this run is of contract {task.contract}, {engine!r} serves {named}: expected one model for all people. "
            "Serve the earlier one, or start over: --force"
        )


@lru_cache(maxsize=1)
def _engine(pickled: bytes, contract: str | None) -> EmbeddingEngine:
    """The engine of this worker; made again for another contract, as a client keeps to the one that it has seen."""
    engine: EmbeddingEngine = pickle.loads(pickled)()
    return engine


@lru_cache(maxsize=1)
def _load_detected(detector: str, detector_id: str | None) -> Loader:
    from arcface_clients.faces.detect import load_detected, open_detector

    return partial(load_detected, detector=open_detector(detector, detector_id))


@contextmanager
def _working_in(folder: str) -> Iterator[None]:
    """Relative names count from this folder, where this machine has it."""
    before = Path.cwd()
    with suppress(FileNotFoundError):  # absolute names need none
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
