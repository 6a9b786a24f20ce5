"""Triton over HTTP: packed faces in, embeddings out, through the standard library's http.client.

tritonclient's own HTTP client is bound to one thread and one gevent hub; this one keeps a pool of connections.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from arcface_clients.arrays import Array
from arcface_clients.errors import ArcFaceError, InferenceFailed
from arcface_clients.triton.address import Address, Connection
from arcface_clients.triton.admin_key import admin_headers
from arcface_clients.triton.answer import Tensors
from arcface_clients.triton.memory.system import Slot
from arcface_clients.triton.transports import Files, Parameter, refusals
from arcface_clients.triton.transports import http_messages as messages
from arcface_clients.triton.transports.files import pack_http, unpack_http

IDLE_S = 60.0  # a connection that was idle for longer is replaced: what stands between may have forgotten it
_KEEPALIVE = (("SO_KEEPALIVE", 1), ("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
_PIECE_BYTES = 1 << 20
_STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)


class HttpTransport:
    """Keep-alive connections, as many as there are requests at a time; safe to use from many threads."""

    def __init__(self, connection: Connection) -> None:
        """Nothing is connected yet."""
        self._connection = connection
        self._context = messages.tls_context(connection)
        self._lock = threading.Lock()
        self._idle: list[tuple[float, http.client.HTTPConnection]] = []  # since when, the longest idle first
        self._busy: set[http.client.HTTPConnection] = set()
        self._closed = threading.Event()

    def pack(self, model: str, parts: Sequence[Array], outputs: Sequence[str]) -> messages.Request:
        """The request body."""
        return messages.pack(parts, outputs, self._connection.compression)

    def infer(self, model: str, body: messages.Request, timeout_s: float) -> Tensors:
        """The outputs asked for, read-only."""
        read = partial(messages.unpack, self._connection, model, body.id)
        return self._ask(model, "POST", f"/v2/models/{model}/infer", timeout_s, read, body.body, body.headers)

    def infer_files(
        self, model: str, files: Files, outputs: Sequence[str], parameters: Mapping[str, Parameter], timeout_s: float
    ) -> Tensors:
        """The outputs asked for, read-only."""
        body = pack_http(files, outputs, parameters, self._connection.compression)
        read = partial(unpack_http, self._connection, model, body.id)
        return self._ask(model, "POST", f"/v2/models/{model}/infer", timeout_s, read, body.body, body.headers)

    def infer_shared(self, model: str, slot: Slot, count: int, outputs: Sequence[str], timeout_s: float) -> Tensors:
        """Faces and embeddings stay in the slot."""
        body = messages.pack_shared(slot, count, outputs)
        read = partial(messages.unpack, self._connection, model, body.id, in_slot=(count, slot.embedding_dim))
        return self._ask(model, "POST", f"/v2/models/{model}/infer", timeout_s, read, body.body, body.headers)

    def register_shared(self, slot: Slot, timeout_s: float) -> None:
        """Make a slot known to the server."""
        path = messages.region_path(slot.name, "register")
        try:
            self._ask_restricted("POST", path, timeout_s, _nothing, messages.register_body(slot))
        except InferenceFailed as exc:
            if "already" not in str(exc):
                raise

    def unregister_shared(self, name: str, timeout_s: float) -> None:
        """Make the server forget a region."""
        self._ask_restricted("POST", messages.region_path(name, "unregister"), timeout_s, _nothing)

    def shared_regions(self, memory: str, timeout_s: float) -> list[str]:
        """Names of the regions that the server knows."""

        def read(_: str | None, body: bytes) -> list[str]:
            return messages.region_names(self._connection, body)

        return self._ask_restricted("GET", f"/v2/{memory}sharedmemory/status", timeout_s, read)

    def model_config(self, model: str, timeout_s: float) -> dict[str, Any]:
        """The served configuration."""

        def read(_: str | None, body: bytes) -> dict[str, Any]:
            return messages.config_json(self._connection, model, body)

        return self._ask(model, "GET", f"/v2/models/{model}/config", timeout_s, read)

    def sleep(self, seconds: float) -> None:
        """Wait; returns early when closed."""
        self._closed.wait(seconds)

    def close(self) -> None:
        """Close all connections; requests under way fail."""
        self._closed.set()
        with self._lock:
            idle, self._idle = self._idle, []
            busy = list(self._busy)
        for _, connection in idle:
            connection.close()
        for connection in busy:
            _cut(connection)  # its own thread then closes it

    def _ask_restricted(
        self, method: str, path: str, timeout_s: float, read: messages.Read[messages.T], body: bytes | None = None
    ) -> messages.T:
        """`_ask` with the server's admin key, where one is known."""
        headers = admin_headers(self._connection)
        return self._ask("shared memory", method, path, timeout_s, read, body, headers)

    def _ask(
        self,
        model: str,
        method: str,
        path: str,
        timeout_s: float,
        read: messages.Read[messages.T],
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> messages.T:
        """What `read` makes of a reply with status 200. A connection is used again only after a sound answer."""
        deadline_s = time.monotonic() + timeout_s
        address = self._connection.address
        while True:
            connection, reused = self._take()
            sound = False
            try:
                status, head_length, reply = self._exchange(
                    connection, method, path, body, headers, deadline_s, timeout_s
                )
                if status != 200:
                    raise messages.translated(self._connection, model, status, reply)
                answer = read(head_length, reply)
                sound = True
                return answer
            except ArcFaceError:
                raise
            except _STALE as exc:
                if self._closed.is_set():
                    raise refusals.closed() from exc
                if reused:  # the server had closed it while it was idle; a fresh one tells whether it is there
                    continue
                raise refusals.unreachable(address, exc or type(exc).__name__) from exc
            except TimeoutError as exc:
                raise refusals.too_late(address, model, timeout_s) from exc
            except (OSError, http.client.HTTPException) as exc:
                if self._closed.is_set():
                    raise refusals.closed() from exc
                why = f"{type(exc).__name__} {exc}" if isinstance(exc, http.client.HTTPException) else exc
                raise refusals.unreachable(address, why) from exc
            except (ValueError, OverflowError, MemoryError) as exc:  # sizes that no answer of Triton has
                if self._closed.is_set():  # what was shut down under our hands can be a ValueError too
                    raise refusals.closed() from exc
                raise refusals.no_answer(address, model, f"no HTTP answer ({exc})") from exc
            finally:
                self._give(connection, keep=sound)

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str] | None,
        deadline_s: float,
        timeout_s: float,
    ) -> tuple[int, str | None, bytes]:
        if connection.sock is None:
            connection._create_connection = connect_by(deadline_s)  # type: ignore[attr-defined]  # create_connection
            try:
                connection.connect()
            except TimeoutError as exc:  # nothing was sent: it is not busy, it is not there
                raise ConnectionError(f"no connection within {timeout_s:g} s") from exc
            _end_if_dead(connection)
        connection.sock.settimeout(_left_s(deadline_s))
        connection.response_class = partial(TimedReply, deadline_s)  # type: ignore[assignment]  # made with a socket
        connection.request(
            method, self._connection.address.path + path, body, {**self._connection.headers, **(headers or {})}
        )
        reply = connection.getresponse()
        if (reply.length or 0) > messages.MAX_ANSWER_BYTES:
            raise ValueError(f"{reply.length} bytes long")
        expected, size, pieces = reply.length, 0, []
        while piece := reply.read(_PIECE_BYTES):
            pieces.append(piece)
            size += len(piece)
            if size > messages.MAX_ANSWER_BYTES:
                raise ValueError(f"longer than {messages.MAX_ANSWER_BYTES} bytes")
        if expected is not None and size < expected:
            raise http.client.IncompleteRead(b"", expected - size)
        return reply.status, reply.headers.get(messages.HEADER_LENGTH), b"".join(pieces)

    def _take(self) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            if self._closed.is_set():
                raise refusals.closed()
            kept = None
            while self._idle and kept is None:
                since_s, kept = self._idle.pop()
                if time.monotonic() - since_s > IDLE_S or _has_strays(kept):
                    kept.close()
                    kept = None
            connection = kept or _new(self._connection.address, self._context)
            self._busy.add(connection)
        return connection, kept is not None

    def _give(self, connection: http.client.HTTPConnection, *, keep: bool) -> None:
        with self._lock:
            self._busy.discard(connection)
            keep = keep and not self._closed.is_set() and connection.sock is not None
            if keep:
                self._idle.append((time.monotonic(), connection))
            while self._idle and time.monotonic() - self._idle[0][0] > IDLE_S:
                self._idle.pop(0)[1].close()
        if not keep:
            connection.close()


