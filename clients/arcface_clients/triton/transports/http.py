"""Triton over HTTP: packed faces in, embeddings out, through the standard library's http.client.

tritonclient's own HTTP client is bound to one thread and one gevent hub; this one keeps a pool of connections.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from arcface_clients.arrays import Array
from arcface_clients.errors import InferenceFailed
from arcface_clients.triton.address import Connection
from arcface_clients.triton.admin_key import admin_headers
from arcface_clients.triton.memory.system import Slot
from arcface_clients.triton.transports import http_messages as messages
from arcface_clients.triton.transports import refusals

_STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)


class HttpTransport:
    """Keep-alive connections, as many as there are requests at a time; safe to use from many threads."""

    def __init__(self, connection: Connection) -> None:
        """Nothing is connected yet."""
        self._connection = connection
        self._context = messages.tls_context(connection)
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._busy: set[http.client.HTTPConnection] = set()
        self._closed = threading.Event()

    def pack(self, model: str, parts: Sequence[Array]) -> messages.Request:
        """The request body."""
        return messages.pack(parts, self._connection.compression)

    def infer(self, model: str, body: messages.Request, timeout_s: float) -> Array:
        """Embeddings float32 (N,D), read-only."""
        head_length, reply = self._ask(model, "POST", f"/v2/models/{model}/infer", timeout_s, body.body, body.headers)
        return messages.unpack(self._connection, model, head_length, reply)

    def infer_shared(self, model: str, slot: Slot, count: int, timeout_s: float) -> None:
        """Faces and embeddings stay in the slot."""
        request = messages.pack_shared(slot, count)
        self._ask(model, "POST", f"/v2/models/{model}/infer", timeout_s, request.body, request.headers)

    def register_shared(self, slot: Slot, timeout_s: float) -> None:
        """Make a slot known to the server."""
        path = messages.region_path(slot.name, "register")
        try:
            self._ask(
                "shared memory", "POST", path, timeout_s, messages.register_body(slot), admin_headers(self._connection)
            )
        except InferenceFailed as exc:
            if "already" not in str(exc):
                raise

    def unregister_shared(self, name: str, timeout_s: float) -> None:
        """Make the server forget a region."""
        self._ask(
            "shared memory",
            "POST",
            messages.region_path(name, "unregister"),
            timeout_s,
            None,
            admin_headers(self._connection),
        )

    def shared_regions(self, memory: str, timeout_s: float) -> list[str]:
        """Names of the regions that the server knows."""
        _, reply = self._ask(
            "shared memory", "GET", f"/v2/{memory}sharedmemory/status", timeout_s, None, admin_headers(self._connection)
        )
        return messages.region_names(reply)

    def model_config(self, model: str, timeout_s: float) -> dict[str, Any]:
        """The served configuration."""
        return messages.config_json(self._ask(model, "GET", f"/v2/models/{model}/config", timeout_s)[1])

    def sleep(self, seconds: float) -> None:
        """Wait; returns early when closed."""
        self._closed.wait(seconds)

    def close(self) -> None:
        """Close all connections; requests under way fail."""
        self._closed.set()
        with self._lock:
            idle, self._idle = self._idle, []
            busy = list(self._busy)
        for connection in idle:
            connection.close()
        for connection in busy:
            _cut(connection)  # its own thread then closes it

    def _ask_restricted(
        self, method: str, path: str, timeout_s: float, body: bytes | None = None
    ) -> tuple[str | None, bytes]:
        headers = admin_headers(self._connection)
        return self._ask("shared memory", method, path, timeout_s, body, headers)

    def _ask(
        self,
        model: str,
        method: str,
        path: str,
        timeout_s: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[str | None, bytes]:
        """`HEADER_LENGTH` and body of a reply with status 200."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            connection, reused = self._take()
            try:
                status, head_length, reply = self._exchange(connection, method, path, body, headers, deadline_s)
            except _STALE as exc:
                self._give(connection, keep=False)
                if self._closed.is_set():
                    raise refusals.closed() from exc
                if reused:  # the server had closed it while it was idle; a fresh one tells whether it is there
                    continue
                raise refusals.unreachable(self._connection.address, exc or type(exc).__name__) from exc
            except TimeoutError as exc:
                self._give(connection, keep=False)
                raise refusals.too_late(self._connection.address, model, timeout_s) from exc
            except (OSError, http.client.HTTPException) as exc:
                self._give(connection, keep=False)
                if self._closed.is_set():
                    raise refusals.closed() from exc
                why = f"{type(exc).__name__} {exc}" if isinstance(exc, http.client.HTTPException) else exc
                raise refusals.unreachable(self._connection.address, why) from exc
            except BaseException:
                self._give(connection, keep=False)
                raise
            self._give(connection, keep=True)
            if status != 200:
                raise messages.translated(self._connection, model, status, reply)
            return head_length, reply

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str] | None,
        deadline_s: float,
    ) -> tuple[int, str | None, bytes]:
        if connection.sock is None:
            connection.timeout = _left_s(deadline_s)
            connection.connect()
        connection.sock.settimeout(_left_s(deadline_s))
        connection.request(
            method, self._connection.address.path + path, body, {**self._connection.headers, **(headers or {})}
        )
        connection.sock.settimeout(_left_s(deadline_s))
        reply = connection.getresponse()
        return reply.status, reply.headers.get(messages.HEADER_LENGTH), reply.read()

    def _take(self) -> tuple[http.client.HTTPConnection, bool]:
        address = self._connection.address
        with self._lock:
            if self._closed.is_set():
                raise refusals.closed()
            reused = bool(self._idle)
            if reused:
                connection = self._idle.pop()
            elif self._context:
                connection = http.client.HTTPSConnection(address.host, address.port, context=self._context)
            else:
                connection = http.client.HTTPConnection(address.host, address.port)
            self._busy.add(connection)
        return connection, reused

    def _give(self, connection: http.client.HTTPConnection, *, keep: bool) -> None:
        with self._lock:
            self._busy.discard(connection)
            keep = keep and not self._closed.is_set() and connection.sock is not None
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("no time left")
    return left_s


def _cut(connection: http.client.HTTPConnection) -> None:
    """End a connection that another thread may be waiting on."""
    with contextlib.suppress(OSError, AttributeError):
        connection.sock.shutdown(socket.SHUT_RDWR)
