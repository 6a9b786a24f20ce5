"""A server's address as people write it in; protocol, TLS, host, port and base path out."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import TypedDict
from urllib.parse import urlsplit

from arcface_clients.errors import ConfigError

_SCHEMES = {  # scheme -> (protocol, TLS, Triton's port; HTTPS is a proxy's, Triton's own HTTP has no TLS)
    "grpc": ("grpc", False, 8001),
    "grpcs": ("grpc", True, 8001),
    "http": ("http", False, 8000),
    "https": ("http", True, 443),
}
_HOST = re.compile(r"[\w.-]+|[0-9a-f:.]+(%[\w.-]+)?")  # a name, IPv4, or IPv6 with its zone


def is_loopback(host: str) -> bool:
    """Whether nobody but this host reaches it, by its name alone; nothing is looked up."""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host.rstrip(".").lower() == "localhost"


@dataclass(frozen=True)
class Address:
    """Where a server answers; `str()` gives the URL back."""

    protocol: str  # "grpc" or "http"
    tls: bool
    host: str
    port: int
    path: str = ""  # base path of a proxy, "" or "/something"

    @classmethod
    def parse(cls, url: str) -> Address:
        """`localhost:8001`, `grpc://…`, `grpcs://…`, `http://…/base`, `https://…`; without a scheme it is gRPC.

        Raises:
            ConfigError: unknown scheme, no host, a port that is no number, user names, queries.
        """
        text = url if "://" in url else f"grpc://{url}"
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as exc:
            raise ConfigError(f"cannot read the server URL {url!r}: {exc}. {_EXAMPLES}", key="url") from exc
        if parts.scheme not in _SCHEMES:
            raise ConfigError(
                f"the server URL {url!r} begins with {parts.scheme}://, which is not served. {_EXAMPLES}", key="url"
            )
        host = parts.hostname or ""
        if not _HOST.fullmatch(host) or re.search(r"\s", url) or parts.username or parts.query or parts.fragment:
            raise ConfigError(f"cannot read the server URL {url!r}. {_EXAMPLES}", key="url")
        protocol, tls, usual_port = _SCHEMES[parts.scheme]
        path = parts.path.rstrip("/")
        if path and protocol == "grpc":
            raise ConfigError(f"the server URL {url!r} has a path, which gRPC knows nothing of. {_EXAMPLES}", key="url")
        return cls(protocol, tls, host, usual_port if port is None else port, path)

    @property
    def loopback(self) -> bool:
        """Whether the host is this one by name; nothing is looked up."""
        return is_loopback(self.host)

    @property
    def target(self) -> str:
        """`host:port`, IPv6 hosts in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        """The URL, scheme always written out."""
        return f"{self.protocol}{'s' if self.tls else ''}://{self.target}{self.path}"


@dataclass(frozen=True)
class Tls:
    """PEM files for `grpcs://` and `https://`: who is trusted, and for mutual TLS who we are.

    Without `ca_file` the system's authorities are trusted; `cert_file` and `key_file` go together.
    """

    ca_file: str | Path | None = None
    cert_file: str | Path | None = None
    key_file: str | Path | None = None

    def __post_init__(self) -> None:
        """Refuse half a key pair."""
        if bool(self.cert_file) != bool(self.key_file):
            raise ConfigError("mutual TLS needs both cert_file and key_file; got only one of them.")

    def check_files(self) -> None:
        """Asked when a client is made, not when it is configured: another host's files need not be here.

        Raises:
            ConfigError: a file is not there.
        """
        for name in ("ca_file", "cert_file", "key_file"):
            path = getattr(self, name)
            if path and not Path(path).is_file():
                raise ConfigError(f"TLS {name} {path} is not there; expected a PEM file.")


class Access(TypedDict, total=False):
    """What one server wants of its clients beside its address; keyword arguments of every embedder."""

    headers: dict[str, str]
    tls: Tls
    compression: str | None


@dataclass(frozen=True)
class Connection:
    """Everything that a transport is opened with."""

    address: Address
    headers: dict[str, str] = field(default_factory=dict)
    tls: Tls = field(default_factory=Tls)
    compression: str | None = None

    def __post_init__(self) -> None:
        """Refuse files that nothing would read."""
        if self.tls != Tls() and not self.address.tls:
            raise ConfigError(
                f"TLS files were given for {self.address}, which is not encrypted: use grpcs:// or https://."
            )


_EXAMPLES = "Expected localhost:8001, grpc://host:8001, grpcs://host:8001, http://host:8000 or https://host/base"
