"""Where a server listens: three ports, looked at and kept before it starts."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from arcface_build.errors import ServerFailed
from arcface_build.serving.exposure import no_address
from arcface_clients.errors import WrongUse


@dataclass(frozen=True)
class Ports:
    """Where the server listens."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    def named(self) -> dict[str, int]:
        """What each is for."""
        return {"http": self.http, "grpc": self.grpc, "metrics": self.metrics}

    def check_free(self, hosts: Mapping[str, str]) -> None:
        """Refuse before Triton does, with a message that names the port and the option.

        Raises:
            WrongUse: two of them are the same, or the host is none of this machine's addresses.
            ServerFailed: something listens on one of them, or this user may not.
        """
        named = self.named()
        if len(set(named.values())) < len(named):
            told = ", ".join(f"{name} {port}" for name, port in named.items())
            raise WrongUse(f"expected three different ports, got {told}. Next: arcface serve --help")
        for name, port in named.items():
            host = hosts[name]
            try:
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that just ended is no hindrance
                    probe.bind((host, port))
            except OSError as exc:
                if isinstance(exc, socket.gaierror) or exc.errno == errno.EADDRNOTAVAIL:
                    raise no_address(host, exc.strerror) from exc
                if exc.errno != errno.EADDRINUSE:
                    raise ServerFailed(
                        f"cannot listen on port {port} ({name}) of {host}: {exc.strerror}. "
                        f"Take another: arcface serve --{name}-port {port + 8000}"
                    ) from exc
                raise ServerFailed(_in_use(name, port, host)) from exc


class PortLock:
    """Three ports kept for one server of this host, from before it starts until it has ended.

    Between the look whether a port is free and the moment in which tritonserver listens on it, seconds pass: without
    the lock a second `arcface serve` would start as well, and ask the first one's server whether it is ready. The lock
    is a name in Linux's abstract socket namespace: it belongs to the network namespace, as ports do, and is gone with
    its process.
    """

    def __init__(self, ports: Ports, hosts: Mapping[str, str]) -> None:
        """Take it.

        Raises:
            ServerFailed: another server is starting on one of the ports.
        """
        self._sockets: list[socket.socket] = []
        for name, port in ports.named().items():
            lock = socket.socket(socket.AF_UNIX)
            self._sockets.append(lock)
            try:
                lock.bind(f"\0arcface-port-{port}")
            except OSError as exc:
                self.release()
                raise ServerFailed(_in_use(name, port, hosts[name])) from exc

    def release(self) -> None:
        """Give it back; once is enough."""
        while self._sockets:
            self._sockets.pop().close()


def free_ports() -> Ports:
    """Three ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(3)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = Ports(*(s.getsockname()[1] for s in sockets))
    for s in sockets:
        s.close()
    return ports


def _in_use(name: str, port: int, host: str) -> str:
    return (
        f"port {port} ({name}) is in use on {host}. Stop what listens there (ss -ltnp | grep {port}), "
        f"or take another: arcface serve --{name}-port {port + 10}"
    )
