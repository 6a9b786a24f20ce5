"""ONNX Runtime on this host: its capabilities, the only place that opens sessions, and which runtime may run a variant.

Runtimes are called `onnxruntime` (ONNX Runtime's own kernels), `openvino-fp32` and `openvino-bf16` (ONNX Runtime's
OpenVINO provider, with that inference precision for everything the file leaves in float).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from arcface_clients.arrays import Array
from arcface_clients.engines.devices import CPU, CUDA, OPENVINO, TENSORRT, wheels_with
from arcface_clients.errors import ArcFaceError, ConfigError, DependencyMissing, OutOfMemory, WrongUse
from arcface_clients.evidence.gate import judge_sidecar
from arcface_clients.extras import importing

if TYPE_CHECKING:
    import onnx

RUNTIMES = ("onnxruntime", "openvino-fp32", "openvino-bf16")
Provider: TypeAlias = "str | tuple[str, Mapping[str, str]]"
"""An ONNX Runtime provider, with its options if any."""
NO_IDLE_SPINNING = {"session.force_spinning_stop": "1"}  # idle threads that spin would starve other sessions
_HINTS = {"openvino-fp32": "f32", "openvino-bf16": "bf16"}
# Instruction sets that decide how fast each precision runs.
TELLING_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
# What ONNX Runtime raises for a bad graph with any provider; any other error is the provider's.
_GRAPH_FAULTS = ("InvalidArgument", "InvalidGraph", "InvalidProtobuf", "ModelLoadCanceled", "NoModel", "NoSuchFile")


class OnnxSession(Protocol):
    """The part of `onnxruntime.InferenceSession` that we use; the class has no type annotations itself."""

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Array]) -> list[Array]:
        """Outputs in the order of the given names (None: all outputs of the graph), for inputs by name."""
        ...

    def get_inputs(self) -> list[Any]:
        """Inputs, each with name, type and shape."""
        ...

    def get_outputs(self) -> list[Any]:
        """Outputs, each with name, type and shape."""
        ...

    def get_providers(self) -> list[str]:
        """Providers in use, preferred one first."""
        ...


@cache
def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction sets by their kernel names (avx512_bf16, amx_bf16, avx512_vnni, …); empty if it lists none."""
    if not cpuinfo.is_file():
        return frozenset()
    lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    return frozenset(next(lines, ":").partition(":")[2].split())


def has_bf16(flags: frozenset[str]) -> bool:
    """Whether this CPU has bf16 multiply instructions; without them OpenVINO would silently compute in fp32."""
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def has_openvino() -> bool:
    """Whether the installed ONNX Runtime includes the OpenVINO provider (wheel onnxruntime-openvino)."""
    import onnxruntime

    return OPENVINO in onnxruntime.get_available_providers()


def fast_runtime(flags: frozenset[str] | None = None) -> str:
    """The runtime in which variants for this CPU are measured and served."""
    if not has_openvino():
        return "onnxruntime"
    return "openvino-bf16" if has_bf16(cpu_flags() if flags is None else flags) else "openvino-fp32"


def open_session(
    model: Path | onnx.ModelProto | bytes,
    runtime: str | Sequence[Provider] = "onnxruntime",
    threads: int | None = None,
    *,
    settings: Mapping[str, str] = NO_IDLE_SPINNING,
    label: str | None = None,
    refused: type[ArcFaceError] = ConfigError,
) -> OnnxSession:
    """Open an ONNX Runtime session and verify that it uses the requested provider; all sessions are opened here.

    Args:
        model: a file, a model, or a serialised model.
        runtime: one of `RUNTIMES`, or providers with options in order of preference; the first one must be used.
        threads: intra-op threads; None uses the cores available to this process, 0 lets ONNX Runtime decide.
        settings: session configuration entries.
        label: name of the model in messages; default: the file.
        refused: raised if ONNX Runtime cannot load the graph.

    Raises:
        DependencyMissing: ONNX Runtime or the provider is not installed, or did not start. Falls back.
        OutOfMemory: it needs more memory than there is. Falls back. OpenVINO does not always say so.
        WrongUse: no such runtime.
    """
    with importing("running an ONNX file"):
        import onnxruntime
    threads = available_cores() if threads is None else threads
    providers = _providers_of(runtime, threads) if isinstance(runtime, str) else runtime
    expected = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if expected not in (available := onnxruntime.get_available_providers()):
        raise DependencyMissing(
            f"this ONNX Runtime has no {expected} (it has {', '.join(available)}). "
            f"Only one of its wheels can be installed; that provider is in: {wheels_with(expected)}"
        )
    said = _load_cuda_libraries(onnxruntime) if expected in (CUDA, TENSORRT) else ""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # everything it would log is raised as well
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    if isinstance(model, Path):
        source: str | bytes = str(model)
    else:
        source = model if isinstance(model, bytes) else model.SerializeToString()
    try:
        session: OnnxSession = onnxruntime.InferenceSession(source, options, providers=list(providers))
    except Exception as exc:  # pybind raises one class per error code, without a common base
        label = label or (str(model) if isinstance(model, Path) else "the model")
        if isinstance(exc, MemoryError) or "std::bad_alloc" in str(exc):
            raise OutOfMemory(f"{label}: this process may not take the memory that it needs in {expected}") from exc
        if expected != CPU and type(exc).__name__ not in _GRAPH_FAULTS:
            raise DependencyMissing(f"{expected} was requested and did not start: {first_line(exc)}{said}") from exc
        raise refused(f"{label}: ONNX Runtime cannot load the graph: {first_line(exc)}. Export it again.") from exc
    taken = session.get_providers()[0]
    if taken != expected:  # ONNX Runtime replaces a provider that cannot start with the CPU, without an exception
        raise DependencyMissing(
            f"ONNX Runtime {onnxruntime.__version__} was asked for {expected} and silently used {taken}: libraries "
            f"or a driver are missing{said}. Check this host: arcface doctor"
        )
    return session


