"""The PyTorch contestant: runs a source ONNX in eager fp32 PyTorch, verified against ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from arcface_build.bench.contestants import in_process
from arcface_build.bench.interleaved import Variant
from arcface_build.errors import ProofFailed
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT
from arcface_clients.errors import Missing
from arcface_clients.evidence.drift import DRIFT_LIMITS
from arcface_clients.evidence.gate import judge_embeddings
from arcface_clients.extras import importing

PROOF_FACES = 8


def pytorch_sessions(source: Path, faces_bgr_u8: np.ndarray, batches: Sequence[int]) -> list[Variant]:
    """Eager PyTorch on the CPU in this process, with all its threads, one variant per batch size.

    Args:
        source: the source ONNX of a served reference; the manifest.json beside it states its preprocessing.
        faces_bgr_u8: faces to embed, uint8 (N,112,112,3).
        batches: faces per call.

    Raises:
        Missing: no source, no PyTorch, or an operator that the baseline does not support.
        ProofFailed: its embeddings differ from those of ONNX Runtime on the same graph.
    """
    if not source.is_file():
        raise Missing(f"no source ONNX at {source}. Next: arcface import demo, or arcface import YOUR.onnx")
    with importing("the PyTorch baseline"):
        import torch
    embed = proved_network(source, faces_bgr_u8[:PROOF_FACES])
    variants = [in_process(f"pytorch b{batch}", embed, faces_bgr_u8, batch) for batch in batches]
    for variant in variants:
        variant.about |= {"runtime": f"torch {torch.__version__}, eager, fp32", "threads": torch.get_num_threads()}
    return variants


def proved_network(source: Path, faces_bgr_u8: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The serving model of a source as a PyTorch callable: uint8 (N,112,112,3) BGR → float32 (N,D), unit rows.

    It is made from the source by the transformations of an import, whichever variant is served: PRelu stays PRelu, and
    each BatchNormalization that ONNX Runtime would fold is folded for PyTorch too, which can only make it faster.
    """
    import torch

    from arcface_build.bench.torch_baseline import eager_network
    from arcface_build.bench.torch_export import export_graph
    from arcface_build.imports.forms import to_serving
    from arcface_build.imports.onnx_file import read_source
    from arcface_clients.engines.import_manifest import read_import_manifest
    from arcface_clients.engines.runtimes import open_session

    manifest = read_import_manifest(source.parent)
    with tempfile.TemporaryDirectory(prefix="arcface-pytorch-") as name:
        folder = Path(name)
        onnx = folder / "serving.onnx"
        serving, _ = to_serving(read_source(source), manifest.wants(), manifest.dim, manifest.contract_id)
        onnx.write_bytes(serving.SerializeToString())
        expected = open_session(onnx, label=source.name).run([EMBEDDING_OUTPUT], {FACE_INPUT: faces_bgr_u8})[0]
        export_graph(onnx, folder)
        try:
            embed = eager_network(folder, torch.float32, "cpu")
        except NotImplementedError as exc:
            raise Missing(f"{source.name} cannot run in PyTorch: {exc}. Next: arcface bench without --pytorch") from exc
    verdict = judge_embeddings(expected, embed(faces_bgr_u8), "fp32", DRIFT_LIMITS)
    if not verdict.passed:
        raise ProofFailed(
            f"{source.name} in PyTorch differs from ONNX Runtime: {verdict.why}. "
            "It is not timed: arcface bench without --pytorch"
        )
    return embed
