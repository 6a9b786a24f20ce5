"""The options of a client, checked once: both embedders, the engine registry and the configuration share them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TypedDict

from arcface_clients.errors import ConfigError
from arcface_clients.triton.address import Access, Address, Connection, Tls
from arcface_clients.triton.memory.choice import SharedMemoryOption, shared_memory_option

_LONGEST_S = 7 * 86_400
_HEADER = re.compile(r"[A-Za-z0-9._-]+")


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
        named = isinstance(self.model, str) and self.model and self.model.isprintable()
        _check("model", self.model, named, "a served model's name")
        contract = self.expected_contract
        _check("expected_contract", contract, contract is None or isinstance(contract, str), "a contract id, or None")
        times = (self.timeout_s, 0.0 if self.total_timeout_s is None else self.total_timeout_s)
        for key, value in zip(("timeout_s", "total_timeout_s"), times, strict=True):
            _check(key, value, isinstance(value, Real), "seconds")
        in_time = 0 < self.timeout_s <= _LONGEST_S  # infinity is no time that a socket can wait
        _check("timeout_s", self.timeout_s, in_time, f"more than 0 and at most {_LONGEST_S:,}, a week")
        total_s = self.total_timeout_s
        _check("total_timeout_s", total_s, total_s is None or total_s > 0, "more than 0, or None")
        whole = isinstance(self.in_flight, Integral)
        _check("in_flight", self.in_flight, whole and 1 <= self.in_flight <= 256, "1..256")
        check_retry(self.retry_for_s)
        _check(
            "compression", self.compression, self.compression in (None, "gzip", "deflate"), "None, 'gzip' or 'deflate'"
        )
        _check_headers(self.headers)
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


def check_retry(retry_for_s: float) -> None:
    """Refuse, of a client and of each of its streams, what is no time to wait for a lost server.

    Raises:
        ConfigError: it is no number of seconds, or less than none.
    """
    _check("retry_for_s", retry_for_s, isinstance(retry_for_s, Real), "seconds")
    _check("retry_for_s", retry_for_s, retry_for_s >= 0, "0 or more")


def _check(key: str, value: object, good: object, expected: str) -> None:
    if not good:
        raise ConfigError(f"{key} is {value!r}; expected {expected}.", key)


def _check_headers(headers: object) -> None:
    """Refuse what gRPC or HTTP could not carry; a message never shows a value, which may be a key."""
    pairs = headers.items() if isinstance(headers, Mapping) else [(None, "")]
    for name, value in pairs:
        if not isinstance(name, str) or not _HEADER.fullmatch(name) or name.lower().endswith("-bin"):
            raise ConfigError(
                "headers: expected names (letters, digits, -, _ and ., not ending in -bin) and values, both text, such "
                "as {'authorization': '…'}.",
                "headers",
            )
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            ends = " It has a line break, as what is read from a file: strip it" if str(value).strip() != value else ""
            raise ConfigError(f"headers: expected the value of {name!r} to be printable ASCII text.{ends}", "headers")
