"""What a client has open: its connection and its workers, apart from it, so that they end when it is forgotten."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, TypeVar

from arcface_clients.errors import ClientUnusable
from arcface_clients.triton.transports import Transport
from arcface_clients.triton.transports.refusals import closed

T = TypeVar("T")


class Live:
    """A connection and a thread pool, each opened with its first use; neither survives a fork."""

    def __init__(self, opener: Callable[[], Transport], farewell: Callable[[Transport], object] | None = None) -> None:
        """Nothing is opened yet.

        Args:
            opener: opens the connection.
            farewell: what is still to be said before it is closed.
        """
        self._opener, self._farewell = opener, farewell
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._ended = False
        self._transport: Transport | None = None
        self._workers: ThreadPoolExecutor | None = None

    def transport(self) -> Transport:
        """The connection.

        Raises:
            ClientUnusable: closed, or carried over a fork.
        """
        self._check_fork()
        with self._lock:
            if self._ended:
                raise closed()
            if self._transport is None:
                self._transport = self._opener()
            return self._transport

    def submit(self, count: int, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Have the pool, of `count` threads, do this work.

        Raises:
            ClientUnusable: closed, or carried over a fork.
        """
        self._check_fork()
        with self._lock:
            if self._ended:
                raise closed()
            if self._workers is None:
                self._workers = ThreadPoolExecutor(count, thread_name_prefix="arcface-triton")
            return self._workers.submit(work, *arguments)

    def _check_fork(self) -> None:
        if os.getpid() != self._pid:
            raise ClientUnusable(
                f"this client was opened by process {self._pid} and carried over a fork into {os.getpid()}: its "
                "threads do not survive that. Make one client in each process"
            )

    def end(self, wait: bool = False) -> None:
        """Close both; requests under way fail."""
        if os.getpid() != self._pid:
            return  # the parent's connection and regions are not a forked child's to close
        with self._lock:
            self._ended = True
            transport, workers = self._transport, self._workers
            self._transport = self._workers = None
        if transport is not None:
            if self._farewell:
                self._farewell(transport)
            transport.close()
        if workers:
            workers.shutdown(wait=wait, cancel_futures=True)  # forgotten on a worker: it cannot wait for itself


def in_turn(futures: Iterable[Future[T]], in_flight: int) -> Iterator[T]:
    """Results in order of futures that are begun as they are taken, `in_flight` at a time; the rest is cancelled.

    Raises:
        ClientUnusable: `Live.end` cancelled one.
    """
    window: deque[Future[T]] = deque()
    try:
        for future in futures:
            window.append(future)
            while window and (len(window) == in_flight or window[0].done()):
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    except CancelledError as exc:
        raise closed() from exc
    finally:
        for future in window:
            future.cancel()
