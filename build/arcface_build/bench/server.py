"""The server that is measured: a running one by its address, else one of our own on free ports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from arcface_build.bench.perf_analyzer import access_options
from arcface_build.serving.binary import find_tritonserver
from arcface_build.serving.listener import pid_listening_on
from arcface_build.serving.process import TritonProcess, free_ports
from arcface_clients.errors import WrongUse
from arcface_clients.triton.address import Access, Address
from arcface_clients.triton.admin_key import GRPC_HEADER, HTTP_HEADER, find_key


@dataclass(frozen=True)
class Target:
    """The server under test: host:port of both protocols; `pid` only where it runs on this host."""

    grpc_url: str
    http_url: str
    pid: int | None = None
    access: Access = field(default_factory=Access)
    encrypted: bool = False  # gRPC with TLS; HTTPS is in http_url's own scheme

    def url(self, protocol: str) -> str:
        """host:port for one of perf_analyzer's protocols."""
        return self.grpc_url if protocol.startswith("grpc") else self.http_url

    def options(self) -> list[str]:
        """What perf_analyzer has to be told beside the address."""
        key = find_key(Address.parse(self.grpc_url))  # for the requests through shared memory
        admin = {HTTP_HEADER: key, GRPC_HEADER: key} if key else {}
        headers = {**admin, **self.access.get("headers", {})}
        return access_options({**self.access, "headers": headers}, self.encrypted)


@contextmanager
def own_server(repository: Path, models: Sequence[str], config: str, folder: Path) -> Iterator[Target]:
    """A tritonserver of ours on a model repository, stopped at the end; its log goes into `folder`.

    Raises:
        WrongUse: a model or a config that the repository has not.
        Missing: no tritonserver, or it did not start.
    """
    check_served(repository, models, config)
    log = folder / "tritonserver.log"
    with TritonProcess(
        find_tritonserver(), repository, models, config_name=config, ports=free_ports(), log_path=log
    ) as server:
        server.wait_ready()
        yield Target(server.grpc_url, server.http_url, server.pid)


def running_server(url: str, http_url: str | None = None, access: Access | None = None) -> Target:
    """The running server at host:port of its gRPC; its HTTP is at the port below where nobody says otherwise.

    Raises:
        WrongUse: no such address.
    """
    scheme, _, rest = url.rpartition("://")
    host, _, port = rest.rpartition(":")
    if scheme not in ("", "grpc", "grpcs") or not host or not port.isdecimal():
        raise WrongUse(f"--url is {url!r}: expected host:port of the server's gRPC, such as localhost:8001.")
    return Target(
        f"{host}:{port}",
        http_url or f"{host}:{int(port) - 1}",
        pid_listening_on(int(port)) if host in ("localhost", "127.0.0.1") else None,
        access or {},
        scheme == "grpcs",
    )


def check_served(repository: Path, models: Sequence[str], config: str) -> None:
    """Refuse names that Triton would not: it says little of a model that is not there, and nothing of a config.

    Raises:
        WrongUse: a model that the repository has not, or a config (configs/NAME.pbtxt) that no model of it has.
    """
    there = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    if absent := [model for model in models if model not in there]:
        raise WrongUse(f"no model {', '.join(absent)} in {repository}: expected some of {', '.join(there)}.")
    configs = sorted({path.stem for path in repository.glob("*/configs/*.pbtxt")})
    if config and config not in configs:
        raise WrongUse(f"no model in {repository} has configs/{config}.pbtxt: expected one of {', '.join(configs)}.")
