"""Exports an ONNX graph as plain arrays and JSON, for a Python without onnx (`torch_baseline`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.graph.embedding_only import embedding_only
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT


def export_graph(onnx_path: Path, folder: Path) -> None:
    """Write an ONNX as graph.json (nodes in order) and weights.npz."""
    import onnx
    from onnx import numpy_helper

    graph = embedding_only(onnx.load(str(onnx_path))).graph
    weights = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    nodes = []
    for node in graph.node:
        attributes = {a.name: _plain(onnx.helper.get_attribute_value(a)) for a in node.attribute}
        if node.op_type == "Constant":
            weights[node.output[0]] = numpy_helper.to_array(attributes["value"])
            continue
        nodes.append(
            {"op": node.op_type, "inputs": list(node.input), "output": node.output[0], "attributes": attributes}
        )
    facts = {"input": FACE_INPUT, "output": EMBEDDING_OUTPUT, "nodes": nodes}
    (folder / "graph.json").write_text(json.dumps(facts))
    np.savez(folder / "weights.npz", **{name: np.array(value) for name, value in weights.items()})


def _plain(value: Any) -> Any:
    """Decode strings, which ONNX stores as bytes, for JSON."""
    if isinstance(value, bytes):
        return value.decode()
    return [_plain(item) for item in value] if isinstance(value, list) else value
