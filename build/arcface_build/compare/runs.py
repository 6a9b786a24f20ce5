"""Runs an ONNX or a plan with Polygraphy, for its embeddings or the output of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT, FACE_SHAPE
from arcface_clients.engines.runtimes import OnnxSession, open_session
from arcface_clients.errors import Missing, WrongUse

if TYPE_CHECKING:
    import onnx

BATCH = 32


def session_runner(onnx_path: Path, outputs: Sequence[str] | None = None) -> Any:
    """Polygraphy's OnnxrtRunner on the CPU; `outputs` marks these tensors as graph outputs."""
    from polygraphy.backend.onnx import BytesFromOnnx, ModifyOutputs, OnnxFromPath
    from polygraphy.backend.onnxrt import OnnxrtRunner

    def session() -> OnnxSession:
        if outputs is None:
            return open_session(onnx_path)
        watched: bytes = BytesFromOnnx(ModifyOutputs(OnnxFromPath(str(onnx_path)), outputs=list(outputs)))()
        return open_session(watched, label=str(onnx_path))

    return OnnxrtRunner(session, name=f"ONNX Runtime {onnx_path}")


def plan_runner(plan: Path, public_key: Path | None) -> Any:
    """Polygraphy's TrtRunner on a plan that matches its manifest, and is signed if a public key is configured.

    Raises:
        Missing: TensorRT is not installed.
        PlanRefused: see `read_plan`.
    """
    _require_tensorrt(f"running {plan}")
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    from arcface_clients.plans.read import read_plan

    content = read_plan(plan, public_key).content()
    return TrtRunner(EngineFromBytes(content), name=f"TensorRT {plan}")


def tensorrt_runner(onnx_path: Path, outputs: Sequence[str], batch: int) -> Any:
    """Polygraphy's TrtRunner on a plan built now, strongly typed if TensorRT supports it, with layers as outputs."""
    _require_tensorrt(f"building {onnx_path}")
    import tensorrt
    from polygraphy.backend.trt import (
        CreateConfig,
        EngineFromNetwork,
        ModifyNetworkOutputs,
        NetworkFromOnnxPath,
        Profile,
        TrtRunner,
    )

    shape = (batch, *FACE_SHAPE)
    typed = {"strongly_typed": True} if int(tensorrt.__version__.split(".")[0]) >= 10 else {}
    network = ModifyNetworkOutputs(NetworkFromOnnxPath(str(onnx_path), **typed), outputs=list(outputs))
    config = CreateConfig(profiles=[Profile().add(FACE_INPUT, min=shape, opt=shape, max=shape)])
    return TrtRunner(EngineFromNetwork(network, config=config), name=f"TensorRT {onnx_path}")


def embed_with(runner: Any, faces_bgr_u8: np.ndarray) -> np.ndarray:
    """Embeddings float32 (N,D) of faces uint8 (N,112,112,3), from an active runner."""
    rows = []
    for start in range(0, len(faces_bgr_u8), BATCH):
        outputs = runner.infer({FACE_INPUT: faces_bgr_u8[start : start + BATCH]})
        if EMBEDDING_OUTPUT not in outputs:
            raise WrongUse(f"{runner.name} has no output `{EMBEDDING_OUTPUT}`: it gives {', '.join(outputs)}.")
        rows.append(np.array(outputs[EMBEDDING_OUTPUT], np.float32))  # a copy: the runner may reuse its buffer
    return np.concatenate(rows)


@contextmanager
def active(runner: Any) -> Iterator[Any]:
    """Activate a runner, loading its session or engine, without Polygraphy's log on stdout."""
    with _quiet(), runner:
        yield runner


def run_all(runners: Sequence[Any], batches: Sequence[np.ndarray]) -> list[list[dict[str, np.ndarray]]]:
    """For each runner, the outputs by name of each batch; all runners get the same batches."""
    from polygraphy.comparator import Comparator

    with _quiet():
        results = Comparator.run(list(runners), data_loader=[{FACE_INPUT: batch} for batch in batches])
    return [[dict(iteration) for iteration in results[runner.name]] for runner in runners]


def tensors_in_order(model: onnx.ModelProto) -> dict[str, str]:
    """Float tensors computed by nodes, name → operator, in graph order (topological, as ONNX requires)."""
    constants = {"Constant", "Shape", "Cast", "DequantizeLinear", "QuantizeLinear"}
    return {
        name: node.op_type for node in model.graph.node if node.op_type not in constants for name in node.output if name
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Polygraphy's progress log, which goes to stdout like our JSON."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        yield


def _require_tensorrt(purpose: str) -> None:
    from importlib.util import find_spec

    if find_spec("tensorrt") is None:
        raise Missing(
            f"{purpose} needs TensorRT and a GPU, and TensorRT is not installed here. "
            "Next: run it on a GPU host (arcface doctor shows what it has), or compare the plan's ONNX instead"
        )
