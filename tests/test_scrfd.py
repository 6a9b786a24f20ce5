"""SCRFD as a step of `photo_faces`: the boxes, landmarks and scores of InsightFace's own wrapper, and served."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from arcface_build.errors import LicenceNotAccepted
from arcface_build.repository.detector import install_detector, installed_detector
from arcface_clients.faces.steps.scrfd import Scrfd
from conftest import copy_repository


def write_scrfd(path: Path, strides: tuple[int, ...] = (8, 16, 32), anchors: int = 2) -> Path:
    """Random weights in SCRFD's form: scores, boxes and landmarks for each stride."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for kind, (width, size) in enumerate(((1, 3.0), (4, 0.3), (10, 0.3))):
        for stride in strides:
            name = f"o{kind}_{stride}"
            shape = (anchors * width, 3, stride, stride)
            weights.append(
                numpy_helper.from_array((rng.normal(0, size / stride, shape)).astype(np.float32), f"w{name}")
            )
            nodes.append(helper.make_node("Conv", ["image", f"w{name}"], [f"c{name}"], strides=[stride, stride]))
            nodes.append(helper.make_node("Transpose", [f"c{name}"], [f"t{name}"], perm=[2, 3, 0, 1]))
            weights.append(numpy_helper.from_array(np.array([-1, width]), f"s{name}"))
            nodes.append(helper.make_node("Reshape", [f"t{name}", f"s{name}"], [f"r{name}"]))
            nodes.append(
                helper.make_node("Abs" if kind == 1 else "Sigmoid" if kind == 0 else "Identity", [f"r{name}"], [name])
            )
    outputs = [
        helper.make_tensor_value_info(f"o{kind}_{stride}", TensorProto.FLOAT, ["n", width])
        for kind, width in enumerate((1, 4, 10))
        for stride in strides
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, "h", "w"])
    graph = helper.make_graph(nodes, "scrfd", [image], outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("strides", "anchors"), [((8, 16, 32), 2), ((8, 16, 32, 64, 128), 1)])
@pytest.mark.parametrize("size", [(250, 250), (480, 640), (900, 300)])
def test_rows_are_insightfaces(tmp_path: Path, strides: tuple[int, ...], anchors: int, size: tuple[int, int]) -> None:
    scrfd = pytest.importorskip("insightface.model_zoo.scrfd")
    path = write_scrfd(tmp_path / "scrfd.onnx", strides, anchors)
    image = cv2.resize(np.random.default_rng(1).integers(0, 256, (30, 30, 3), np.uint8), size[::-1])
    theirs = scrfd.SCRFD(model_file=str(path), session=session(path))
    theirs.det_thresh = 0.9
    boxes, landmarks = theirs.detect(image, input_size=(640, 640))
    rows = Scrfd(session(path))(image, 0.9)
    assert len(rows) == len(boxes) > 3
    assert np.allclose(rows[:, :2], boxes[:, :2], atol=1e-2)
    assert np.allclose(rows[:, :2] + rows[:, 2:4], boxes[:, 2:4], atol=1e-2)
    assert np.allclose(rows[:, 4:14].reshape(-1, 5, 2), landmarks, atol=1e-2)
    assert np.allclose(rows[:, 14], boxes[:, 4], atol=1e-5)


def test_scrfd_is_installed_only_with_its_licence(tmp_path: Path) -> None:
    repository, path = copy_repository(tmp_path), write_scrfd(tmp_path / "det_10g.onnx")
    with pytest.raises(LicenceNotAccepted, match="non-commercial research only: expected --licence"):
        install_detector(path, repository)
    assert install_detector(path, repository, licence="non-commercial research") == 1
    manifest = installed_detector(repository)
    assert manifest is not None
    assert (manifest["detector"], manifest["source"]["licence"]) == ("scrfd", "non-commercial research")
