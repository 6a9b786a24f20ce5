"""How bytes reach a Triton server: one small protocol, four modules that speak it; drivers are imported when opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from arcface_clients.arrays import Array
from arcface_clients.triton.address import Connection
from arcface_clients.triton.answer import Tensors
from arcface_clients.triton.memory.system import Slot

Parameter = float | int | str | bool
Files = Mapping[str, bytes]
"""Input name → the file."""


class Transport(Protocol):
    """One connection to one server, safe to use from many threads.

    Every method raises only errors of `arcface_clients.errors`; `timeout_s` covers the whole exchange.
    """

    def pack(self, model: str, parts: Sequence[Array], outputs: Sequence[str]) -> Any:
        """A request for these outputs of `parts`, C-contiguous uint8 (n_i,112,112,3) each, in turn. A copy, no I/O."""
        ...

    def infer(self, model: str, body: Any, timeout_s: float) -> Tensors:
        """`embedding`, and what else a packed request asks for; the arrays may be read-only."""
        ...

    def infer_shared(self, model: str, slot: Slot, count: int, outputs: Sequence[str], timeout_s: float) -> Tensors:
        """Have the server embed the `count` faces in a registered slot, and write the embeddings into it.

        The other outputs, which are small, come back.

        Raises:
            SharedMemoryLost: the server does not know the region (any more).
        """
        ...

    def register_shared(self, slot: Slot, timeout_s: float) -> None:
        """Make a slot known to the server; a slot that is known already stays so."""
        ...

    def unregister_shared(self, name: str, timeout_s: float) -> None:
        """Make the server forget a region, whose name says which memory it is in; an unknown name is fine."""
        ...

    def shared_regions(self, memory: str, timeout_s: float) -> list[str]:
        """Names of all regions in "system" or "cuda" shared memory that the server knows."""
        ...

    def infer_files(
        self, model: str, files: Files, outputs: Sequence[str], parameters: Mapping[str, Parameter], timeout_s: float
    ) -> Tensors:
        """The outputs asked for, of any shape, of a model that takes encoded files; the arrays may be read-only."""
        ...

    def model_config(self, model: str, timeout_s: float) -> dict[str, Any]:
        """The served configuration as Triton's JSON."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait between two attempts; returns early when the transport is closed."""
        ...

    def close(self) -> None:
        """Give up the connection; what is under way fails with ClientUnusable. May be called twice."""
        ...


class AsyncTransport(Protocol):
    """`Transport` for asyncio: the same methods, awaited; belongs to the event loop that it was opened in."""

    def pack(self, model: str, parts: Sequence[Array], outputs: Sequence[str]) -> Any:
        """As `Transport.pack`: a copy, no I/O."""
        ...

    async def infer(self, model: str, body: Any, timeout_s: float) -> Tensors:
        """As `Transport.infer`."""
        ...

    async def infer_shared(
        self, model: str, slot: Slot, count: int, outputs: Sequence[str], timeout_s: float
    ) -> Tensors:
        """As `Transport.infer_shared`."""
        ...

    async def register_shared(self, slot: Slot, timeout_s: float) -> None:
        """As `Transport.register_shared`."""
        ...

    async def unregister_shared(self, name: str, timeout_s: float) -> None:
        """As `Transport.unregister_shared`."""
        ...

    async def shared_regions(self, memory: str, timeout_s: float) -> list[str]:
        """As `Transport.shared_regions`."""
        ...

    async def infer_files(
        self, model: str, files: Files, outputs: Sequence[str], parameters: Mapping[str, Parameter], timeout_s: float
    ) -> Tensors:
        """As `Transport.infer_files`."""
        ...

    async def model_config(self, model: str, timeout_s: float) -> dict[str, Any]:
        """As `Transport.model_config`."""
        ...

    async def sleep(self, seconds: float) -> None:
        """As `Transport.sleep`."""
        ...

    async def close(self) -> None:
        """As `Transport.close`."""
        ...


def open_transport(connection: Connection) -> Transport:
    """A transport for the address's protocol; does not talk to the server yet.

    Raises:
        DependencyMissing: the driver of this protocol is not installed.
    """
    if connection.address.protocol == "http":
        from arcface_clients.triton.transports.http import HttpTransport

        return HttpTransport(connection)
    from arcface_clients.triton.transports.grpc import GrpcTransport

    return GrpcTransport(connection)


def open_async_transport(connection: Connection) -> AsyncTransport:
    """The asyncio twin of `open_transport`; to be called inside a running event loop."""
    if connection.address.protocol == "http":
        from arcface_clients.triton.transports.http_aio import AsyncHttpTransport

        return AsyncHttpTransport(connection)
    from arcface_clients.triton.transports.grpc_aio import AsyncGrpcTransport

    return AsyncGrpcTransport(connection)
