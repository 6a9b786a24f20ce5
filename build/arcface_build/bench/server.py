"""The server under test: a running one by its address, else our own on free ports."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from arcface_build.bench.perf_analyzer import access_options
from arcface_build.errors import ServerFailed
from arcface_build.plans.gpu import gpu_sm
from arcface_build.repository.integrity import CHOICE, HELD
from arcface_build.repository.versions import served_manifest
from arcface_build.serving.binary import find_tritonserver
from arcface_build.serving.listener import pid_listening_on
from arcface_build.serving.ports import free_ports
from arcface_build.serving.process import TritonProcess
from arcface_clients.errors import WrongUse
from arcface_clients.triton.address import Access, Address
from arcface_clients.triton.admin_key import GRPC_HEADER, HTTP_HEADER, find_key
from arcface_clients.triton.memory.system import is_local


@dataclass(frozen=True)
class ServerUnderTest:
    """The server under test: host:port of both protocols; `pid` only if it runs on this host."""

    grpc_url: str
    http_url: str
    pid: int | None = None
    access: Access = field(default_factory=Access)
    metrics_url: str = ""  # host:port; "": not known
    encrypted: bool = False  # gRPC with TLS; HTTPS is in http_url's own scheme

    def url(self, protocol: str) -> str:
        """host:port for one of perf_analyzer's protocols."""
        return self.grpc_url if protocol.startswith("grpc") else self.http_url

    def options(self) -> list[str]:
        """perf_analyzer's options besides the address."""
        key = find_key(Address.parse(self.grpc_url))  # for the requests through shared memory
        admin = {HTTP_HEADER: key, GRPC_HEADER: key} if key else {}
        headers = {**admin, **self.access.get("headers", {})}
        return access_options({**self.access, "headers": headers}, self.encrypted)


@contextmanager
def own_server(repository: Path, models: Sequence[str], config: str) -> Iterator[ServerUnderTest]:
    """Our own tritonserver on a model repository, stopped at the end.

    Raises:
        WrongUse: the repository lacks a model or the config.
        Missing: no tritonserver, or it did not start.
    """
    check_names(repository, models, config)
    with (
        server_log() as log,
        TritonProcess(
            find_tritonserver(), repository, models, config_name=config, ports=free_ports(), log_path=log
        ) as server,
    ):
        server.wait_ready()
        metrics_url = f"127.0.0.1:{server.ports.metrics}"
        yield ServerUnderTest(server.grpc_url, server.http_url, server.pid, metrics_url=metrics_url)


def still_to_choose(repository: Path, config: str) -> str:
    """A sentence where what is installed is not yet what `arcface serve` would choose to serve here; "" otherwise."""
    served = served_manifest(repository) or {}
    settled = any(served.get(key) for key in ("variant", CHOICE, HELD))
    if config != "onnx" or not served or settled or gpu_sm() is not None:
        return ""
    return (
        f"measuring {served['name']} in fp32 in onnxruntime, as it was installed; `arcface serve` looks for the "
        f"fastest on this host first, as does: arcface assemble {served['name']} --variant auto"
    )


@contextmanager
def server_log() -> Iterator[Path]:
    """Where a temporary server may log; the log stays where the server fails, because the error names it."""
    folder = Path(tempfile.mkdtemp(prefix="arcface-tritonserver-"))
    failed = False
    try:
        yield folder / "tritonserver.log"
    except ServerFailed:
        failed = True
        raise
    finally:
        if not failed:
            shutil.rmtree(folder, ignore_errors=True)


def running_server(url: str, http_url: str | None = None, access: Access | None = None) -> ServerUnderTest:
    """The running server with gRPC at host:port; its HTTP is at the port below unless stated.

    Raises:
        WrongUse: not a valid address.
    """
    address = Address.parse(url)
    if address.protocol != "grpc":
        raise WrongUse(f"--url is {url!r}: expected host:port of the server's gRPC, such as localhost:8001.")
    return ServerUnderTest(
        address.target,
        http_url or replace(address, port=address.port - 1).target,
        pid_listening_on(address.port) if is_local(address.host) else None,
        access or {},
        encrypted=address.tls,
    )


def check_names(repository: Path, models: Sequence[str], config: str) -> None:
    """Check names, because Triton says little about a missing model and nothing about a missing config.

    Raises:
        WrongUse: the repository lacks a model, or none of its models has the config (configs/NAME.pbtxt).
    """
    there = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    if absent := [model for model in models if model not in there]:
        raise WrongUse(f"no model {', '.join(absent)} in {repository}: expected some of {', '.join(there)}.")
    configs = sorted({path.stem for path in repository.glob("*/configs/*.pbtxt")})
    if config and config not in configs:
        raise WrongUse(f"no model in {repository} has configs/{config}.pbtxt: expected one of {', '.join(configs)}.")
