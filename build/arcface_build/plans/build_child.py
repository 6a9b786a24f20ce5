"""The child process in which TensorRT builds a plan.

    python -m arcface_build.plans.build_child FOLDER

FOLDER contains request.json and faces.npy; plan, inspector.json, embeddings.npy, timing.cache and result.json are
written there. Standard output has one JSON object per line, {"phase", "step", "steps"} or {"error"}; everything that
TensorRT and Polygraphy print goes to standard error. The parent survives a crash here and has the output so far.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from arcface_build.plans.typed import TypedOnnx

EXIT_FAILED, EXIT_MISSING = 1, 3


def main(folder: Path) -> int:
    """Build; the exit code is 0, EXIT_FAILED or EXIT_MISSING."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # C++ code prints to standard output too

    def say(**fields: Any) -> None:
        print(json.dumps(fields), file=lines, flush=True)

    try:
        import tensorrt as trt

        check_gpu()  # fail before minutes of building, not after
    except Exception as exc:
        say(error=f"{type(exc).__name__}: {exc}")
        return EXIT_MISSING
    try:
        _build(folder, trt, say)
    except Exception as exc:
        say(error=f"{type(exc).__name__}: {exc}")
        return EXIT_FAILED
    return 0


def check_gpu() -> None:
    """Ask the CUDA runtime for a GPU: that its library loads says nothing about the driver.

    Raises:
        RuntimeError: no driver, one that is too old, or no GPU visible to CUDA.
    """
    from polygraphy import cuda

    count = ctypes.c_int()
    status = cuda.wrapper().handle.cudaGetDeviceCount(ctypes.byref(count))
    if status or not count.value:
        raise RuntimeError(f"CUDA finds no GPU (error {status}, {count.value} GPUs)")


def _build(folder: Path, trt: Any, say: Any) -> None:
    from arcface_build.plans.loaders import engine_loader, strongly_typed
    from arcface_build.plans.typed import read_typed_onnx
    from arcface_clients.plans.spec import PlanSpec

    request = json.loads((folder / "request.json").read_text())
    spec, typed = PlanSpec.from_json(request["spec"]), read_typed_onnx(Path(request["onnx"]))
    if typed.layers.get("int8") and not strongly_typed(trt):
        typed = _weakly_typed(typed, folder / "weakly-typed.onnx")
    monitor = _monitor(trt, say) if hasattr(trt, "IProgressMonitor") else None
    say(phase="parsing and building", step=0, steps=0)
    started = time.monotonic()
    plan = engine_loader(trt, typed, spec, str(folder / "timing.cache"), monitor)()
    seconds = time.monotonic() - started
    with (folder / "plan").open("wb") as file:
        file.write(plan)
        file.flush()
        os.fsync(file.fileno())
    say(phase="proving the precision", step=0, steps=0)
    from polygraphy.backend.trt import EngineFromBytes

    before = _free_bytes()
    engine = EngineFromBytes(plan)()
    memory = {"loaded_bytes": max(before - _free_bytes(), 0), "context_bytes": context_bytes(engine)}
    del plan
    (folder / "inspector.json").write_text(inspector_json(trt, engine, spec.opt_batch))
    rows = [_embed(folder, engine, i, largest, say) for i, (_, _, largest) in enumerate(spec.profiles)]
    np.save(folder / "embeddings.npy", np.stack(rows))
    (folder / "result.json").write_text(json.dumps({"seconds": seconds, "tensorrt": trt.__version__, "memory": memory}))


def context_bytes(engine: Any) -> list[int]:
    """Scratch memory of an execution context on each profile, at its largest batch.

    Up to 10.0 TensorRT tells only the largest of them, and later versions deprecate that.
    """
    count = engine.num_optimization_profiles
    by_profile = getattr(engine, "get_device_memory_size_for_profile_v2", None)
    by_profile = by_profile or getattr(engine, "get_device_memory_size_for_profile", None)
    return [int(by_profile(i) if by_profile else engine.device_memory_size) for i in range(count)]


def _free_bytes() -> int:
    """Free memory of the GPU."""
    from polygraphy import cuda

    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    wrapper = cuda.wrapper()
    wrapper.check(wrapper.handle.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)))
    return int(free.value)


def _weakly_typed(typed: TypedOnnx, path: Path) -> TypedOnnx:
    """The file that TensorRT 8.6 gets; precisions and pins stay those of the typed one."""
    import onnx

    from arcface_build.plans.weakly_typed import weakly_typed

    model = onnx.load(str(typed.path))
    weakly_typed(model)
    onnx.save(model, str(path))
    return replace(typed, path=path)


def inspector_json(trt: Any, engine: Any, batch: int) -> str:
    """The inspector's JSON. For a dynamic plan it contains formats only if a context with shapes is set."""
    from arcface_clients.contract import FACE_INPUT, FACE_SHAPE

    context = engine.create_execution_context()
    if context is None or not context.set_input_shape(FACE_INPUT, (batch, *FACE_SHAPE)):
        raise RuntimeError(f"the plan does not accept a batch of {batch} faces")
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return inspector.get_engine_information(trt.LayerInformationFormat.JSON)


def _embed(folder: Path, engine: Any, profile: int, max_batch: int, say: Any) -> np.ndarray:
    """Embeddings of faces.npy in batches of 1, 2, 3 … up to the largest, to test the whole profile: float32 (N,D)."""
    from polygraphy.backend.trt import TrtRunner

    from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT

    faces, parts, start, batch = np.load(folder / "faces.npy"), [], 0, 1
    with TrtRunner(engine, optimization_profile=profile) as runner:
        while start < len(faces):
            say(phase="measuring drift", step=start, steps=len(faces))
            feed = {FACE_INPUT: np.ascontiguousarray(faces[start : start + batch])}
            parts.append(np.array(runner.infer(feed)[EMBEDDING_OUTPUT], np.float32))  # infer reuses its buffer
            start, batch = start + batch, min(batch + 1, max_batch)
    return np.concatenate(parts)


def _monitor(trt: Any, say: Any) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:  # there are thousands of inner phases
                self.steps[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                say(phase=phase_name, step=step + 1, steps=self.steps[phase_name])
            return True  # False would cancel the build

    return Monitor()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
