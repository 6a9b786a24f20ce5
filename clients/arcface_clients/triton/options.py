"""The arguments of an embedder, checked once for the plain and the asyncio one; a connection and a session out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from arcface_clients.errors import ConfigError
from arcface_clients.triton.address import Address, Connection, Tls
from arcface_clients.triton.route import SHARED_MEMORY, SharedMemory
from arcface_clients.triton.session import Session


@dataclass(frozen=True)
class Options:
    """See `TritonEmbedder` for what each means.

    Raises:
        ConfigError: one of them cannot be.
    """

    url: str
    model: str
    timeout_s: float
    in_flight: int
    retry_for_s: float
    expected_contract: str | None
    headers: Mapping[str, str] | None
    tls: Tls | None
    compression: str | None
    shared_memory: SharedMemory

    def __post_init__(self) -> None:
        """Refuse what cannot be before anything is opened."""
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model is {self.model!r}; expected a served model's name, such as 'arcface'.")
        if not isinstance(self.headers or {}, Mapping) or not all(
            isinstance(part, str) for header in (self.headers or {}).items() for part in header
        ):
            raise ConfigError(
                "headers: expected a mapping of names to values, both text, such as {'authorization': '…'}."
            )
        self.connection()
        if self.timeout_s <= 0 or self.in_flight < 1 or self.retry_for_s < 0:
            raise ConfigError(
                "expected timeout_s > 0, in_flight ≥ 1 and retry_for_s ≥ 0, "
                f"got {self.timeout_s}, {self.in_flight}, {self.retry_for_s}."
            )
        if self.shared_memory not in SHARED_MEMORY:
            raise ConfigError(f"shared_memory is {self.shared_memory!r}; expected 'auto', 'system', 'cuda' or False.")

    def connection(self) -> Connection:
        """What a transport is opened with."""
        return Connection(Address.parse(self.url), dict(self.headers or {}), self.tls or Tls(), self.compression)

    def session(self) -> Session:
        """A session that has asked the server nothing yet."""
        return Session(
            Address.parse(self.url),
            self.model,
            timeout_s=self.timeout_s,
            retry_for_s=self.retry_for_s,
            expected_contract=self.expected_contract,
            shared_memory=self.shared_memory,
        )
