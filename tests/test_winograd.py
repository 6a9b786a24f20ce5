"""Convolutions by Winograd's method: the same embeddings, with a file that is no larger."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from arcface_build.graph.winograd import POINTS, tile_of, transforms, winograd
from arcface_build.imports import forms, importing
from arcface_build.imports.proof_faces import ProofFaces
from arcface_build.imports.source import known_models, resolve
from arcface_build.repository.assemble import assemble
from arcface_build.variants.candidates import WINOGRAD, Candidate, candidates
from arcface_build.variants.choose import VariantChoice, Wanted, choose
from arcface_build.variants.fastest import fastest
from arcface_build.variants.speeds import Speed, SpeedTable, keep_speeds, kept_speeds
from arcface_clients.engines.import_manifest import read_import_manifest
from arcface_clients.engines.runtimes import has_openvino, open_session
from arcface_clients.errors import GateFailed
from arcface_clients.faces.synthetic import synthetic_faces
from conftest import copy_repository

RNG = np.random.default_rng(3)
RUNTIMES = [
    "onnxruntime",
    pytest.param("openvino-fp32", marks=pytest.mark.skipif(not has_openvino(), reason="no OpenVINO")),
]


def test_tiles_take_the_fewest_products_and_the_smaller_ones_where_that_is_even() -> None:
    assert {size: tile_of(size) for size in (7, 14, 28, 56)} == {7: 4, 14: 5, 28: 4, 56: 4}


@pytest.mark.parametrize("tile", POINTS)
def test_the_transforms_are_an_exact_convolution_in_float64(tile: int) -> None:
    a, g, b = transforms(tile)
    d, kernel = RNG.normal(size=(tile + 2, tile + 2)), RNG.normal(size=(3, 3))
    direct = [[(d[i : i + 3, j : j + 3] * kernel).sum() for j in range(tile)] for i in range(tile)]
    found = a @ ((g @ kernel.reshape(-1)) * (b @ d.reshape(-1)))
    np.testing.assert_allclose(found.reshape(tile, tile), direct, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("size", [7, 9, 14])
def test_residual_blocks_compute_the_same_for_any_number_of_faces(runtime: str, size: int) -> None:
    plain = blocks(size)
    rewritten = onnx.ModelProto.FromString(plain.SerializeToString())
    step = winograd(rewritten, fewest_channels=8)
    assert (step.changed, step.why) == (True, "3 of 5 Conv by Winograd's method")
    before, after = open_session(plain, "onnxruntime"), open_session(rewritten, runtime)
    for faces in (1, 3, 8):  # 8 is also the number of channels
        x = RNG.normal(size=(faces, 8, size, size)).astype(np.float32)
        for expected, found in zip(before.run(None, {"x": x}), after.run(None, {"x": x}), strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-4)


def test_the_file_keeps_its_size() -> None:
    plain = blocks(14, channels=64)
    size = plain.ByteSize()
    assert winograd(plain, fewest_channels=8).changed
    assert plain.ByteSize() < 1.25 * size  # a few tables a resolution


@pytest.mark.parametrize(
    "changed",
    [
        {"strides": [2, 2]},
        {"dilations": [2, 2], "pads": [2] * 4},
        {"pads": [0] * 4},
        {"group": 2},
        {"auto_pad": "SAME_UPPER"},
    ],
)
def test_other_convolutions_stay_what_they_are(changed: dict) -> None:
    attributes = {"pads": [1] * 4} | changed
    if "auto_pad" in attributes:
        del attributes["pads"]
    weight = RNG.normal(size=(8, 8 // attributes.get("group", 1), 3, 3)).astype(np.float32)
    model = graph([helper.make_node("Conv", ["x", "w"], ["y"], **attributes)], {"w": weight}, 8, 14, ["y"])
    before = model.SerializeToString()
    step = winograd(model, fewest_channels=8)
    assert (step.changed, step.why) == (False, "none of 1 Conv is 3×3 with 8 channels or more")
    assert model.SerializeToString() == before


def test_few_channels_are_left_alone() -> None:
    assert not winograd(blocks(14)).changed


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small network whose import made the Winograd form."""
    monkeypatch.setattr(forms, "winograd", partial(winograd, fewest_channels=8))
    onnx.save(network(), str(tmp_path / "net.onnx"))
    faces = ProofFaces(synthetic_faces(8), "synthetic")
    importing.import_model(
        resolve(str(tmp_path / "net.onnx"), tmp_path, known=known_models()), tmp_path / "models/net", faces
    )
    return tmp_path / "models/net"


