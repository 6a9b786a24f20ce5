"""A bulk job in, its parts written by Ray actors out: each actor has its own engine, the servers are dealt out in turn.

The parts go to the job's folder, which all of Ray's machines must see. The same job may be begun here and finished in
one process, or the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_clients.bulk.job import Job, JobSpec, embed_unit
from arcface_clients.bulk.units import unit_size
from arcface_clients.errors import DependencyMissing

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
        DependencyMissing: Ray is not installed.
        Exception: what Ray raises for a failed actor, with ours as its cause. The job can be gone on with.
    """
    try:
        import ray
        import ray.data
    except ImportError as exc:
        raise DependencyMissing(f"--engine ray needs Ray Data ({exc}): pip install 'arcface-triton[ray]'") from exc
    if not ray.is_initialized():
        ray.init(num_cpus=max(actors, 1) + 1, include_dashboard=False, log_to_driver=False)
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