def connect_by(deadline_s: float) -> Callable[..., socket.socket]:
    """`socket.create_connection`, but all addresses of a name are tried before one deadline, each for its share."""

    def connect(place: tuple[str, int], *_: object) -> socket.socket:
        found = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)
        while True:
            share_s = _left_s(deadline_s) / len(found)
            host, port = found.pop(0)[4][:2]
            try:
                connected = socket.create_connection((str(host), int(port)), share_s)
            except OSError:
                if not found:
                    raise
            else:
                connected.settimeout(_left_s(deadline_s))
                return connected

    return connect


class TimedReply(http.client.HTTPResponse):
    """A reply that has to be there, to its last byte, before a deadline; a socket's timeout is for each byte."""

    def __init__(self, deadline_s: float, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Timed(deadline_s, sock), 1 << 16)


class _Timed(io.RawIOBase):
    def __init__(self, deadline_s: float, sock: socket.socket) -> None:
        super().__init__()
        self._deadline_s, self._sock = deadline_s, sock
        self._raw = sock.makefile("rb", buffering=0)  # keeps the socket open for as long as the reply is read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left_s(self._deadline_s))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _new(address: Address, context: ssl.SSLContext | None) -> http.client.HTTPConnection:
    if context:
        return http.client.HTTPSConnection(address.host, address.port, context=context)
    return http.client.HTTPConnection(address.host, address.port)


def _has_strays(connection: http.client.HTTPConnection) -> bool:
    """Whether something came in that nobody asked for: a second answer, or the end of the connection."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))


def _end_if_dead(connection: http.client.HTTPConnection) -> None:
    """Have the system notice a peer that is gone without a word."""
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            level = socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP
            connection.sock.setsockopt(level, getattr(socket, name), value)


def _nothing(head_length: str | None, body: bytes) -> None:
    """Of a reply whose status says it all."""


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("no time left")
    return left_s


def _cut(connection: http.client.HTTPConnection) -> None:
    """End a connection that another thread may be waiting on."""
    with contextlib.suppress(OSError, AttributeError):
        connection.sock.shutdown(socket.SHUT_RDWR)
