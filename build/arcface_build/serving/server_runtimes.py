"""Which runtimes a tritonserver has for ONNX models: asked of the server that will run them, not of this Python."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from arcface_build.errors import ServerFailed
from arcface_build.serving.binary import TritonBinary, find_tritonserver
from arcface_build.serving.ports import free_ports
from arcface_build.serving.process import TritonProcess
from arcface_build.serving.reasons import refusals
from arcface_clients.engines.runtimes import cpu_flags, cpu_runtimes, has_openvino
from arcface_clients.errors import Missing

_PROBE = "arcface_probe"
# ONNX: y = Relu(x), float32 [N,1].
_ONNX = "CAc6QQoMCgF4EgF5IgRSZWx1EgVwcm9iZVoUCgF4Eg8KDQgBEgkKAxIBTgoCCAFiFAoBeRIPCg0IARIJCgMSAU4KAggBQgQKABAN"
_CONFIG = """name: "arcface_probe"
backend: "onnxruntime"
default_model_filename: "model.onnx"
max_batch_size: 1
instance_group [ { count: 1 kind: KIND_CPU } ]
optimization { execution_accelerators { cpu_execution_accelerator [ { name: "openvino" } ] } }
"""


@dataclass(frozen=True)
class ServerRuntimes:
    """What runs ONNX models behind a server.

    Attributes:
        here: runtimes on this CPU, the fastest first (`arcface_clients.engines.runtimes.RUNTIMES`).
        told_precision: whether the OpenVINO provider is told in which precision to compute. Our backend tells it;
            Triton's own ignores the accelerator's parameters, and OpenVINO then decides by the CPU.
    """

    here: tuple[str, ...]
    told_precision: bool = True


def runtimes_of_server(binary: TritonBinary, warn: Callable[[str], None]) -> ServerRuntimes:
    """The runtimes of this server: our backend runs in this very environment; a native one is tried with a model.

    Args:
        binary: the server.
        warn: told where the trial itself failed, so that OpenVINO is done without.
    """
    if binary.backend_directory is not None:
        return ServerRuntimes(cpu_runtimes(cpu_flags(), has_openvino()))
    try:
        openvino = loads_openvino(binary)
    except ServerFailed as exc:
        warn(f"whether this tritonserver has OpenVINO is not known, so nothing runs in it this time: {exc}")
        openvino = False
    return ServerRuntimes(cpu_runtimes(cpu_flags(), openvino), told_precision=False)


def runtimes_of_host(warn: Callable[[str], None]) -> ServerRuntimes:
    """The runtimes of the tritonserver of this host; of this Python where there is none, as on a build host."""
    try:
        return runtimes_of_server(find_tritonserver(), warn)
    except Missing:
        return ServerRuntimes(cpu_runtimes(cpu_flags(), has_openvino()))


def loads_openvino(binary: TritonBinary, timeout_s: float = 60.0) -> bool:
    """Whether the server's onnxruntime backend loads a model with the OpenVINO provider: it is started for that.

    An answer holds as long as this process; no answer is asked for again.

    Raises:
        ServerFailed: it did not start, for a reason that says nothing about OpenVINO.
    """
    return _probed(binary.path, binary.backend_directory, tuple(binary.environment.items()), timeout_s)


@cache
def _probed(path: Path, backends: Path | None, environment: tuple[tuple[str, str], ...], timeout_s: float) -> bool:
    binary = TritonBinary(path, dict(environment), backends)
    with tempfile.TemporaryDirectory(prefix="arcface-probe-") as name:
        version = Path(name) / "models" / _PROBE / "1"
        version.mkdir(parents=True)
        (version / "model.onnx").write_bytes(base64.b64decode(_ONNX))
        (version.parent / "config.pbtxt").write_text(_CONFIG)
        log_path = Path(name) / "tritonserver.log"
        server = TritonProcess(
            binary, version.parents[1], [_PROBE], config_name="", ports=free_ports(), log_path=log_path
        )
        try:
            with server:
                server.wait_ready(timeout_s)
        except ServerFailed:
            if "openvino" in refusals(log_path).get(_PROBE, "").lower():
                return False
            raise
    return True
