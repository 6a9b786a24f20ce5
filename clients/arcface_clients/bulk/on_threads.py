"""A job in this process: a thread for each engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import TYPE_CHECKING

from arcface_clients.bulk.job import Job
from arcface_clients.bulk.parts import Part
from arcface_clients.bulk.units import Unit
from arcface_clients.bulk.work import UnitWorker

if TYPE_CHECKING:
    from arcface_clients.engines.protocol import EmbeddingEngine


def run_local(
    job: Job,
    engines: Sequence[EmbeddingEngine],
    advance: Callable[[int], object] = lambda count: None,
    patience_s: float = 0.0,
) -> None:
    """Do what is pending, a thread for each engine (one a server); Ctrl-C gives up the units under way at once.

    Args:
        job: held by this process.
        engines: thread i begins with the i-th.
        advance: told how many entries are done.
        patience_s: how long servers that are overloaded or away are waited for.

    Raises:
        ArcFaceError: what an engine raises; the others stop too, and the job can be gone on with.
    """
    free: SimpleQueue[UnitWorker] = SimpleQueue()
    for first in range(len(engines)):
        free.put(UnitWorker(job.folder, job.spec, engines, job.files, first=first, patience_s=patience_s))
    stop = threading.Event()

    def work(number: int, unit: Unit) -> tuple[int, Part]:
        worker = free.get()
        try:
            return number, worker.do(number, unit, advance, stop)
        finally:
            free.put(worker)

    pool = ThreadPoolExecutor(len(engines), thread_name_prefix="arcface-bulk")
    under_way: set[Future[tuple[int, Part]]] = set()
    pending = job.pending()
    try:
        while True:
            while len(under_way) <= len(engines) and (entry := next(pending, None)) is not None:
                under_way.add(pool.submit(work, *entry))
            if not under_way:
                return
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                job.note(*future.result())
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
