"""A tiny ArcFace-shaped network as a model folder: source.onnx, serving.onnx, manifest.json."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from arcface_build.graph.serving import serving_form
from arcface_clients.contract import Preprocessing, contract_id
from arcface_clients.engines.import_manifest import ImportManifest


def write_model(
    folder: Path,
    preprocessing: Preprocessing | None = None,
    dim: int = 64,
    fixed_batch: bool = False,
    seed: int = 0,
    error: float = 0.0,
) -> Path:
    """Write a model folder; `error` is the size of noise put on the serving ONNX's weights, so that it drifts."""
    folder.mkdir(parents=True)
    preprocessing = preprocessing or Preprocessing()
    rng = np.random.default_rng(seed)
    weights = {
        "conv": rng.normal(0, 0.1, (8, 3, 8, 8)).astype(np.float32),
        "fc": rng.normal(0, 0.1, (8 * 14 * 14, dim)).astype(np.float32),
    }
    source = _model(_network("input.1", "output"), weights, _source_io(dim, fixed_batch))
    onnx.save(source, folder / "source.onnx")
    noisy = {
        name: value + error * rng.normal(0, 0.1, value.shape).astype(np.float32) for name, value in weights.items()
    }
    digest = hashlib.sha256((folder / "source.onnx").read_bytes()).hexdigest()
    contract = contract_id(digest, preprocessing, dim)
    drifting = _model(_network("input.1", "output"), noisy, _source_io(dim, fixed_batch=False))
    onnx.save(serving_form(drifting, preprocessing, dim, contract).model, folder / "serving.onnx")
    write_manifest(folder, digest, preprocessing, dim)
    return folder


def write_manifest(folder: Path, digest: str, preprocessing: Preprocessing, dim: int, /, **changed: object) -> None:
    """models/NAME/manifest.json as `arcface import` writes it, with what nobody reads left empty."""
    manifest = ImportManifest(
        name=folder.name,
        created="2025-01-01T00:00:00+00:00",
        source={"sha256": digest},
        flavour={},
        preprocessing=preprocessing.to_json(),
        dim=dim,
        contract_id=contract_id(digest, preprocessing, dim),
        steps=[],
        serving={"file": "serving.onnx"},
        proof={},
        tools={},
    )
    (folder / "manifest.json").write_text(json.dumps({**manifest.to_json(), **changed}))


def _network(start: str, end: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Conv", [start, "conv"], ["features"], strides=[8, 8]),
        helper.make_node("Relu", ["features"], ["active"]),
        helper.make_node("Flatten", ["active"], ["flat"]),
        helper.make_node("MatMul", ["flat", "fc"], [end]),
    ]


def _source_io(dim: int, fixed_batch: bool) -> tuple:
    batch = 1 if fixed_batch else "N"
    return (
        helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [batch, 3, 112, 112]),
        helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, dim]),
    )


def _model(nodes: list, weights: dict, ends: tuple) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "tiny", [ends[0]], [ends[1]], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
