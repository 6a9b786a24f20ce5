"""Triton over HTTP for asyncio: the same bodies as `http`, through aiohttp."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from arcface_clients.arrays import Array
from arcface_clients.errors import ArcFaceError, InferenceFailed, InvalidAnswer
from arcface_clients.extras import importing
from arcface_clients.triton.address import Connection
from arcface_clients.triton.admin_key import admin_headers
from arcface_clients.triton.answer import Tensors
from arcface_clients.triton.memory.system import Slot
from arcface_clients.triton.transports import Files, Parameter, refusals
from arcface_clients.triton.transports import http_messages as messages
from arcface_clients.triton.transports.files import pack_http, unpack_http

_CONNECTING = 0.9  # of a request's time may pass before there is a connection; less than all, to be told from an answer


class AsyncHttpTransport:
    """An aiohttp session, bound to the event loop that it was opened in."""

    def __init__(self, connection: Connection) -> None:
        """Nothing is connected yet."""
        with importing("HTTP with asyncio"):
            import aiohttp
        self._aiohttp = aiohttp
        self._connection = connection
        address = connection.address
        self._base = f"{'https' if address.tls else 'http'}://{address.target}{address.path}"
        self._context = messages.tls_context(connection)
        self._session = self._new_session()
        self._former: list[Any] = []  # sessions with a connection that cannot be trusted; others may be under way there

    def pack(self, model: str, parts: Sequence[Array], outputs: Sequence[str]) -> messages.Request:
        """The request body."""
        return messages.pack(parts, outputs, self._connection.compression)

    async def infer(self, model: str, body: messages.Request, timeout_s: float) -> Tensors:
        """The outputs asked for, read-only."""
        read = partial(messages.unpack, self._connection, model, body.id)
        return await self._ask(model, "POST", f"/v2/models/{model}/infer", timeout_s, read, body.body, body.headers)

    async def infer_files(
        self, model: str, files: Files, outputs: Sequence[str], parameters: Mapping[str, Parameter], timeout_s: float
    ) -> Tensors:
        """The outputs asked for, read-only."""
        body = pack_http(files, outputs, parameters, self._connection.compression)
        read = partial(unpack_http, self._connection, model, body.id)
        return await self._ask(model, "POST", f"/v2/models/{model}/infer", timeout_s, read, body.body, body.headers)

    async def infer_shared(
        self, model: str, slot: Slot, count: int, outputs: Sequence[str], timeout_s: float
    ) -> Tensors:
        """Faces and embeddings stay in the slot."""
        body = messages.pack_shared(slot, count, outputs)
        read = partial(messages.unpack, self._connection, model, body.id, in_slot=(count, slot.embedding_dim))
        return await self._ask(model, "POST", f"/v2/models/{model}/infer", timeout_s, read, body.body, body.headers)

    async def register_shared(self, slot: Slot, timeout_s: float) -> None:
        """Make a slot known to the server."""
        path = messages.region_path(slot.name, "register")
        try:
            await self._ask_restricted("POST", path, timeout_s, _nothing, messages.register_body(slot))
        except InferenceFailed as exc:
            if "already" not in str(exc):
                raise

    async def unregister_shared(self, name: str, timeout_s: float) -> None:
        """Make the server forget a region."""
        await self._ask_restricted("POST", messages.region_path(name, "unregister"), timeout_s, _nothing)

    async def shared_regions(self, memory: str, timeout_s: float) -> list[str]:
        """Names of the regions that the server knows."""

        def read(_: str | None, body: bytes) -> list[str]:
            return messages.region_names(self._connection, body)

        return await self._ask_restricted("GET", f"/v2/{memory}sharedmemory/status", timeout_s, read)

    async def model_config(self, model: str, timeout_s: float) -> dict[str, Any]:
        """The served configuration."""

        def read(_: str | None, body: bytes) -> dict[str, Any]:
            return messages.config_json(self._connection, model, body)

        return await self._ask(model, "GET", f"/v2/models/{model}/config", timeout_s, read)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        """Close all connections; requests under way fail."""
        for session in (*self._former, self._session):
            await session.close()

    async def _ask_restricted(
        self, method: str, path: str, timeout_s: float, read: messages.Read[messages.T], body: bytes | None = None
    ) -> messages.T:
        """`_ask` with the server's admin key, where one is known."""
        headers = admin_headers(self._connection)
        return await self._ask("shared memory", method, path, timeout_s, read, body, headers)

    async def _ask(
        self,
        model: str,
        method: str,
        path: str,
        timeout_s: float,
        read: messages.Read[messages.T],
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> messages.T:
        """What `read` makes of a reply with status 200; connections gone stale while idle aiohttp replaces."""
        timeout = self._aiohttp.ClientTimeout(total=timeout_s, sock_connect=_CONNECTING * timeout_s)
        data = io.BytesIO(body) if body else None  # bytes as they are would be written in one go, blocking the loop
        session, address = self._session, self._connection.address
        try:
            async with session.request(
                method,
                self._base + path,
                data=data,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,  # faces and keys are for this address
            ) as response:
                reply = bytearray()
                async for piece in response.content.iter_any():
                    reply += piece
                    if len(reply) > messages.MAX_ANSWER_BYTES:
                        raise ValueError(f"longer than {messages.MAX_ANSWER_BYTES} bytes")
            if response.status != 200:
                raise messages.translated(self._connection, model, response.status, bytes(reply))
            return read(response.headers.get(messages.HEADER_LENGTH), bytes(reply))
        except InvalidAnswer:
            if session is self._session:  # which connection it came from aiohttp does not say any more
                self._former.append(session)
                self._session = self._new_session()
            raise
        except ArcFaceError:
            raise
        except self._aiohttp.ServerTimeoutError as exc:  # nothing was sent: it is not busy, it is not there
            raise refusals.unreachable(address, f"no connection within {timeout_s:g} s") from exc
        except asyncio.TimeoutError as exc:
            raise refusals.too_late(address, model, timeout_s) from exc
        except (self._aiohttp.ClientError, OSError) as exc:
            if session.closed:
                raise refusals.closed() from exc
            raise refusals.unreachable(address, str(exc) or type(exc).__name__) from exc
        except RuntimeError as exc:  # aiohttp's answer to a request on a closed session
            if session.closed:
                raise refusals.closed() from exc
            raise
        except (ValueError, OverflowError, MemoryError) as exc:  # sizes that no answer of Triton has
            raise refusals.no_answer(address, model, f"no HTTP answer ({exc})") from exc

    def _new_session(self) -> Any:
        connector = self._aiohttp.TCPConnector(limit=0, ssl=self._context or True)
        return self._aiohttp.ClientSession(connector=connector, headers=self._connection.headers)


def _nothing(head_length: str | None, body: bytes) -> None:
    """Of a reply whose status says it all."""
