"""Who reaches a server: what listens on which address, when that is refused, and the options that tell Triton."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from arcface_clients.errors import WrongUse
from arcface_clients.triton.address import is_loopback
from arcface_clients.triton.certificate import RENEW_DAYS, Certificate, check_authorities, read_certificate

LOOPBACK = "127.0.0.1"
# Triton's own options for what is decided here; after "--" they would open what was checked to be shut.
OURS = {
    "--http-address": "--http-host",
    "--grpc-address": "--host",
    "--metrics-address": "--metrics-host",
    "--http-port": "--http-port, before the --",
    "--grpc-port": "--grpc-port, before the --",
    "--metrics-port": "--metrics-port, before the --",
    "--reuse-http-port": "a port for each server",
    "--reuse-grpc-port": "a port for each server",
    "--grpc-use-ssl": "--tls-cert and --tls-key",
    "--grpc-use-ssl-mutual": "--client-ca",
    "--grpc-server-cert": "--tls-cert",
    "--grpc-server-key": "--tls-key",
    "--grpc-root-cert": "--client-ca",
    "--http-restricted-api": "ARCFACE_ADMIN_KEY",
    "--grpc-restricted-protocol": "ARCFACE_ADMIN_KEY",
    "--allow-sagemaker": "tritonserver itself: it is one more port, without a key",
    "--allow-vertex-ai": "tritonserver itself: it is one more port, without a key",
}
_OPENS_A_PORT = ("AIP_MODE",)  # PREDICTION makes Triton listen for Vertex AI, on all addresses


@dataclass(frozen=True)
class ServerTls:
    """What gRPC is encrypted with: PEM files; with `client_ca_file` only clients that it signed are let in."""

    cert_file: Path
    key_file: Path
    certificate: Certificate
    client_ca_file: Path | None = None


@dataclass(frozen=True)
class Exposure:
    """The IPv4 addresses that a server listens on. One that is refused cannot be made, so no door leads around it.

    Attributes:
        host: where gRPC listens.
        http_host: where HTTP listens; Triton's HTTP knows no TLS.
        metrics_host: where the metrics are; names of models and counts, no faces.
        tls: for gRPC.
        insecure: the network is trusted: what is not encrypted may leave this host.
    """

    host: str = LOOPBACK
    http_host: str = LOOPBACK
    metrics_host: str = LOOPBACK
    tls: ServerTls | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        """Refuse what would send faces readably to other hosts without having been asked to."""
        if not (self.tls or self.insecure or is_loopback(self.host)):
            raise WrongUse(
                f"gRPC on {self.host} would carry faces and embeddings readably through the network. Encrypt it "
                "(--tls-cert FILE --tls-key FILE), or say that this network is trusted: --insecure"
            )
        if not (self.insecure or is_loopback(self.http_host)):
            raise WrongUse(
                f"HTTP on {self.http_host} would carry faces and embeddings readably through the network: Triton's "
                "HTTP has no TLS. Use gRPC (--host), or say that this network is trusted: --insecure"
            )

    def hosts(self) -> dict[str, str]:
        """The address of each port."""
        return {"http": self.http_host, "grpc": self.host, "metrics": self.metrics_host}

    def options(self) -> list[str]:
        """Triton's command line for it."""
        line = [f"--{name}-address={host}" for name, host in self.hosts().items()]
        if self.tls:
            line += [
                "--grpc-use-ssl=true",
                f"--grpc-server-cert={self.tls.cert_file}",
                f"--grpc-server-key={self.tls.key_file}",
            ]
            if self.tls.client_ca_file:
                line += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={self.tls.client_ca_file}"]
        return line

    def concerns(self) -> list[str]:
        """What whoever serves should know; sentences."""
        said = []
        if self.insecure and not is_loopback(self.http_host):
            said.append(
                f"HTTP on {self.http_host} is not encrypted, and short JSON bodies end the server (SECURITY.md)"
            )
        if self.insecure and not self.tls and not is_loopback(self.host):
            said.append(f"gRPC on {self.host} is not encrypted: whoever is on the way can read faces and embeddings")
        if not is_loopback(self.host) and not (self.tls and self.tls.client_ca_file):
            said.append(
                f"whoever reaches {self.host} may embed faces; --client-ca FILE lets in whom you certified only"
            )
        if self.tls:
            days = self.tls.certificate.days_left()
            if days < RENEW_DAYS:
                said.append(f"{self.tls.cert_file} expires in {days:.0f} days: renew it, then start again")
            if self.tls.key_file.stat().st_mode & 0o077:
                said.append(f"others of this host can read {self.tls.key_file}: chmod 600 {self.tls.key_file}")
        return said

    def renewed(self) -> Exposure:
        """The same with its files read again, for a server that is started again: they may have been renewed.

        Raises:
            ConfigError, WrongUse: they cannot be used (now).
        """
        tls = self.tls and server_tls(self.tls.cert_file, self.tls.key_file, self.tls.client_ca_file)
        return replace(self, tls=tls)

    def client_host(self) -> str:
        """How a client should name the host of gRPC: by a name in the certificate, where there is one."""
        host = from_here(self.host)
        if self.tls is None or self.tls.certificate.is_for(host):
            return host
        plain = [name for name in self.tls.certificate.names if "*" not in name]
        return next((name for name in plain if is_loopback(name) == is_loopback(self.host)), next(iter(plain), host))


