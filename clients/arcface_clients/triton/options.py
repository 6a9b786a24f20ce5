"""The options of a client, checked once: both embedders, the engine registry and the configuration share them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict

from arcface_clients.errors import ConfigError
from arcface_clients.triton.address import Access, Address, Connection, Tls
from arcface_clients.triton.memory.choice import SharedMemoryOption, shared_memory_option


@dataclass(frozen=True)
class ClientOptions:
    """How a server is called.

    Attributes:
        url: `host:port` or `grpc://…`, `grpcs://…`, `http://…`, `https://…`.
        model: served model, normally the ensemble `arcface`.
        timeout_s: longest wait for the answer to one request of up to max_batch_size faces, queueing included. A
            request that is sent again, after a lost server, begins anew.
        total_timeout_s: longest wait for all that one call of `encode` takes: connecting, every request, every new
            attempt and the pauses between; of a stream, for each request. None: no limit of its own.
        retry_for_s: how long a lost server or an unloaded model is tried again; 0: not at all.
        in_flight: requests under way at a time when there are more faces than fit one.
        expected_contract: contract id that the served model must have.
        shared_memory: "auto" (or None): system shared memory when the server is on this host, else the wire; faces on
            a GPU go through CUDA shared memory where the server's model runs on a GPU. "system": the same without
            CUDA. "cuda": CUDA for all faces, else as "auto", with a warning. False: never. True: as "auto", and an
            error when there is only the wire. What was chosen stands in `embedder.shared_memory`.
        compression: None, "gzip" or "deflate"; photographs hardly shrink, so None.
        headers: sent with every request (gRPC metadata), such as a key.
        tls: files for grpcs:// and https://; without, the system's authorities are trusted.

    Raises:
        ConfigError: one of them cannot be.
    """

    url: str = "localhost:8001"
    model: str = "arcface"
    timeout_s: float = 120.0
    total_timeout_s: float | None = None
    retry_for_s: float = 5.0
    in_flight: int = 4
    expected_contract: str | None = None
    shared_memory: SharedMemoryOption = "auto"
    compression: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # they may hold a key
    tls: Tls = field(default_factory=Tls)

    def __post_init__(self) -> None:
        """Refuse what cannot be before anything is opened."""
        _check("model", self.model, isinstance(self.model, str) and self.model, "a served model's name")
        _check("timeout_s", self.timeout_s, self.timeout_s > 0, "more than 0")
        total_s = self.total_timeout_s
        _check("total_timeout_s", total_s, total_s is None or total_s > 0, "more than 0, or None")
        _check("in_flight", self.in_flight, 1 <= self.in_flight <= 256, "1..256")
        _check("retry_for_s", self.retry_for_s, self.retry_for_s >= 0, "0 or more")
        _check(
            "compression", self.compression, self.compression in (None, "gzip", "deflate"), "None, 'gzip' or 'deflate'"
        )
        if not _is_text(self.headers):
            raise ConfigError(
                "headers: expected names and values, both text, such as {'authorization': '…'}.", "headers"
            )
        object.__setattr__(self, "shared_memory", shared_memory_option(self.shared_memory))
        self.connection()

    @property
    def address(self) -> Address:
        """The URL, read."""
        return Address.parse(self.url)

    def access_to(self, url: str) -> Access:
        """Headers, TLS files and compression for this server; nothing for any other: a key is for whom it was given."""
        if Address.parse(url) != self.address:
            return {}
        return {"headers": dict(self.headers), "tls": self.tls, "compression": self.compression}

    def towards(self, url: str, model: str = "") -> ClientOptions:
        """These options for a server that a command was given; another one gets no keys, and may serve any contract."""
        same = Address.parse(url) == self.address
        mine = {} if same else {"headers": {}, "tls": Tls(), "compression": None, "expected_contract": None}
        return ClientOptions(**{**vars(self), **mine, "url": url, "model": model or self.model})

    def connection(self) -> Connection:
        """What a transport is opened with.

        Raises:
            ConfigError: the URL cannot be read, or TLS files go with one that is not encrypted.
        """
        return Connection(self.address, dict(self.headers), self.tls, self.compression)


class PhotoArguments(TypedDict, total=False):
    """The arguments of a client that sends photos: `ClientOptions` but for shared memory, which is for faces."""

    timeout_s: float
    total_timeout_s: float | None
    retry_for_s: float
    in_flight: int
    expected_contract: str | None
    compression: str | None
    headers: Mapping[str, str] | None
    tls: Tls | None


def _check(key: str, value: object, good: object, expected: str) -> None:
    if not good:
        raise ConfigError(f"{key} is {value!r}; expected {expected}.", key)


def _is_text(headers: object) -> bool:
    return isinstance(headers, Mapping) and all(isinstance(part, str) for header in headers.items() for part in header)