def test_an_import_proves_the_form_and_it_is_a_candidate_in_each_runtime(imported: Path) -> None:
    manifest = read_import_manifest(imported)
    assert manifest.winograd is not None
    assert manifest.winograd["min_cosine"] >= 0.99999 and manifest.winograd["why"] == "1 of 2 Conv by Winograd's method"
    found, _ = candidates(imported, None, ("openvino-fp32", "onnxruntime"))
    assert [(one.name, one.file) for one in found] == [
        ("fp32 in onnxruntime", "serving_cpu.onnx"),
        ("fp32 by Winograd in onnxruntime", "serving_winograd.onnx"),
        ("fp32 in openvino-fp32", "serving.onnx"),
        ("fp32 by Winograd in openvino-fp32", "serving_winograd.onnx"),
    ]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino-fp32"])
def test_what_was_chosen_is_installed_and_a_replaced_file_is_not(imported: Path, tmp_path: Path, runtime: str) -> None:
    repository = copy_repository(tmp_path / "repository")
    choice = VariantChoice("serving_winograd.onnx", "fp32", runtime, "measured", None, form=WINOGRAD)
    assemble(imported, repository, choice)
    told = json.loads((repository / "arcface_onnx/1/manifest.json").read_text())["variant"]
    assert (told["runtime"], told["form"]) == (runtime, "Winograd")
    installed = (repository / "arcface_onnx/1/model.onnx").read_bytes()
    assert installed == (imported / "serving_winograd.onnx").read_bytes()
    (imported / "serving_winograd.onnx").write_bytes((imported / "serving.onnx").read_bytes())
    with pytest.raises(GateFailed, match=r"serving_winograd\.onnx is not the file that was proved"):
        assemble(imported, repository, choice)


def test_of_two_forms_that_are_level_the_plain_one_is_served() -> None:
    plain = Speed("fp32", "openvino-fp32", "a", (10.0,) * 5, (10.0,) * 5)
    level = Speed("fp32", "openvino-fp32", "b", (10.2,) * 5, (10.2,) * 5, form="Winograd")
    faster = Speed("fp32", "openvino-fp32", "b", (10.2,) * 5, (13.0,) * 5, form="Winograd")
    assert fastest([level, plain], "throughput")[0] is plain
    assert fastest([plain, faster], "throughput") == (faster, plain)
    assert fastest([plain, faster], "latency")[0] is plain