def address_of(host: str) -> str:
    """The IPv4 address of a name, looked up once, so that what is checked is what is listened on.

    Raises:
        WrongUse: it has none.
    """
    if not host.strip():  # a variable of the shell that is not set; gethostbyname takes it for all addresses
        raise no_address(repr(host), "it is empty")
    try:
        return socket.gethostbyname(host)
    except (OSError, UnicodeError) as exc:
        raise no_address(host, getattr(exc, "strerror", None) or exc) from exc


def no_address(host: str, why: object) -> WrongUse:
    """What is none of this host's addresses. IPv4: Triton's HTTP and gRPC want IPv6 written in two different ways."""
    return WrongUse(
        f"cannot listen on {host}: {why}. Expected an IPv4 address of this host (ip -4 address), "
        "127.0.0.1 for it alone, or 0.0.0.0 for all"
    )


def server_tls(cert_file: Path | None, key_file: Path | None, client_ca_file: Path | None = None) -> ServerTls | None:
    """The files of --tls-cert, --tls-key and --client-ca, read and checked; None where none is given.

    Raises:
        ConfigError: one of them cannot be used.
        WrongUse: one goes without the other.
    """
    if cert_file is None or key_file is None:
        if (cert_file, key_file, client_ca_file) == (None, None, None):
            return None
        raise WrongUse("TLS needs a certificate and its key: give both --tls-cert FILE and --tls-key FILE.")
    certificate = read_certificate(cert_file, key_file)
    if fault := certificate.fault():
        raise WrongUse(f"{cert_file} {fault}: no client would accept it. Renew it, then start again")
    if client_ca_file is not None:
        check_authorities(client_ca_file)
    # Links are left: a renewal sets them to other files, and a server that is started again should take those.
    return ServerTls(
        cert_file.absolute(), key_file.absolute(), certificate, client_ca_file and client_ca_file.absolute()
    )


def refuse_overrides(extra: Sequence[str]) -> None:
    """Refuse arguments for tritonserver that would undo what is decided here; it takes shortened options as well.

    Raises:
        WrongUse: there is one.
    """
    for argument in extra:
        name = argument.partition("=")[0]
        for option, instead in OURS.items():
            if len(name) > len("--") and option.startswith(name):
                raise WrongUse(
                    f"{name} after -- is refused: who reaches the server is not decided there. Use {instead}"
                )


def no_other_ports(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that make Triton open another port."""
    return {name: text for name, text in environment.items() if name not in _OPENS_A_PORT}


def from_here(host: str) -> str:
    """The address by which this host reaches what listens on `host`."""
    return LOOPBACK if host in ("0.0.0.0", "") else host
