"""ONNX Runtime on this host: what its CPU and its providers can do, the one session opener, and who may run what.

Runtimes are written as `onnxruntime` (ONNX Runtime's own kernels), `openvino-fp32` and `openvino-bf16` (the same file
through ONNX Runtime's OpenVINO provider, with that inference precision for whatever the file leaves as float).
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_clients.errors import Missing, ModelMissing, WrongUse
from arcface_clients.evidence.gate import judge_sidecar

if TYPE_CHECKING:
    import onnx
    import onnxruntime

RUNTIMES = ("onnxruntime", "openvino-fp32", "openvino-bf16")
_HINTS = {"openvino-fp32": "f32", "openvino-bf16": "bf16"}
_PROVIDER = "OpenVINOExecutionProvider"


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


@cache
def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor as the kernel names it."""
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
    return next(lines, f":{platform.machine()}").partition(":")[2].strip()


def cpu_runtime(
    precision: str, openvino: bool, bf16: bool, gated: Collection[str] | None, file: Path
) -> tuple[str, str]:
    """The runtime to compute in on a CPU, and the reason.

    A quantised variant leaves some layers in float; it was gated with those in bf16, in fp32, or both, and may only be
    run as it was gated. Without a sidecar (a file that the user named) floats stay fp32.

    Args:
        precision: fp32, bf16, fp16 or int8.
        openvino: whether OpenVINO is the provider; else ONNX Runtime's own kernels.
        bf16: whether this CPU multiplies in bf16.
        gated: runtimes in which the variant passed its gate; None where no sidecar says.
        file: for the message.

    Raises:
        ModelMissing: it passed its gate in no runtime of this host; falls back.
    """
    if not openvino:
        possible = ["onnxruntime"]
    elif bf16 and precision in ("bf16", "int8"):
        possible = ["openvino-bf16", "openvino-fp32"]
    else:
        possible = ["openvino-fp32"]
    if precision == "bf16":
        why = "" if bf16 else "this CPU has no bf16 (avx512_bf16 or amx_bf16), so it runs in fp32"
        return possible[0], why
    if precision != "int8" or gated is None:
        return possible[-1], ""
    for runtime in possible:
        if runtime in gated:
            return runtime, f"int8 passed its gate in {runtime}"
    raise ModelMissing(
        f"{file} passed its gate in {', '.join(gated) or 'no runtime'}, this host has {' and '.join(possible)}. "
        "Gate it here: arcface quantize NAME --precision int8, or set another device"
    )


def gated_runtimes(sidecar: Mapping[str, Any] | None) -> list[str] | None:
    """Runtimes whose gate a variant passed; None where there is no sidecar."""
    if sidecar is None:
        return None
    return [runtime for runtime, verdict in judge_sidecar(sidecar).items() if verdict.passed]
