"""The CPU fast path: a model folder in; the fastest variant that passed its gate on this CPU, with a reason, out.

Runtimes are written as `onnxruntime` (ONNX Runtime's own kernels), `openvino-fp32` and `openvino-bf16` (the same file
through ONNX Runtime's OpenVINO provider, with that inference precision for whatever the file leaves as float).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_build.errors import Missing, WrongUse

if TYPE_CHECKING:
    import onnx
    import onnxruntime

RUNTIMES = ("onnxruntime", "openvino-fp32", "openvino-bf16")
_HINTS = {"openvino-fp32": "f32", "openvino-bf16": "bf16"}
_PROVIDER = "OpenVINOExecutionProvider"


@dataclass(frozen=True)
class Choice:
    """What to serve on this CPU: `file` is relative to the model folder; `reason` is one line for a person."""

    file: str
    precision: str
    runtime: str
    reason: str
    sidecar: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)

    def accelerator_pbtxt(self) -> str:
        """The `optimization` block for config.pbtxt; empty for ONNX Runtime's own kernels."""
        if self.runtime == "onnxruntime":
            return ""
        return (
            'optimization { execution_accelerators { cpu_execution_accelerator [ { name: "openvino" '
            f'parameters {{ key: "precision" value: "{self.runtime.removeprefix("openvino-")}" }} }} ] }} }}\n'
        )


@cache
def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction sets as the kernel names them (avx512_bf16, amx_bf16, avx512_vnni, …); empty where it tells none."""
    if not cpuinfo.is_file():
        return frozenset()
    lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    return frozenset(next(lines, ":").partition(":")[2].split())


def has_bf16(flags: frozenset[str]) -> bool:
    """Whether bf16 products are instructions here; without them OpenVINO would quietly compute in fp32."""
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def has_int8(flags: frozenset[str]) -> bool:
    """Whether 8-bit dot products are instructions here."""
    return bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8"})


def has_openvino() -> bool:
    """Whether the installed ONNX Runtime carries the OpenVINO provider (wheel onnxruntime-openvino)."""
    import onnxruntime

    return _PROVIDER in onnxruntime.get_available_providers()


def fast_runtime(flags: frozenset[str] | None = None) -> str:
    """The runtime in which variants for this CPU are measured and served."""
    if not has_openvino():
        return "onnxruntime"
    return "openvino-bf16" if has_bf16(cpu_flags() if flags is None else flags) else "openvino-fp32"


def open_session(
    model: Path | onnx.ModelProto | bytes, runtime: str = "onnxruntime", threads: int | None = None
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session that is proved to run where it was asked to.

    Args:
        model: a file, a model, or a serialised model.
        runtime: one of `RUNTIMES`.
        threads: intra-op threads; default: the cores that this process may use. Idle threads do not spin.

    Raises:
        Missing: the runtime is not installed, or took another provider than asked (it says so only in its log).
        WrongUse: no such runtime.
    """
    import onnxruntime

    if runtime not in RUNTIMES:
        raise WrongUse(f"no runtime {runtime!r}: expected one of {', '.join(RUNTIMES)}.")
    threads = threads or len(os.sched_getaffinity(0))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = ["CPUExecutionProvider"]
    if runtime != "onnxruntime":
        hints = {"INFERENCE_PRECISION_HINT": _HINTS[runtime], "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1"}
        providers.insert(0, (_PROVIDER, {"device_type": "CPU", "load_config": json.dumps({"CPU": hints})}))
        if not has_openvino():
            raise Missing(
                "this ONNX Runtime has no OpenVINO provider "
                f"(it has {', '.join(onnxruntime.get_available_providers())}). "
                "It is in the wheel onnxruntime-openvino, which takes the place of onnxruntime: "
                "pip uninstall onnxruntime && pip install onnxruntime-openvino"
            )
    if isinstance(model, Path):
        source: str | bytes = str(model)
    else:
        source = model if isinstance(model, bytes) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=providers)
    taken, expected = session.get_providers()[0], _PROVIDER if len(providers) > 1 else "CPUExecutionProvider"
    if taken != expected:
        raise Missing(
            f"ONNX Runtime {onnxruntime.__version__} took {taken} where {expected} was asked for (runtime {runtime}). "
            "Its log says why: run again with --log-level info, or use --runtime onnxruntime"
        )
    return session


def choose(
    model_dir: Path, max_drift: float | None = None, flags: frozenset[str] | None = None, openvino: bool | None = None
) -> Choice:
    """The fastest variant that passed its gate in a runtime that this CPU has; fp32 serving ONNX where none did.

    The order is the one that `arcface bench variants` measures on CPUs with these instructions: int8, bf16, fp32.

    Args:
        model_dir: models/NAME/.
        max_drift: a stricter limit than the gates' own (1 − cosine per face), if the caller has one.
        flags: instruction sets; default: this CPU's.
        openvino: whether the provider is there; default: looked up.
    """
    from arcface_build.variants.sidecar import read_sidecar  # which itself stands on this module

    flags = cpu_flags() if flags is None else flags
    openvino = has_openvino() if openvino is None else openvino
    runtimes = ("openvino-bf16", "openvino-fp32") if has_bf16(flags) else ("openvino-fp32",)
    passed_over: list[str] = []
    for precision, instructions, why_not in (
        ("int8", has_int8(flags), "no 8-bit dot product (avx512_vnni, avx_vnni, amx_int8) on this CPU"),
        ("bf16", has_bf16(flags), "no bf16 instructions (avx512_bf16, amx_bf16) on this CPU"),
    ):
        sidecar = read_sidecar(model_dir, precision, "cpu")
        if not openvino:
            passed_over.append(f"{precision}: this ONNX Runtime has no OpenVINO provider")
        elif not instructions:
            passed_over.append(f"{precision}: {why_not}")
        elif sidecar is None:
            passed_over.append(f"{precision}: none that passed its gate (arcface quantize makes one)")
        else:
            drifts = {gate["runtime"]: gate["drift"]["max_drift"] for gate in sidecar["gates"] if gate["passed"]}
            runtime = next((r for r in runtimes if r in drifts), None)
            if precision == "bf16" and runtime != "openvino-bf16":
                runtime = None
            if runtime is None:
                passed_over.append(f"{precision}: not gated in a runtime of this CPU ({', '.join(runtimes)})")
            elif max_drift is not None and drifts[runtime] > max_drift:
                passed_over.append(f"{precision}: drift {drifts[runtime]:.2g} is above {max_drift:g}")
            else:
                reason = f"{precision} passed its gate (drift {drifts[runtime]:.2g}) and this CPU has its instructions"
                return Choice(sidecar["file"], precision, runtime, _with(reason, passed_over), sidecar)
    runtime = "openvino-fp32" if openvino else "onnxruntime"
    return Choice("serving.onnx", "fp32", runtime, _with("fp32, which needs no gate of its own", passed_over))


def _with(reason: str, passed_over: list[str]) -> str:
    return reason + (f"; not {'; not '.join(passed_over)}" if passed_over else "")
