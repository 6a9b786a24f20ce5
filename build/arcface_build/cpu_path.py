"""The CPU fast path: a model folder in; the fastest variant that passed its gate on this CPU, with a reason, out.

Runtimes are written as `onnxruntime` (ONNX Runtime's own kernels), `openvino-fp32` and `openvino-bf16` (the same file
through ONNX Runtime's OpenVINO provider, with that inference precision for whatever the file leaves as float).
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, replace
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
        threads: intra-op threads; default: the cores that this process may use. They stop spinning when a run ends.

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
    options.add_session_config_entry("session.force_spinning_stop", "1")
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
            "Next: arcface doctor, which lists the providers; variants for them are made by arcface quantize"
        )
    return session


def choose(
    model_dir: Path,
    max_drift: float | None = None,
    flags: frozenset[str] | None = None,
    openvino: bool | None = None,
    cpu: str | None = None,
) -> Choice:
    """The fastest variant that passed its gate in a runtime that this CPU has; fp32 serving ONNX where none did.

    The order is int8, bf16, fp32, unless `arcface bench-variants` has measured this model on this CPU: then its order.

    Args:
        model_dir: models/NAME/.
        max_drift: a stricter limit than the gates' own (1 − cosine per face), if the caller has one.
        flags: instruction sets; default: this CPU's.
        openvino: whether the provider is there; default: looked up.
        cpu: name of the CPU, for the measured order; default: this one's.
    """
    from arcface_build.variants.sidecar import read_sidecar  # which itself stands on this module

    flags = cpu_flags() if flags is None else flags
    openvino = has_openvino() if openvino is None else openvino
    speeds = measured_speeds(model_dir, cpu_name() if cpu is None else cpu)
    found: list[Choice] = []
    passed_over: list[str] = []
    for precision in ("int8", "bf16"):
        sidecar = read_sidecar(model_dir, precision, "cpu")
        runtime, why_not = _gated_runtime(precision, sidecar, max_drift, flags, openvino)
        if runtime is None or sidecar is None:
            passed_over.append(f"{precision}: {why_not}")
            continue
        drift = next(g["drift"]["max_drift"] for g in sidecar["gates"] if g["runtime"] == runtime)
        reason = f"{precision} passed its gate (drift {drift:.2g}) and this CPU has its instructions"
        if precision in speeds:
            reason += f"; measured here: {speeds[precision]:.2f} × ONNX Runtime fp32"
        found.append(Choice(sidecar["file"], precision, runtime, reason, sidecar))
    fp32 = "openvino-fp32" if openvino else "onnxruntime"
    found.append(Choice("serving.onnx", "fp32", fp32, "fp32, which needs no gate of its own"))
    measured = [c for c in found if c.precision in speeds]
    best = max(measured, key=lambda c: speeds[c.precision]) if len(measured) == len(found) else found[0]
    passed_over += [f"{c.precision}: measured slower here" for c in found[: found.index(best)]]
    return replace(best, reason=best.reason + "".join(f"; not {why}" for why in passed_over))


def _gated_runtime(
    precision: str, sidecar: dict[str, Any] | None, max_drift: float | None, flags: frozenset[str], openvino: bool
) -> tuple[str | None, str]:
    """The runtime in which a variant may be served on such a CPU, or None and why not."""
    if not openvino:
        return None, "this ONNX Runtime has no OpenVINO provider"
    if precision == "int8" and not has_int8(flags):
        return None, "no 8-bit dot product (avx512_vnni, avx_vnni, amx_int8) on this CPU"
    if precision == "bf16" and not has_bf16(flags):
        return None, "no bf16 instructions (avx512_bf16, amx_bf16) on this CPU"
    if sidecar is None:
        return None, "none that passed its gate (arcface quantize makes one)"
    runtimes = [r for r in ("openvino-bf16", "openvino-fp32") if r == "openvino-fp32" or has_bf16(flags)]
    if precision == "bf16":
        runtimes = ["openvino-bf16"]
    drifts = {gate["runtime"]: gate["drift"]["max_drift"] for gate in sidecar["gates"] if gate["passed"]}
    runtime = next((r for r in runtimes if r in drifts), None)
    if runtime is None:
        return None, f"not gated in a runtime of this CPU ({', '.join(runtimes)})"
    if max_drift is not None and drifts[runtime] > max_drift:
        return None, f"drift {drifts[runtime]:.2g} is above {max_drift:g}"
    return runtime, ""


def speeds_file(model_dir: Path) -> Path:
    """Where `arcface bench-variants` leaves what it measured."""
    return model_dir / "variants" / "speed.json"


def measured_speeds(model_dir: Path, cpu: str) -> dict[str, float]:
    """Precision → throughput over ONNX Runtime fp32, as measured on a CPU of this name; empty where never measured."""
    path = speeds_file(model_dir)
    if not path.is_file():
        return {}
    data = json.loads(path.read_text())
    return data["ratio"] if data.get("cpu") == cpu else {}


@cache
def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor as the kernel names it."""
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
    return next(lines, f":{platform.machine()}").partition(":")[2].strip()
