"""The CPU fast path: picks the fastest variant that passed its gate in a runtime of this CPU, and says why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from arcface_build.variants.sidecar import read_sidecar
from arcface_clients.engines.model_folder import folder_of
from arcface_clients.engines.runtimes import (
    cpu_flags,
    cpu_name,
    cpu_runtimes,
    has_int8,
    has_openvino,
    runtime_for,
)
from arcface_clients.errors import GateFailed
from arcface_clients.evidence.gate import judge_sidecar


@dataclass(frozen=True)
class VariantChoice:
    """What to serve on this CPU: `file` is relative to the model folder; `reason` is one line for people."""

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


def choose(
    model_dir: Path,
    limits: Mapping[str, float] | None = None,
    flags: frozenset[str] | None = None,
    openvino: bool | None = None,
    cpu: str | None = None,
    told_precision: bool = True,
) -> VariantChoice:
    """The fastest variant that passed its gate in a runtime of this CPU; the fp32 serving ONNX if none did.

    The order is int8, bf16, fp32, unless `arcface bench-variants` has measured this model on this CPU.

    Args:
        model_dir: models/NAME/.
        limits: largest drift by precision; None keeps the limits that the variants were judged by.
        flags: instruction sets; default: this CPU's.
        openvino: whether the provider is available; default: detected.
        cpu: name of the CPU, for the measured order; default: this one's.
        told_precision: whether the provider is told in which precision to compute; see `runtime_for`.
    """
    flags = cpu_flags() if flags is None else flags
    openvino = has_openvino() if openvino is None else openvino
    speeds = measured_speeds(model_dir, cpu_name() if cpu is None else cpu)
    found: list[VariantChoice] = []
    passed_over: list[str] = []
    for precision in ("int8", "bf16"):
        sidecar = read_sidecar(model_dir, precision, "cpu")
        runtime, why_not = _worth_serving(
            precision, sidecar, limits, flags, openvino, precision in speeds, told_precision
        )
        if runtime is not None and sidecar is not None:
            try:
                folder_of(model_dir / "serving.onnx").check_proved(model_dir / sidecar["file"])
            except GateFailed as exc:
                runtime, why_not = None, str(exc)
        if runtime is None or sidecar is None:
            passed_over.append(f"{precision}: {why_not}")
            continue
        drift = _drift(sidecar, runtime)
        reason = f"{precision} passed its gate (drift {drift:.2g}) and this CPU has its instructions"
        if precision in speeds:
            reason += f"; measured here: {speeds[precision]:.2f} × ONNX Runtime fp32"
        found.append(VariantChoice(sidecar["file"], precision, runtime, reason, sidecar))
    fp32 = "openvino-fp32" if openvino else "onnxruntime"
    found.append(VariantChoice("serving.onnx", "fp32", fp32, "fp32, which needs no separate gate"))
    measured = [c for c in found if c.precision in speeds]
    best = max(measured, key=lambda c: speeds[c.precision]) if len(measured) == len(found) else found[0]
    passed_over += [f"{c.precision}: measured slower here" for c in found[: found.index(best)]]
    return replace(best, reason=best.reason + "".join(f"; not {why}" for why in passed_over))


def _worth_serving(
    precision: str,
    sidecar: dict[str, Any] | None,
    limits: Mapping[str, float] | None,
    flags: frozenset[str],
    openvino: bool,
    measured: bool,
    told_precision: bool,
) -> tuple[str | None, str]:
    """A runtime in which a variant may be served and is faster, or None and the reason."""
    if sidecar is None:
        return None, "none that passed its gate (arcface quantize makes one)"
    verdicts, here = judge_sidecar(sidecar, limits), cpu_runtimes(flags, openvino)
    passed = [runtime for runtime, verdict in verdicts.items() if verdict.passed]
    runtime, why_not = runtime_for(precision, passed, here, told_precision)
    if runtime is None:
        refused = (verdicts[one].why for one in here if one in verdicts and not verdicts[one].passed)
        return None, next(refused, why_not)
    if precision == "int8" and not has_int8(flags):
        return None, "no 8-bit dot product (avx512_vnni, avx_vnni, amx_int8) on this CPU"
    if runtime == "onnxruntime" and not measured:
        return None, "ONNX Runtime's own kernels compute what it leaves in float, and no gain was measured here"
    return runtime, ""


def _drift(sidecar: dict[str, Any], runtime: str) -> float:
    return float(next(gate["drift"]["max_drift"] for gate in sidecar["gates"] if gate["runtime"] == runtime))


def speeds_file(model_dir: Path) -> Path:
    """Where `arcface bench-variants` stores its measurements."""
    return model_dir / "variants" / "speed.json"


def measured_speeds(model_dir: Path, cpu: str) -> dict[str, float]:
    """Precision → throughput over ONNX Runtime fp32, as measured on a CPU of this name; empty if never measured."""
    path = speeds_file(model_dir)
    if not path.is_file():
        return {}
    data = json.loads(path.read_text())
    return data["ratio"] if data.get("cpu") == cpu else {}