def test_each_runtime_may_be_the_one_that_is_fast_by_winograd(imported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO with AVX-512, ONNX Runtime's own kernels with AVX2: what was measured decides."""
    for quick in ("onnxruntime", "openvino-fp32"):

        def measured(model_dir: Path, found: list[Candidate], missing: object, quick: str = quick) -> SpeedTable:
            rates = [(13.0 if (one.form, one.runtime) == (WINOGRAD, quick) else 10.0,) * 5 for one in found]
            speeds = [
                Speed(one.precision, one.runtime, one.sha256, (10.0,) * 5, rate, drift=0.0, form=one.form)
                for one, rate in zip(found, rates, strict=True)
            ]
            return SpeedTable(8, tuple(speeds))

        monkeypatch.setattr("arcface_build.variants.choose.measure", measured)
        here, told = ("openvino-fp32", "onnxruntime"), Wanted(remeasure=True)
        choice = choose(imported, None, here, wanted=told)
        assert (choice.file, choice.runtime, choice.plain) == ("serving_winograd.onnx", quick, False)
        assert choice.reason.startswith(f"fp32 by Winograd in {quick}: 13 faces/s, 1.30 × fp32 in onnxruntime")
        lone = choose(imported, None, here, wanted=replace(told, goal="latency"))
        assert (lone.file, lone.plain) == ("serving_cpu.onnx", True)


def test_a_kept_measurement_names_the_form(tmp_path: Path) -> None:
    speed = Speed("fp32", "openvino-fp32", "b", (10.0,), (13.0,), form="Winograd")
    keep_speeds(tmp_path, "here", SpeedTable(8, (speed,)))
    kept = kept_speeds(tmp_path, "here")
    assert kept is not None and kept.speeds == (speed,) and speed.told()["form"] == "Winograd"


def network() -> onnx.ModelProto:
    """Images of 112 × 112 to an embedding, with one convolution that suits."""
    weights = {
        "w0": RNG.normal(size=(16, 3, 3, 3)) / 5,
        "w1": RNG.normal(size=(16, 16, 3, 3)) / 12,
        "s": RNG.uniform(0.1, 0.4, (16, 1, 1)),
        "w2": RNG.normal(size=(16 * 28 * 28, 128)) / 112,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], strides=[4, 4], pads=[0, 0, 1, 1]),
        helper.make_node("Conv", ["c0", "w1"], ["c1"], pads=[1] * 4),
        helper.make_node("PRelu", ["c1", "s"], ["p1"]),
        helper.make_node("Flatten", ["p1"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w2"], ["embedding"]),
    ]
    model = graph(nodes, {name: value.astype(np.float32) for name, value in weights.items()}, 3, 112, ["embedding"])
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 128]))
    return model


def blocks(size: int, channels: int = 8) -> onnx.ModelProto:
    """A block of an IResNet, one that halves the map, and half of a third; maps and pooled features as outputs."""
    weights = {
        f"w{i}": RNG.normal(size=(channels, channels, 3, 3)).astype(np.float32) / 3 / channels**0.5 for i in range(4)
    }
    weights |= {"w4": RNG.normal(size=(channels, channels, 1, 1)).astype(np.float32) / channels**0.5}
    weights |= {f"b{i}": RNG.normal(size=channels).astype(np.float32) for i in range(5)}
    weights |= {f"s{i}": RNG.uniform(-0.5, 1, (channels, 1, 1)).astype(np.float32) for i in range(2)}
    for name, low, high in (("scale", 0.5, 2), ("shift", -1, 1), ("mean", -1, 1), ("var", 0.5, 2)):
        weights[name] = RNG.uniform(low, high, channels).astype(np.float32)
    node, same = helper.make_node, {"pads": [1] * 4}
    norm = ["scale", "shift", "mean", "var"]
    nodes = [
        node("BatchNormalization", ["x", *norm], ["n0"]),
        node("Conv", ["n0", "w0", "b0"], ["c0"], **same),
        node("PRelu", ["c0", "s0"], ["p0"]),
        node("Conv", ["p0", "w1", "b1"], ["c1"], **same),
        node("Add", ["c1", "x"], ["r1"]),
        node("BatchNormalization", ["r1", *norm], ["n1"]),
        node("Conv", ["n1", "w2"], ["c2"], **same),
        node("PRelu", ["c2", "s1"], ["p1"]),
        node("Conv", ["p1", "w3", "b3"], ["c3"], strides=[2, 2], **same),
        node("Conv", ["r1", "w4", "b4"], ["c4"], strides=[2, 2]),
        node("Add", ["c3", "c4"], ["r2"]),
        node("GlobalAveragePool", ["r1"], ["pooled"]),
    ]
    return graph(nodes, weights, channels, size, ["r2", "r1", "pooled"])


def graph(nodes: list, weights: dict, channels: int, size: int, outputs: list[str]) -> onnx.ModelProto:
    return helper.make_model(
        helper.make_graph(
            nodes,
            "blocks",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", channels, size, size])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
