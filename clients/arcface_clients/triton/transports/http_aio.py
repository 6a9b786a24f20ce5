"""Triton over HTTP for asyncio: the same bodies as `http`, through aiohttp."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping, Sequence
from typing import Any

from arcface_clients.arrays import Array
from arcface_clients.errors import DependencyMissing, InferenceFailed
from arcface_clients.triton.address import Connection
from arcface_clients.triton.admin_key import admin_headers
from arcface_clients.triton.memory.system import Slot
from arcface_clients.triton.transports import http_messages as messages
from arcface_clients.triton.transports import refusals


class AsyncHttpTransport:
    """An aiohttp session, bound to the event loop that it was opened in."""

    def __init__(self, connection: Connection) -> None:
        """Nothing is connected yet."""
        try:
            import aiohttp
        except ImportError as exc:
            raise DependencyMissing(f"HTTP with asyncio needs aiohttp ({exc}): pip install aiohttp") from exc
        self._aiohttp = aiohttp
        self._connection = connection
        address = connection.address
        self._base = f"{'https' if address.tls else 'http'}://{address.target}{address.path}"
        connector = aiohttp.TCPConnector(limit=0, ssl=messages.tls_context(connection) or True)
        self._session = aiohttp.ClientSession(connector=connector, headers=connection.headers)

    def pack(self, model: str, parts: Sequence[Array]) -> messages.Request:
        """The request body."""
        return messages.pack(parts, self._connection.compression)

    async def infer(self, model: str, body: messages.Request, timeout_s: float) -> Array:
        """Embeddings float32 (N,D), read-only."""
        head_length, reply = await self._ask(
            model, "POST", f"/v2/models/{model}/infer", timeout_s, body.body, body.headers
        )
        return messages.unpack(self._connection, model, head_length, reply)

    async def infer_shared(self, model: str, slot: Slot, count: int, timeout_s: float) -> None:
        """Faces and embeddings stay in the slot."""
        request = messages.pack_shared(slot, count)
        await self._ask(model, "POST", f"/v2/models/{model}/infer", timeout_s, request.body, request.headers)

    async def register_shared(self, slot: Slot, timeout_s: float) -> None:
        """Make a slot known to the server."""
        path = messages.region_path(slot.name, "register")
        try:
            await self._ask(
                "shared memory", "POST", path, timeout_s, messages.register_body(slot), admin_headers(self._connection)
            )
        except InferenceFailed as exc:
            if "already" not in str(exc):
                raise

    async def unregister_shared(self, name: str, timeout_s: float) -> None:
        """Make the server forget a region."""
        await self._ask(
            "shared memory",
            "POST",
            messages.region_path(name, "unregister"),
            timeout_s,
            None,
            admin_headers(self._connection),
        )

    async def shared_regions(self, memory: str, timeout_s: float) -> list[str]:
        """Names of the regions that the server knows."""
        _, reply = await self._ask(
            "shared memory", "GET", f"/v2/{memory}sharedmemory/status", timeout_s, None, admin_headers(self._connection)
        )
        return messages.region_names(reply)

    async def model_config(self, model: str, timeout_s: float) -> dict[str, Any]:
        """The served configuration."""
        return messages.config_json((await self._ask(model, "GET", f"/v2/models/{model}/config", timeout_s))[1])

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        """Close all connections; requests under way fail."""
        await self._session.close()

    async def _ask_restricted(
        self, method: str, path: str, timeout_s: float, body: bytes | None = None
    ) -> tuple[str | None, bytes]:
        headers = admin_headers(self._connection)
        return await self._ask("shared memory", method, path, timeout_s, body, headers)

    async def _ask(
        self,
        model: str,
        method: str,
        path: str,
        timeout_s: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[str | None, bytes]:
        """`HEADER_LENGTH` and body of a reply with status 200; connections gone stale while idle aiohttp replaces."""
        timeout = self._aiohttp.ClientTimeout(total=timeout_s)
        data = io.BytesIO(body) if body else None  # bytes as they are would be written in one go, blocking the loop
        try:
            async with self._session.request(
                method, self._base + path, data=data, headers=headers, timeout=timeout
            ) as response:
                reply = await response.read()
        except asyncio.TimeoutError as exc:
            raise refusals.too_late(self._connection.address, model, timeout_s) from exc
        except (self._aiohttp.ClientError, OSError) as exc:
            if self._session.closed:
                raise refusals.closed() from exc
            raise refusals.unreachable(self._connection.address, str(exc) or type(exc).__name__) from exc
        except RuntimeError as exc:  # aiohttp's answer to a request on a closed session
            if self._session.closed:
                raise refusals.closed() from exc
            raise
        if response.status != 200:
            raise messages.translated(self._connection, model, response.status, reply)
        return response.headers.get(messages.HEADER_LENGTH), reply
