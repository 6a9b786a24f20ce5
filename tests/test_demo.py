"""The demo networks tell faces apart, are the same each time, and say that they are not for recognition."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from arcface_build.imports.demo import build_demo
from arcface_clients.contract import Preprocessing
from arcface_clients.errors import WrongUse
from arcface_clients.faces.synthetic import synthetic_faces


def cosines_between_faces(model: onnx.ModelProto) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    faces = synthetic_faces(24, seed=5)  # not those that set the statistics
    out = session.run(None, {"input.1": Preprocessing().apply(faces)})[0]
    assert out.shape == (24, 512)
    unit = out / np.linalg.norm(out, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(24, 1)]


@pytest.fixture(scope="module")
def mobile() -> onnx.ModelProto:
    return build_demo("mobile")


def test_mobile_gives_different_faces_different_embeddings(mobile):
    cosine = cosines_between_faces(mobile)
    assert abs(cosine.mean()) < 0.1
    assert 0.03 < cosine.std() < 0.2


def test_r18_gives_different_faces_different_embeddings():
    steps = []
    cosine = cosines_between_faces(build_demo("r18", progress=lambda done, all_: steps.append((done, all_))))
    assert abs(cosine.mean()) < 0.1
    assert 0.03 < cosine.std() < 0.2
    assert steps == [(i + 1, 21) for i in range(21)]


def test_same_seed_gives_the_same_file_and_another_seed_another(mobile):
    assert build_demo("mobile").SerializeToString() == mobile.SerializeToString()
    assert build_demo("mobile", seed=1).SerializeToString() != mobile.SerializeToString()


def test_mobile_is_small_dynamic_and_says_it_is_not_for_recognition(mobile):
    assert mobile.ByteSize() < 10_000_000
    (batch, *rest) = mobile.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == "N"
    assert [d.dim_value for d in rest] == [3, 112, 112]
    assert mobile.opset_import[0].version == 17
    assert {p.key: p.value for p in mobile.metadata_props}["warning"].startswith("DEMO, NOT FOR RECOGNITION")
    assert mobile.doc_string == mobile.graph.doc_string


def test_unknown_architecture_lists_those_that_exist():
    with pytest.raises(WrongUse, match=r"no demo architecture 'r51': expected one of mobile, r18, r34, r50, r100"):
        build_demo("r51")
