"""Stage 0, one minute: the driver, TensorRT, a three-layer plan in each precision, and tensors on the GPU in Triton.

Everything later needs the first ones, so that the stage ends the run with one sentence if they fail.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from arcface_build.errors import ProofFailed
from arcface_build.plans.build import PlanProof, tensorrt_version
from arcface_build.plans.build_child import check_gpu
from arcface_build.plans.source import PlanSource
from arcface_clients import TritonEmbedder
from arcface_clients.errors import Missing, PlanRefused
from arcface_clients.evidence.drift import DRIFT_LIMITS, compare_embeddings
from arcface_clients.gpu.driver import driver
from arcface_tools.gpu_check import artefacts
from arcface_tools.gpu_check.artefacts import BuiltPlan, Shape
from arcface_tools.gpu_check.check import GpuCheck, Result, StopHere
from arcface_tools.gpu_check.checkout import load_from_tests
from arcface_tools.gpu_check.plan_timer import PlanTimer
from arcface_tools.gpu_check.served import repository_of, served

TITLE = "The first minute: whether anything can be measured here"
SHAPE = Shape("three-layers", 1, 8, 16)
WHERE_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    '''Says in the first column where the faces lay: 0 on the host, 1 on the GPU.'''

    def execute(self, requests):
        answers = []
        for request in requests:
            faces = pb_utils.get_input_tensor_by_name(request, "face")
            rows = np.zeros((faces.shape()[0], 2), np.float32)
            rows[:, 0 if faces.is_cpu() else 1] = 1
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("embedding", rows)]))
        return answers
"""
WHERE_CONFIG = """
backend: "python"
max_batch_size: 8
input [ { name: "face" data_type: TYPE_UINT8 dims: [ 112, 112, 3 ] } ]
output [ { name: "embedding" data_type: TYPE_FP32 dims: [ 2 ] } ]
instance_group [ { count: 1 kind: KIND_AUTO } ]
parameters { key: "FORCE_CPU_ONLY_INPUT_TENSORS" value { string_value: "no" } }
"""


def measure(check: GpuCheck) -> None:
    """Run the steps.

    Raises:
        StopHere: CUDA, TensorRT or the fp16 plan failed.
    """
    needed = [check.step("TensorRT", 2, _tensorrt), check.step("driver", 2, _driver)]
    if all(needed):
        needed += [check.step("fp16 plan of three layers", 5, partial(_three_layers, check, "fp16"))]
    if not all(needed):
        failed = next((name, step) for name, step in check.stage["steps"].items() if "why" in step)
        raise StopHere(f"nothing can be measured here: {failed[0]}: {failed[1]['why']}")
    for precision in ("fp32", "int8"):
        check.step(f"{precision} plan of three layers", 5, partial(_three_layers, check, precision))
    check.step("three layers through tritonserver", 10, partial(_through_triton, check))
    check.step("tensors on the GPU in Triton's python backend", 10, partial(_where, check))


def _driver(result: Result) -> None:
    """The driver's library through ctypes, and the CUDA runtime that Polygraphy finds; either may be missing alone."""
    driver()
    result["driver"] = "cuInit succeeded"
    check_gpu()
    result["runtime"] = "the CUDA runtime finds a GPU"


def _tensorrt(result: Result) -> None:
    import polygraphy
    import tensorrt as trt

    result |= {"tensorrt": tensorrt_version(), "polygraphy": polygraphy.__version__}
    result["strong_typing"] = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    result["levels"] = sorted(trt.HardwareCompatibilityLevel.__members__)


def _three_layers(check: GpuCheck, precision: str, result: Result) -> None:
    built, faces, expected = _plan(check, precision)
    result |= {"build_seconds": built.manifest.build["seconds"], "layers": built.manifest.precision_proof["compute"]}
    with PlanTimer(built.path.read_bytes(), check.settings.replays, 0.1) as timer:
        row, embeddings = timer.time(faces, len(faces), 0.1)
        result["layer_times"] = len(timer.layers(faces, 1))
    result["row"] = row
    _judge(result, precision, expected, embeddings)
    if built.refused:
        raise PlanRefused(built.refused)


def _through_triton(check: GpuCheck, result: Result) -> None:
    built, faces, expected = _plan(check, "fp16")
    with (
        served(check, repository_of(check, built), ["arcface_trt"], "tritonserver-first-minute.log") as server,
        TritonEmbedder(server.grpc_url, model="arcface_trt") as client,
    ):
        _judge(result, "fp16", expected, client.encode(faces))
    said = server.log_path.read_text(errors="replace").splitlines()
    result["said"] = [line.partition("] ")[2] for line in said if "arcface_trt" in line and "GPU" in line][:10]


def _where(check: GpuCheck, result: Result) -> None:
    """Whether a model in Python gets its input where it lies; the answer names the place itself."""
    model = check.state / "served" / "where" / "where"
    (model / "1").mkdir(parents=True, exist_ok=True)
    (model / "1" / "model.py").write_text(WHERE_MODEL)
    (model / "config.pbtxt").write_text(WHERE_CONFIG)
    with served(check, model.parent, ["where"], "tritonserver-where.log") as server:
        for way in (False, "cuda"):
            with TritonEmbedder(server.grpc_url, model="where", shared_memory=way) as client:
                client.ensure_ready()
                on_gpu = bool(client.encode(check.faces[:2])[0, 1])
                result[f"shared_memory {way}"] = {"way": str(client.shared_memory), "tensor_on_gpu": on_gpu}
    if not result["shared_memory cuda"]["tensor_on_gpu"]:
        raise Missing(
            f"faces in CUDA shared memory reach a model in Python on the host ({result['shared_memory cuda']['way']})."
        )


def _plan(check: GpuCheck, precision: str) -> tuple[BuiltPlan, np.ndarray, np.ndarray]:
    """A plan of the tests' own three-layer network, faces, and what ONNX Runtime makes of them in fp32."""
    tiny_onnx: Any = load_from_tests("tiny_onnx")
    folder = check.state / "models" / "three-layers"
    typed = tiny_onnx.write_tiny(folder / f"{precision}.onnx", precision)
    serving = tiny_onnx.write_tiny(folder / "serving.onnx")
    source = PlanSource("three-layers", typed, serving, None)
    faces = check.faces[: SHAPE.opt_batch]
    expected = source.embed(faces)
    proof = PlanProof(faces, expected, artefacts.LOOSE)
    return artefacts.plan_of(check, source, precision, SHAPE, proof), faces, expected


def _judge(result: Result, precision: str, expected: np.ndarray, embeddings: np.ndarray) -> None:
    # Three layers of random weights amplify rounding, so that the gate of a real network would be too tight.
    drift, limit = compare_embeddings(expected, embeddings).max_drift, 10 * DRIFT_LIMITS[precision]
    result |= {"max_drift": drift, "limit": limit}
    if drift > limit:
        raise ProofFailed(f"the embeddings are wrong: drift {drift:.1e}, expected at most {limit:g}.")
