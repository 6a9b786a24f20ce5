"""The form of the graph that TensorRT gets: exact on ONNX Runtime for every kind of padding, and undone by nothing."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from arcface_build.errors import ProofFailed
from arcface_build.graph.fold_batchnorm import fold_batchnorm
from arcface_build.graph.fold_padded import fold_padded
from arcface_build.graph.prelu_as_relu import prelu_as_relu
from arcface_build.graph.tensorrt_form import TensorRtForm, form_of, with_made
from arcface_build.imports.forms import to_serving
from arcface_build.plans.form import in_form
from arcface_build.plans.source import PlanSource, find_source
from arcface_build.plans.typed import read_typed_onnx
from arcface_build.variants.make import Wish, make_variant
from arcface_clients.contract import Preprocessing, contract_id
from arcface_clients.engines.runtimes import open_session
from arcface_clients.errors import WrongUse
from arcface_clients.evidence.drift import compare_embeddings
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.plans.manifest import file_sha256
from test_graph_steps import BN, chain, norm, normal, ops, run
from tiny_model import write_manifest
from tiny_nets import tiny_net

X = normal(3, 6, 9, 8)
IMAGES = ["N", 6, 9, 8]
PADDED: dict[str, dict[str, Any]] = {
    "pads": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
    "pads that differ on each side, a stride": {"kernel_shape": [3, 2], "pads": [2, 0, 1, 1], "strides": [2, 1]},
    "dilation": {"kernel_shape": [3, 3], "pads": [2, 2, 2, 2], "dilations": [2, 2]},
    "padding wider than the kernel": {"kernel_shape": [1, 1], "pads": [1, 1, 1, 1]},
    "SAME_UPPER": {"kernel_shape": [3, 2], "auto_pad": "SAME_UPPER", "strides": [2, 2]},
    "SAME_LOWER": {"kernel_shape": [2, 3], "auto_pad": "SAME_LOWER"},
    "groups": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "group": 2},
    "depthwise": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "group": 6},
}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", PADDED)
def test_batchnorm_before_a_padded_convolution_folds_exactly(name: str, bias: bool) -> None:
    how = PADDED[name]
    weights = {"w": normal(12, 6 // how.get("group", 1), *how["kernel_shape"]), **norm(6)}
    conv = ("Conv", ["w", "c"] if bias else ["w"], how)
    model = chain(BN, conv, x=IMAGES, **weights, **({"c": normal(12)} if bias else {}))
    before = run(model, X)
    assert not fold_batchnorm(model).changed
    step = fold_padded(model)
    assert step.changed, step.why
    assert [node.op_type for node in model.graph.node] == ["Conv", "Add"]
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    after = run(model, X)
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
    assert np.abs(after - before)[:, :, 0, 0].max() <= 1e-5 * np.abs(before).max()  # a corner reads most padding


def test_a_batchnorm_that_others_read_or_that_is_spared_stays() -> None:
    how = {"kernel_shape": [3, 3], "pads": [1] * 4}
    model = chain(BN, ("Conv", ["w"], how), x=IMAGES, w=normal(6, 6, 3, 3), **norm(6))
    model.graph.node[1].name = "quantised"
    assert fold_padded(model, spare={"quantised"}).why == "no BatchNormalization before a padded Conv; 1 stay"
    model.graph.node.append(onnx.helper.make_node("Add", ["t0", "t1"], ["sum"]))
    model.graph.output[0].name = "sum"
    before = run(model, X)
    assert not fold_padded(model).changed
    np.testing.assert_array_equal(run(model, X), before)


def test_weights_in_float16_stay_in_float16() -> None:
    how = {"kernel_shape": [3, 3], "pads": [1] * 4}
    model = chain(BN, ("Conv", ["w"], how), x=IMAGES, w=normal(6, 6, 3, 3).astype(np.float16), **norm(6))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    assert fold_padded(model).changed
    assert {tensor.data_type for tensor in model.graph.initializer} == {TensorProto.FLOAT16}
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def test_prelu_in_pointwise_form_adds_no_rounding() -> None:
    model = chain(("PRelu", ["a"], {}), x=IMAGES, a=normal(6, 1, 1))
    before = run(model, X)
    step = prelu_as_relu(model)
    assert step.why == "1 of 1 PRelu as Relu, Min, Mul and Add"
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    np.testing.assert_array_equal(run(model, X), before)
    assert prelu_as_relu(model).why == "no PRelu"


@pytest.mark.parametrize("prelu", ["as-is", "fused"])
def test_a_whole_network_in_tensorrts_form_gives_the_same_embeddings(prelu: str) -> None:
    model = tiny_net(bn_before_conv=True)
    fold_batchnorm(model)
    names = {node.name for node in model.graph.node}
    image = normal(3, 3, 112, 112)
    before, norms = run(model, image), ops(model, "BatchNormalization")
    assert norms == 3
    steps = TensorRtForm(prelu=prelu).steps(model)
    assert [step.changed for step in steps] == [True] * (2 if prelu == "fused" else 1)
    assert ops(model, "BatchNormalization") == 0
    assert ops(model, "PRelu") == (0 if prelu == "fused" else 3)
    after = run(model, image)
    cosine = (after * before).sum(1) / np.linalg.norm(after, axis=1) / np.linalg.norm(before, axis=1)
    assert 1 - cosine.min() < 1e-6
    made = {node.name for node in model.graph.node} - names
    assert made and made <= with_made(model, names)  # what is kept in float32 takes along what became of it


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(WrongUse, match=r"prelu is 'quick': expected one of as-is, fused"):
        TensorRtForm(prelu="quick")


# --- the form of a plan's ONNX ---


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """models/net: an imported network with a BatchNormalization before each padded convolution, and its fp16."""
    folder = tmp_path / "models" / "net"
    folder.mkdir(parents=True)
    contract = contract_id("5" * 64, Preprocessing(), 16)
    serving, _ = to_serving(tiny_net(bn_before_conv=True, dim=16), Preprocessing(), 16, contract)
    onnx.save(serving, folder / "serving.onnx")
    file = {"file": "serving.onnx", "sha256": file_sha256(folder / "serving.onnx")}
    write_manifest(folder, "5" * 64, Preprocessing(), 16, serving=file)
    make_variant(folder, Wish("fp16", eval_faces=4, limits={"fp16": 0.1}))
    return folder.parent


def forms(source: PlanSource) -> tuple[TensorRtForm, int, int]:
    model = onnx.load(source.onnx)
    return form_of(model), ops(model, "BatchNormalization"), ops(model, "PRelu")


def test_a_plan_gets_the_folded_form_unless_told_otherwise(imported: Path, tmp_path: Path) -> None:
    fp32, fp16 = (find_source("net", precision, imported) for precision in ("fp32", "fp16"))
    assert forms(fp32)[1:] == (3, 3)  # the import is for every runtime
    assert forms(in_form(fp32, "fp32", tmp_path)) == (TensorRtForm(), 0, 3)
    assert in_form(fp32, "fp32", tmp_path, fold_padded=False) == fp32
    assert forms(fp16) == (TensorRtForm(), 0, 3)  # as it was judged
    assert in_form(fp16, "fp16", tmp_path) == fp16
    other = in_form(fp16, "fp16", tmp_path, fold_padded=False, prelu="fused")
    assert forms(other) == (TensorRtForm(False, "fused"), 3, 0)
    typed = read_typed_onnx(other.onnx)
    assert (typed.precision, typed.form) == ("fp16", TensorRtForm(False, "fused"))
    faces = synthetic_faces(4)
    for made in (other, in_form(fp16, "fp16", tmp_path, prelu="fused"), in_form(fp32, "fp32", tmp_path, prelu="fused")):
        embeddings = open_session(made.onnx).run(["embedding"], {"face": faces})[0]
        assert compare_embeddings(fp32.embed(faces), embeddings).max_drift < 1e-4


def test_a_given_file_is_built_as_it_is_and_folds_on_request(imported: Path, tmp_path: Path) -> None:
    given = find_source(str(imported / "net" / "serving.onnx"), "fp32", imported)
    assert in_form(given, "fp32", tmp_path) == given
    folded = in_form(given, "fp32", tmp_path, fold_padded=True)
    assert forms(folded) == (TensorRtForm(), 0, 3)
    again = replace(given, onnx=folded.onnx)
    with pytest.raises(WrongUse, match=r"cannot be undone in the file\. Give the model's name instead"):
        in_form(again, "fp32", tmp_path / "elsewhere", fold_padded=False)


def test_a_rewrite_that_changes_the_embeddings_is_refused(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(conv: onnx.NodeProto, axis: int, length: int, kernel: int) -> np.ndarray:
        return np.ones((-(-length // 2), kernel))  # as if no place read padding

    monkeypatch.setattr("arcface_build.graph.fold_padded._reached", wrong)
    for precision, prelu in (("fp32", None), ("fp16", "fused")):
        with pytest.raises(ProofFailed, match="gives other embeddings: drift"):
            in_form(find_source("net", precision, imported), precision, tmp_path, prelu=prelu)


def test_plan_build_takes_the_form_into_the_plan_and_its_key(
    imported: Path, fake_host: Callable[..., None], tmp_path: Path
) -> None:
    fake_host()
    made = {}
    for name, options in {"default": [], "plain": ["--no-fold-padded"], "fused": ["--prelu", "fused"]}.items():
        arguments = ["plan", "build", "net", "--precision", "fp32", "--max-batch", "8", "--json", *options]
        code = "from arcface_build.cli import main; main()"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment |= {"ARCFACE_STORAGE__PLANS": str(tmp_path / "cache")}
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        plan = onnx.load_from_string(pickle.loads(Path(said["path"]).read_bytes())["onnx"])
        made[name] = (said["build"]["form"], ops(plan, "BatchNormalization"), ops(plan, "PRelu"), said["key"])
    assert made["default"][:3] == ({"fold_padded": True, "prelu": "as-is"}, 0, 3)
    assert made["plain"][:3] == ({"fold_padded": False, "prelu": "as-is"}, 3, 3)
    assert made["fused"][:3] == ({"fold_padded": True, "prelu": "fused"}, 0, 0)
    assert len({key for *_, key in made.values()}) == 3
