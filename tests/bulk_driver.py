"""A bulk job on Ray as a process of its own: bulk_driver.py OUTPUT ENGINE SOURCE … prints its counts as JSON.

Actors find the engines below by this module's name, which PYTHONPATH must lead to.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from arcface_clients.bulk.job import Job, JobSpec
from arcface_clients.errors import Overloaded
from people import CONTRACT, PixelEngine

DIM, ROWS = 64, 4


def quick(url: str) -> PixelEngine:
    return PixelEngine(DIM)


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
    """The first to embed at all makes a file, and then takes a minute."""

    def __init__(self, mark: str) -> None:
        super().__init__(DIM)
        self._mark = Path(mark)

    def encode(self, faces: np.ndarray) -> np.ndarray:
        try:
            self._mark.touch(exist_ok=False)
        except FileExistsError:
            return super().encode(faces)
        time.sleep(60)
        return super().encode(faces)


def main(output: str, engine: str, *sources: str) -> None:
    from arcface_clients.bulk.on_ray import Cluster, run_on_ray

    urls = ["first", "second"]
    make = globals()[engine.partition(":")[0]]
    if engine.startswith("StragglingEngine"):
        urls = [engine.partition(":")[2]] * 2
    begun_s = time.monotonic()
    with Job(output, JobSpec(sources, CONTRACT, DIM, ROWS)) as job:
        told = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        done: list[int] = []
        run_on_ray(job, make, urls, Cluster(2), done.append, told)
        found = {**asdict(job.finish()), "advanced": sum(done), "before": job.before}
    print(json.dumps({**found, "seconds": time.monotonic() - begun_s}))


if __name__ == "__main__":
    import bulk_driver  # its classes must have a name that actors know

    bulk_driver.main(*sys.argv[1:])
