"""How bytes reach a Triton server: one small protocol, one module for each way; drivers are imported when opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from arcface_clients.address import Address


class Transport(Protocol):
    """One connection to one server, safe to use from many threads.

    Every method raises only errors of `arcface_clients.errors`; `timeout_s` covers the whole exchange.
    """

    def pack(self, model: str, parts: Sequence[np.ndarray]) -> bytes:
        """The request body for `parts`, C-contiguous uint8 (n_i,112,112,3) each, one after the other. No I/O."""
        ...

    def infer(self, model: str, body: bytes, timeout_s: float) -> np.ndarray:
        """Embeddings float32 (N,D) for a packed body; the array may be read-only."""
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


def open_transport(address: Address, headers: dict[str, str] | None = None) -> Transport:
    """A transport for the address's protocol; does not talk to the server yet.

    Raises:
        DependencyMissing: the driver of this protocol is not installed.
    """
    from arcface_clients.transports.grpc import GrpcTransport

    return GrpcTransport(address, headers)
