"""A bulk job as a process of its own: bulk_driver.py OUTPUT ENGINE SOURCE … prints its counts as JSON.

ENGINE is a function or a class below, with `:ARGUMENT,…` for its URLs, and `threads+` before it where threads and not
Ray do the work; $ARCFACE_DETECTOR makes the sources photos, whose detector has to be $DETECTOR_ID. Ray's actors find
the engines by this module's name, which PYTHONPATH must lead to.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from arcface_clients import TritonEmbedder
from arcface_clients.bulk.job import Job
from arcface_clients.bulk.on_ray import run_on_ray
from arcface_clients.bulk.on_threads import run_local
from arcface_clients.bulk.spec import JobSpec
from arcface_clients.bulk.work import PATIENCE_S
from arcface_clients.errors import Overloaded
from arcface_clients.photos.engine import PhotoEngine  # noqa: F401
from arcface_clients.ray_cluster import Cluster
from deadlines import HANG_S
from people import PixelEngine

DIM, ROWS = 64, 4


def quick(url: str) -> PixelEngine:
    return PixelEngine(DIM)


class TritonUntil(TritonEmbedder):
    """A client of the quick model at URL#MARK that takes its time until there is a file MARK."""

    def __init__(self, url: str) -> None:
        url, _, mark = url.partition("#")
        super().__init__(url, "quick")
        self._mark = Path(mark)

    def encode_stream(self, *arguments: Any, **options: Any) -> Iterator[np.ndarray]:
        for row in super().encode_stream(*arguments, **options):
            if not self._mark.exists():
                time.sleep(0.15)
            yield row


class SlowEngine(PixelEngine):
    def encode(self, faces: np.ndarray) -> np.ndarray:
        time.sleep(0.3)
        return super().encode(faces)


def slow(url: str) -> PixelEngine:
    return SlowEngine(DIM)


class DeadlyEngine(PixelEngine):
    """A face that is all 255 ends the process, as a decoder that runs out of memory does."""

    def encode(self, faces: np.ndarray) -> np.ndarray:
        if (faces == 255).all(axis=(1, 2, 3)).any():
            os._exit(1)
        return super().encode(faces)


def deadly(url: str) -> PixelEngine:
    return DeadlyEngine(DIM)


class BusyEngine(PixelEngine):
    def encode(self, faces: np.ndarray) -> np.ndarray:
        if np.random.default_rng().random() < 0.5:
            raise Overloaded("the queue is full")
        return super().encode(faces)


def busy(url: str) -> PixelEngine:
    return BusyEngine(DIM)


class StragglingEngine(PixelEngine):
    """The first to embed at all makes a file, and then takes ten minutes."""

    def __init__(self, mark: str) -> None:
        super().__init__(DIM)
        self._mark = Path(mark)

    def encode(self, faces: np.ndarray) -> np.ndarray:
        try:
            self._mark.touch(exist_ok=False)
        except FileExistsError:
            return super().encode(faces)
        time.sleep(HANG_S)
        return super().encode(faces)


def main(output: str, engine: str, *sources: str) -> None:
    name, _, argument = engine.rpartition("+")[2].partition(":")
    make: Any = globals()[name]
    urls = argument.split(",") if "," in argument else [argument] * 2
    begun_s = time.monotonic()
    with make(urls[0]) as engine_here:
        spec = JobSpec(
            sources,
            engine_here.contract_id,
            engine_here.embedding_dim,
            ROWS,
            os.environ.get("ARCFACE_DETECTOR"),
            detector_id=os.environ.get("DETECTOR_ID"),
        )
    with Job(output, spec) as job:
        told = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        done: list[int] = []
        if engine.startswith("threads+"):
            run_local(job, [make(url) for url in urls], done.append, PATIENCE_S)
        else:
            run_on_ray(job, make, urls, Cluster(2), done.append, told)
        found = {**asdict(job.finish()), "advanced": sum(done), "before": job.before}
    print(json.dumps({**found, "seconds": time.monotonic() - begun_s}))


if __name__ == "__main__":
    import bulk_driver  # its classes must have a name that actors know

    bulk_driver.main(*sys.argv[1:])
