"""Stage 4: the same network in PyTorch and in ONNX Runtime on CUDA, each way stated in full."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np

from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT, FACE_SHAPE
from arcface_clients.engines.devices import CPU, CUDA
from arcface_clients.engines.runtimes import open_session
from arcface_tools.gpu_check import artefacts, served
from arcface_tools.gpu_check.check import GpuCheck, Result
from arcface_tools.gpu_check.other_python import torch_baseline
from arcface_tools.gpu_check.stages.peaks import torch_python

TITLE = "Baselines"
FEWEST_RUNS = 20


def measure(check: GpuCheck) -> None:
    """Run the steps."""
    network = check.settings.networks[0][0]
    check.step(f"PyTorch on {network}", 45, partial(_torch, check, network))
    for precision, tf32 in (("fp32", False), ("fp32", True), ("fp16", True)):
        name = f"ONNX Runtime CUDA on {network}, {precision}{' with TF32' * (tf32 and precision == 'fp32')}"
        check.step(name, 15, partial(_onnxruntime, check, network, precision, tf32))


def _torch(check: GpuCheck, network: str, result: Result) -> None:
    source = artefacts.typed_source(check, network, "fp32")
    found = torch_baseline(
        torch_python(check), source.onnx, check.faces, artefacts.reference(check, source), check.settings.batches,
        check.settings.sample_s, check.state / "torch", timeout_s=max(check.left_s, 1),
        warm_up_s=check.settings.warm_up_s,
    )  # fmt: skip
    for way in found["ways"]:
        for row in way.get("batches", []):
            row["gpu"] = check.log.between(*row.pop("between"))
    result |= found


def _onnxruntime(check: GpuCheck, network: str, precision: str, tf32: bool, result: Result) -> None:
    """From host to host; an ONNX Runtime without its CUDA provider is an error, never the CPU."""
    source = artefacts.typed_source(check, network, precision)
    session: Any = open_session(source.onnx, [(CUDA, {"use_tf32": "1" if tf32 else "0"}), CPU])
    result["rows"] = []
    for batch in check.settings.batches:
        row = served.measure(check, lambda part: session.run([EMBEDDING_OUTPUT], {FACE_INPUT: part})[0], batch)
        row["device_ms"] = device_ms(session, check.faces, batch, check.settings.sample_s)
        result["rows"].append(row)


def device_ms(session: Any, faces: np.ndarray, batch: int, seconds: float, device: str = "cuda") -> float:
    """Milliseconds of a run with faces and embeddings on the device: the mean of runs that queue behind each other."""
    import onnxruntime

    part = np.resize(faces, (batch, *FACE_SHAPE))
    binding = session.io_binding()
    binding.bind_ortvalue_input(FACE_INPUT, onnxruntime.OrtValue.ortvalue_from_numpy(part, device, 0))
    binding.bind_output(EMBEDDING_OUTPUT, device)
    runs, started = 0, time.perf_counter()
    while runs < FEWEST_RUNS or time.perf_counter() - started < seconds:
        session.run_with_iobinding(binding)
        runs += 1
    binding.synchronize_outputs()
    return (time.perf_counter() - started) / runs * 1e3
