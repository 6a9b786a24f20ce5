"""A bulk job in, its parts written by Ray actors out: each actor has its own engine, the servers are dealt out in turn.

The parts go to the job's folder, which all of Ray's machines must see. The same job may be begun here and finished in
one process, or the other way round.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_clients.bulk.job import Job, JobSpec, embed_unit
from arcface_clients.bulk.units import unit_size
from arcface_clients.errors import DependencyMissing
from arcface_clients.extras import how_to_get

if TYPE_CHECKING:
    from arcface_clients.engines.protocol import EmbeddingEngine


def run_on_ray(
    job: Job,
    make_engine: Callable[[str], EmbeddingEngine],
    urls: Sequence[str],
    actors: int = 2,
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Do what is pending with `actors` Ray actors; connects to the Ray that is configured, or starts one here.

    Args:
        job: held by this process.
        make_engine: from a URL; sent to the actors, so it must pickle.
        urls: servers; actor i takes urls[i mod len(urls)].
        actors: each runs one unit at a time.
        advance: told how many items are done.

    Raises:
        DependencyMissing: Ray is not installed, cannot be reached or does not start.
        Exception: what Ray raises for a failed actor, with ours as its cause. The job can be gone on with.
    """
    try:
        import ray
        import ray.data
    except ImportError as exc:
        raise DependencyMissing(f"--engine ray needs Ray Data ({exc}). Next: {how_to_get('ray')}") from exc
    if not ray.is_initialized():
        _connect(ray, actors)
    turn = ray.remote(num_cpus=0)(_Turn).remote(len(urls))
    units = [{"number": number, "unit": json.dumps(unit)} for number, unit in job.pending()]
    if not units:
        return
    done = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        _Worker,
        fn_constructor_args=(str(job.folder), job.spec, make_engine, list(urls), turn),
        batch_size=1,
        concurrency=actors,
        num_cpus=1,
    )
    for row in done.iter_rows():
        advance(int(row["items"]))


def _connect(ray: Any, actors: int) -> None:
    """Connect to the Ray of $RAY_ADDRESS, else start one; a busy host is given more time than Ray gives it."""
    address = os.environ.get("RAY_ADDRESS")
    own = {} if address else {"num_cpus": max(actors, 1) + 1, "include_dashboard": False}
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")
    for attempts_left in (1, 0):
        try:
            ray.init(log_to_driver=False, **own)
            return
        except Exception as exc:  # Ray raises a plain Exception where it did not start in its own 30 s
            ray.shutdown()
            if address or not attempts_left:
                what = f"Ray at {address} cannot be reached" if address else "Ray does not start on this host"
                raise DependencyMissing(
                    f"{what}: {str(exc).rstrip('. ')}. Next: ray start --head, or leave out --engine ray; "
                    "what is done is kept"
                ) from exc


class _Turn:
    """Deals out server numbers, one to each actor that asks."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._next = -1

    def take(self) -> int:
        self._next += 1
        return self._next % self._count


class _Worker:
    """A Ray Data actor: one engine, one detector, one unit at a time."""

    def __init__(
        self, folder: str, spec: JobSpec, make_engine: Callable[[str], EmbeddingEngine], urls: list[str], turn: Any
    ) -> None:
        import ray

        self._folder, self._spec = Path(folder), spec
        self._engine = make_engine(urls[ray.get(turn.take.remote())])
        self._detector = spec.open_detector()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        counts: dict[str, list[int]] = {"items": [], "rows": [], "refused": []}
        for number, text in zip(batch["number"], batch["unit"], strict=True):
            unit = json.loads(str(text))
            rows, refused = embed_unit(self._folder, int(number), unit, self._engine, self._spec, self._detector)
            for name, value in (("items", unit_size(unit)), ("rows", rows), ("refused", refused)):
                counts[name].append(value)
        return counts