def _providers_of(runtime: str, threads: int) -> list[Provider]:
    if runtime not in RUNTIMES:
        raise WrongUse(f"no runtime {runtime!r}: expected one of {', '.join(RUNTIMES)}.")
    if runtime == "onnxruntime":
        return [CPU]
    # By default OpenVINO infers in bf16 wherever the CPU supports it; load_config takes the JSON text itself.
    hints = {"INFERENCE_PRECISION_HINT": _HINTS[runtime], "NUM_STREAMS": "1"}
    if threads:
        hints["INFERENCE_NUM_THREADS"] = str(threads)
    return [(OPENVINO, {"device_type": "CPU", "load_config": json.dumps({"CPU": hints})}), CPU]


def _load_cuda_libraries(onnxruntime: Any) -> str:
    """Load CUDA and cuDNN from their wheels, where onnxruntime-gpu does not search; returns its error messages.

    They are captured because it prints them, and our standard output may be JSON.
    """
    preload = getattr(onnxruntime, "preload_dlls", None)  # since 1.21
    if preload is None:
        return ""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        preload()
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("Failed to load")]
    return f" ({lines[0]})" if lines else ""


def available_cores() -> int:
    """Cores that this process may use; 0 (ONNX Runtime decides) if the system cannot say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, without its full stop; its class if the message is empty."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


@cache
def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as reported by the kernel."""
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
    return next(lines, f":{platform.machine()}").partition(":")[2].strip()


def cpu_runtimes(flags: frozenset[str], openvino: bool) -> tuple[str, ...]:
    """Runtimes of a CPU with these instruction sets, fastest first."""
    bf16 = ("openvino-bf16",) if has_bf16(flags) else ()
    return (*bf16, "openvino-fp32", "onnxruntime") if openvino else ("onnxruntime",)


def runtime_for(
    precision: str, gated: Collection[str] | None, here: Sequence[str], told_precision: bool = True
) -> tuple[str | None, str]:
    """The first of `able_runtimes`: (runtime, "") or (None, why not)."""
    able, why_not = able_runtimes(precision, gated, here, told_precision)
    return (able[0] if able else None), why_not


def able_runtimes(
    precision: str, gated: Collection[str] | None, here: Sequence[str], told_precision: bool = True
) -> tuple[list[str], str]:
    """The rule for which runtimes may run a variant: (runtimes in the order of `here`, ""), or ([], why none may).

    fp32 and fp16 files compute in fp32 on every CPU and need no gate here. bf16 runs in bf16 or not at all. An int8
    file leaves some layers in float; it was gated with those in bf16, in fp32, or both, and runs only as it was gated.

    Args:
        precision: fp32, fp16, bf16 or int8.
        gated: runtimes in which the variant passed its gate (`gated_runtimes`); None for an ungated file that the user
            named: its float layers stay fp32.
        here: runtimes to choose from, preferred one first.
        told_precision: False where OpenVINO is not told in which precision to compute, as by Triton's own backend: it
            takes bf16 where the CPU has it. Then no bf16 can be promised, no fp32 on such a CPU, and int8 has to have
            passed its gate in each precision that it may take.
    """
    openvino = [runtime for runtime in here if runtime in _HINTS]
    if not told_precision and openvino:
        if precision == "bf16":
            return [], "this server does not tell OpenVINO in which precision to compute, so none can be promised"
        unsure = not set(openvino) <= set(gated or ()) if precision == "int8" else "openvino-bf16" in openvino
        if unsure:
            here = [runtime for runtime in here if runtime not in openvino]
    exact = [runtime for runtime in here if runtime != "openvino-bf16"]
    if precision == "bf16":
        able = [runtime for runtime in here if runtime == "openvino-bf16"]
        if not able:
            return [], "bf16 needs OpenVINO and a CPU with avx512_bf16 or amx_bf16"
    elif precision == "int8" and gated is not None:
        able = list(here)
    else:
        return exact, "" if exact else f"no runtime here computes {precision} in fp32"
    passed_here = [runtime for runtime in able if gated is None or runtime in gated]
    if not passed_here:
        passed = ", ".join(gated or ()) or "no runtime"
        return [], f"{precision} passed its gate in {passed}, but this host has {' and '.join(able)}"
    return passed_here, ""


def gated_runtimes(sidecar: Mapping[str, Any] | None, limits: Mapping[str, float] | None = None) -> list[str] | None:
    """Runtimes in which a variant passes its gate; None if there is no sidecar. `limits`: see `judge_sidecar`."""
    if sidecar is None:
        return None
    return [runtime for runtime, verdict in judge_sidecar(sidecar, limits).items() if verdict.passed]
