"""Reads a server's certificate, from its files or over the network: the names that it is for, and until when."""

from __future__ import annotations

import hashlib
import socket
import ssl
from dataclasses import dataclass
from datetime import datetime, timezone
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from arcface_clients.errors import ConfigError
from arcface_clients.triton.address import Address, Tls

_IGNORE_TIMES = (
    0x200000  # X509_V_FLAG_NO_CHECK_TIME (openssl/x509_vfy.h), without a name in Python: an expired one is read too
)

RENEW_DAYS = 30  # a certificate with less time left is told of


@dataclass(frozen=True)
class Certificate:
    """A server's certificate.

    Attributes:
        names: host names and IP addresses that it was made for, as written in it.
        starts, expires: between these it is valid, UTC.
        sha256: of its DER form.
        self_signed: whether it is its own authority, so that clients take it as their ca_file.
    """

    names: tuple[str, ...]
    starts: datetime
    expires: datetime
    sha256: str
    self_signed: bool = False

    def is_for(self, host: str) -> bool:
        """Whether a client that asks for this host accepts it; `*.example.com` is for one label."""
        return any(_same(name, host.rstrip(".").lower()) for name in self.names)

    def days_left(self, now: datetime | None = None) -> float:
        """Days until it expires, negative after that."""
        return (self.expires - (now or datetime.now(timezone.utc))).total_seconds() / 86400

    def fault(self, now: datetime | None = None) -> str | None:
        """Why no client accepts it at this time, None: it is valid."""
        if self.days_left(now) <= 0:
            return f"expired on {self.expires:%Y-%m-%d %H:%M} UTC"
        if self.starts > (now or datetime.now(timezone.utc)):
            return f"is not valid before {self.starts:%Y-%m-%d %H:%M} UTC"
        return None


def read_certificate(cert_file: Path, key_file: Path) -> Certificate:
    """The certificate in a PEM file (its own first, then those up to its authority), proved to go with its key.

    Nothing is sent anywhere: a server and a client shake hands in memory.

    Raises:
        ConfigError: a file cannot be read, is no PEM file, or they do not belong together.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        server.load_cert_chain(cert_file, key_file, password=_no_password)
        client = _trusting(cert_file)
        return _shake_hands(client, server)
    except ssl.SSLError as exc:
        if "KEY_VALUES_MISMATCH" in str(exc):
            raise ConfigError(
                f"{key_file} is not the key of {cert_file}. Give the pair that was made together."
            ) from exc
        raise ConfigError(
            f"{cert_file} and {key_file} are no certificate for a server with its key. "
            "Expected PEM files, the key without a password."
        ) from exc
    except OSError as exc:
        raise ConfigError(f"cannot read {exc.filename or cert_file}: {exc.strerror}. Expected a PEM file.") from exc


def check_authorities(file: Path) -> None:
    """Refuse a PEM file by which nobody could be let in; one of a single client's certificate is as good as any.

    Raises:
        ConfigError: it cannot be read, holds no certificate or a damaged one, or its authorities have expired.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(file)
    except ssl.SSLError as exc:
        raise ConfigError(
            f"{file} holds no certificate, or a damaged one ({exc.reason or exc}). "
            "Expected the PEM file of an authority."
        ) from exc
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror}. Expected the PEM file of an authority.") from exc
    authorities: list[Any] = context.get_ca_certs()
    if authorities and len(authorities) == context.cert_store_stats()["x509"]:
        ends = max(_time(authority["notAfter"]) for authority in authorities)
        if ends <= datetime.now(timezone.utc):
            raise ConfigError(
                f"{file} expired on {ends:%Y-%m-%d %H:%M} UTC: whom it signed is let in by nobody. "
                "Renew the authority and what it signed, then start again."
            )


def presented_certificate(address: Address, tls: Tls, timeout_s: float) -> Certificate:
    """The certificate that a server presents, whatever its names and dates; who signed it has to be trusted.

    Raises:
        OSError: nobody listens there, what listens speaks no TLS, or its certificate is not trusted (ssl.SSLError).
    """
    context = ssl.create_default_context(cafile=tls.ca_file)
    context.check_hostname = False
    context.verify_flags |= _IGNORE_TIMES
    context.set_alpn_protocols(["h2"])
    if tls.cert_file:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    with (
        socket.create_connection((address.host, address.port), timeout_s) as plain,
        context.wrap_socket(plain, server_hostname=address.host) as encrypted,
    ):
        return _certificate(encrypted)


def presented_sha256(address: Address, timeout_s: float) -> str | None:
    """The sha256 of whatever certificate is presented there, trusted or not; None: what listens speaks no TLS.

    Raises:
        OSError: nobody listens there.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((address.host, address.port), timeout_s) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=address.host) as encrypted:
                return _sha256(encrypted)
        except OSError:
            return None


def _trusting(cert_file: Path) -> ssl.SSLContext:
    """A client that trusts the certificates of this file and nothing else."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cert_file)
    client.verify_flags |= _IGNORE_TIMES | ssl.VERIFY_X509_PARTIAL_CHAIN  # the server's own need not be an authority
    return client


def _shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> Certificate:
    here, there = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(here, there)
    answering = server.wrap_bio(there, here, server_side=True)
    for side in (asking, answering, asking):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return _certificate(asking)


def _certificate(connection: ssl.SSLSocket | ssl.SSLObject) -> Certificate:
    said: dict[str, Any] = connection.getpeercert() or {}
    names = [value.strip() for kind, value in said.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    return Certificate(
        tuple(names),
        _time(said["notBefore"]),
        _time(said["notAfter"]),
        _sha256(connection),
        said["subject"] == said["issuer"],
    )


def _sha256(connection: ssl.SSLSocket | ssl.SSLObject) -> str:
    return hashlib.sha256(connection.getpeercert(binary_form=True) or b"").hexdigest()


def _time(text: str) -> datetime:
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(text), timezone.utc)


def _same(name: str, host: str) -> bool:
    try:
        return ip_address(name) == ip_address(host)
    except ValueError:
        name = name.lower()
        return name == host or (name.startswith("*.") and host.partition(".")[2] == name[2:] != "")


def _no_password() -> str:
    """Asked for an encrypted key; without it OpenSSL would ask whoever sits at the terminal."""
    return ""
