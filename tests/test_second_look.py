"""The second look: a wrong feeding is found without the graph, a right one is left in peace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from arcface_build.imports.demo import build_demo
from arcface_build.imports.proof_faces import ProofFaces, read_faces, synthetic_proof_faces
from arcface_build.imports.second_look import second_look
from arcface_clients.contract import Preprocessing

UNIT = Preprocessing("rgb", (0,) * 3, (255,) * 3)
RAW = Preprocessing("rgb", (0,) * 3, (1,) * 3)
IMAGENET = Preprocessing("rgb", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
IMAGENET_BGR = Preprocessing("bgr", IMAGENET.mean[::-1], IMAGENET.std[::-1])


@pytest.fixture(scope="module")
def demo() -> onnx.ModelProto:
    return build_demo("mobile")


@pytest.mark.parametrize("fed", [Preprocessing(), Preprocessing("rgb", (127.5,) * 3, (128.0,) * 3)])
def test_a_rightly_fed_demo_raises_no_alarm(demo: onnx.ModelProto, fed: Preprocessing) -> None:
    look = second_look(demo, fed, synthetic_proof_faces())
    assert look.warning == "" and look.departure[look.chosen] < 0.05


@pytest.mark.parametrize("fed", [Preprocessing("bgr"), UNIT, RAW, IMAGENET], ids=["bgr", "0..1", "0..255", "ImageNet"])
def test_a_demo_fed_otherwise_than_its_statistics_were_made_is_warned_of(
    demo: onnx.ModelProto, fed: Preprocessing
) -> None:
    assert (
        "but rgb (x − 127.5) / 127.5 fits better: its BatchNorm"
        in second_look(demo, fed, synthetic_proof_faces()).warning
    )


def test_random_weights_on_real_people_raise_no_alarm(assets: Path, demo: onnx.ModelProto) -> None:
    look = second_look(demo, Preprocessing(), read_faces(assets / "faces" / "aligned112"))
    assert look.warning == "" and max(look.separation.values()) < 2


@pytest.mark.parametrize(
    ("fed", "warned"),
    [
        (IMAGENET, False),  # what it was trained on
        (Preprocessing(), False),  # so near that sixteen people cannot tell
        (IMAGENET_BGR, True),
        (UNIT, True),
        (RAW, True),
    ],
    ids=["right", "127.5", "bgr", "0..1", "0..255"],
)
def test_the_real_network_separates_people_best_when_fed_rightly(
    assets: Path, fed: Preprocessing, warned: bool
) -> None:
    """It has no BatchNormalization left: the people are the only witness."""
    model = onnx.load(str(assets / "models" / "MobileFaceNet.onnx"))
    look = second_look(model, fed, read_faces(assets / "faces" / "aligned112"))
    assert look.departure == {}
    assert max(look.separation, key=look.separation.__getitem__) == "rgb ImageNet's"
    assert ("rgb ImageNet's fits better: it separates people" in look.warning) is warned


def test_without_a_witness_nothing_is_said(demo: onnx.ModelProto) -> None:
    bare = onnx.ModelProto()
    bare.CopyFrom(demo)
    for node in bare.graph.node:
        if node.op_type == "BatchNormalization":
            node.op_type, node.input[1:] = "Identity", []
            del node.attribute[:]
    faces = ProofFaces(np.zeros((2, 112, 112, 3), np.uint8), "none")
    look = second_look(bare, RAW, faces)
    assert (look.departure, look.separation, look.warning) == ({}, {}, "")
