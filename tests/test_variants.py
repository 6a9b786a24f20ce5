"""Variants of the mobile demo network: made, judged by the gate, refused with reasons, searched for, replayed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from arcface_build.errors import ProofFailed
from arcface_build.graph.embedding_only import embedding_only
from arcface_build.graph.tensorrt_form import TensorRtForm
from arcface_build.plans.loaders import pin_precisions
from arcface_build.plans.typed import FLOAT16, layer_precisions, precision_pins, tensor_types
from arcface_build.plans.weakly_typed import weakly_typed
from arcface_build.variants.calibrate import Histogram, conv_inputs, least_error_range, on_grid
from arcface_build.variants.eval_set import evaluation_faces
from arcface_build.variants.int8 import make_coarse, quantizable_layers, quantize_convolutions
from arcface_build.variants.make import Wish, make_variant
from arcface_build.variants.recipe import Recipe
from arcface_build.variants.sensitivity import cut_tensors, measure_sensitivities, part_from
from arcface_build.variants.typed import body_nodes, largest_values, overflowing, rounded_as_float16, to_float16
from arcface_clients.contract import contract_prefix
from arcface_clients.engines.import_manifest import read_import_manifest
from arcface_clients.engines.runtimes import cpu_flags, has_bf16, has_openvino, open_session
from arcface_clients.errors import Missing, WrongUse
from arcface_clients.evidence.drift import compare_embeddings
from arcface_clients.faces.synthetic import synthetic_faces

FACES = 24
# What TensorRT 8.6's real ONNX parser makes of the fp16 variant of the mobile demo network.
PARSED_BY_8_6 = Path(__file__).resolve().parent / "parsed_by_8_6" / "demo-mobile-fp16.tsv"


@pytest.fixture(scope="module")
def model_dir(demo_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The imported mobile demo network, in a folder of this module's own."""
    (imported,) = (p.parent for p in (demo_repository.parent / "models").glob("*/manifest.json"))
    return Path(shutil.copytree(imported, tmp_path_factory.mktemp("models") / "demo"))


@pytest.fixture(scope="module")
def serving(model_dir: Path) -> onnx.ModelProto:
    return onnx.load(model_dir / "serving.onnx")


@pytest.fixture(scope="module")
def ranges(serving: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    return dict.fromkeys(conv_inputs(serving), (-4.0, 4.1))


def types_of_weights(model: onnx.ModelProto, op: str) -> set[int]:
    types = {i.name: i.data_type for i in model.graph.initializer}
    return {types[n.input[1]] for n in model.graph.node if n.op_type == op and n.input[1] in types}


def test_fp16_variant_has_half_weights_in_the_body_and_float32_at_both_ends(model_dir):
    sidecar, path = make_variant(model_dir, Wish("fp16", eval_faces=FACES))
    variant = onnx.load(model_dir / sidecar["file"])
    assert types_of_weights(variant, "Conv") == {TensorProto.FLOAT16}
    assert variant.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    assert variant.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert (model_dir / sidecar["file"]).stat().st_size < 0.6 * (model_dir / "serving.onnx").stat().st_size
    assert 0 < sidecar["gates"][0]["drift"]["max_drift"] < 1e-3
    assert sidecar["contract_id"] == read_import_manifest(model_dir).contract_id
    assert json.loads(path.read_text()) == json.loads(json.dumps(sidecar))


def test_what_overflows_float16_stays_float32():
    rng = np.random.default_rng(0)
    names = ["face", "w", "up", "down", "w2"]
    values = [None, rng.normal(size=(4, 3, 3, 3)), np.full(1, 1e5), np.full(1, 1e-5), rng.normal(size=(4, 4, 1, 1))]
    nodes = [
        helper.make_node("Conv", ["face", "w"], ["a"], name="first", kernel_shape=[3, 3]),
        helper.make_node("Mul", ["a", "up"], ["b"], name="huge"),
        helper.make_node("Mul", ["b", "down"], ["c"], name="normal"),
        helper.make_node("Conv", ["c", "w2"], ["d"], name="last", kernel_shape=[1, 1]),
        helper.make_node("Flatten", ["d"], ["embedding"], name="tail"),
    ]
    graph = helper.make_graph(
        nodes,
        "overflow",
        [helper.make_tensor_value_info("face", TensorProto.FLOAT, ["N", 3, 4, 4])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 16])],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in zip(names[1:], values[1:], strict=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    faces = rng.normal(size=(5, 3, 4, 4)).astype(np.float32)
    expected = open_session(model).run(None, {"face": faces})[0]

    def drift(keep):
        return compare_embeddings(expected, open_session(rounded_as_float16(model, keep)).run(None, {"face": faces})[0])

    assert not np.isfinite(open_session(rounded_as_float16(model)).run(None, {"face": faces})[0]).all()
    keep = overflowing(model, largest_values(model, body_nodes(model), faces))
    assert keep == ["huge", "normal"]
    assert 1e-9 < drift(keep).max_drift < 1e-5
    typed = {n.name: n for n in to_float16(model, keep).graph.node}
    assert typed["huge"].input[1] == "up"
    assert typed["first"].input[1] == "w.fp16"


def test_fp16_is_judged_with_every_result_rounded_which_onnxruntime_alone_does_not_do(serving):
    faces = synthetic_faces(4, seed=9)
    reference, typed, rounded = (
        open_session(m).run(None, {"face": faces})[0]
        for m in (serving, to_float16(serving), rounded_as_float16(serving))
    )
    assert compare_embeddings(reference, rounded).max_drift > 1.2 * compare_embeddings(reference, typed).max_drift


@pytest.mark.parametrize(
    ("target", "kind", "zero"), [("cpu", TensorProto.UINT8, 126), ("tensorrt", TensorProto.INT8, 0)]
)
def test_int8_touches_convolution_inputs_and_weights_and_nothing_else(serving, ranges, target, kind, zero):
    layers = quantizable_layers(serving)
    variant = quantize_convolutions(serving, ranges, target, keep=layers[:2])
    constants = {i.name: i for i in variant.graph.initializer}
    convolutions = {n.name: n for n in variant.graph.node if n.op_type == "Conv"}
    readers = {n.name for n in variant.graph.node for i in n.input if i.endswith("_DequantizeLinear_Output")}
    assert readers == set(layers[2:])
    activations = [n for n in variant.graph.node if n.op_type == "QuantizeLinear"]
    made_by = {o: n for n in variant.graph.node for o in n.output}
    assert not [n for n in activations if made_by[n.input[0]].op_type == "Conv" and n.input[0] not in ranges]
    assert {constants[n.input[2]].data_type for n in activations} == {kind}
    assert {int(numpy_helper.to_array(constants[n.input[2]])) for n in activations} == {zero}
    for name in layers[2:]:
        weight = made_by[convolutions[name].input[1]]
        assert weight.op_type == "DequantizeLinear"
        scales = numpy_helper.to_array(constants[weight.input[1]])
        assert len(scales) == constants[weight.input[0]].dims[0]  # one a channel
        assert not numpy_helper.to_array(constants[weight.input[2]]).any()  # symmetric
    assert {i.data_type for i in variant.graph.initializer if i.name == convolutions[layers[0]].input[1]} == {1}


def test_int8_for_tensorrt_is_float16_between_its_int8_convolutions_and_for_a_cpu_float32(serving, ranges):
    layers = quantizable_layers(serving)
    both = {target: dict(ranges) for target in ("cpu", "tensorrt")}
    cpu = Recipe("int8", "cpu", "5" * 64, keep=tuple(layers[:5]), ranges=both)
    assert FLOAT16 not in tensor_types(cpu.apply(serving).graph).values()
    recipe = replace(cpu, target="tensorrt", form=TensorRtForm())
    variant = recipe.apply(serving)
    onnx.checker.check_model(variant, full_check=True)
    kinds = layer_precisions(variant.graph, tensor_types(variant.graph))
    by_name = {n.name: kinds[n.output[0]] for n in variant.graph.node if n.op_type == "Conv"}
    assert by_name == {name: "fp16" if name in layers[:5] else "int8" for name in layers}
    constants = {i.name: i.data_type for i in variant.graph.initializer}
    scales = [constants[n.input[1]] for n in variant.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert set(scales) == {TensorProto.FLOAT16}
    casts = [n for n in variant.graph.node if n.op_type == "Cast" and n.name not in ("face_float", "contract_number")]
    assert len(casts) == 2  # into the body and out of it, none between
    assert recipe.apply(serving).SerializeToString(deterministic=True) == variant.SerializeToString(deterministic=True)


def test_what_8_6_gets_of_an_int8_variant_means_the_same(serving, ranges):
    keep = tuple(quantizable_layers(serving)[:-3])
    recipe = Recipe("int8", "tensorrt", "5" * 64, keep=keep, ranges={"tensorrt": dict(ranges)}, form=TensorRtForm())
    typed = recipe.apply(serving)
    pins = precision_pins(typed.graph, tensor_types(typed.graph))
    assert {name for name, kind in pins.items() if kind == "fp16" and name in keep} == set(keep)
    weakly_typed(typed)
    onnx.checker.check_model(typed, full_check=True)
    assert [entry.version for entry in typed.opset_import if not entry.domain] == [17]
    assert FLOAT16 not in tensor_types(typed.graph).values()
    names = {name for node in typed.graph.node for name in [node.name, *node.output]}
    assert set(pins) <= names
    faces = synthetic_faces(8)
    judged, weak = (open_session(m).run(None, {"face": faces})[0] for m in (recipe.stand_in(serving), typed))
    assert compare_embeddings(judged, weak).max_drift < 1e-3


def test_every_layer_that_8_6s_parser_makes_of_the_fp16_variant_is_pinned_as_its_onnx_says(serving):
    typed = Recipe("fp16", "tensorrt", "5" * 64, form=TensorRtForm()).apply(serving)
    pins = precision_pins(typed.graph, tensor_types(typed.graph))
    rows = [line.split("\t") for line in PARSED_BY_8_6.read_text().splitlines()]  # …, dtype, operation
    kinds = sorted({"CONSTANT", "SHUFFLE", "SHAPE", "CAST", *(row[0] for row in rows)})
    trt = SimpleNamespace(float32="fp32", float16="fp16", LayerType=SimpleNamespace(**{kind: kind for kind in kinds}))
    network = []
    for kind, name, output, dtype, _ in rows:
        tensor = SimpleNamespace(name=output, dtype=dtype)
        layer = SimpleNamespace(type=kind, name=name, num_outputs=1, precision=None)
        layer.get_output = lambda _, tensor=tensor: tensor
        network.append(layer)
    pin_precisions(trt, network, pins)
    convolutions = [layer.precision for layer in network if layer.type == "CONVOLUTION"]
    assert convolutions == ["fp16"] * 50
    for layer in network:
        computes = layer.type in ("ELEMENTWISE", "REDUCE", "UNARY", "IDENTITY")
        if layer.get_output(0).dtype == "fp32" and computes:
            assert layer.precision == "fp32", layer.name  # pixels and norm: nothing there may be lowered
        if layer.get_output(0).dtype == "fp16":
            assert layer.precision != "fp32", layer.name


def test_residual_stream_is_not_rounded_where_a_convolution_and_a_sum_read_it(serving, ranges):
    variant = quantize_convolutions(serving, ranges, "cpu")
    made_by = {o: n.op_type for n in variant.graph.node for o in n.output}
    sums = [n for n in variant.graph.node if n.op_type == "Add"]
    assert sums
    assert not [n.name for n in sums for i in n.input if made_by.get(i) == "DequantizeLinear"]


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
@pytest.mark.parametrize("seed", [0, 1])
def test_clipped_range_has_less_squared_error_than_the_full_range(target, seed):
    values = np.random.default_rng(seed).standard_t(4, 200_000)  # tails as activations have them
    values = np.where(values < 0, 0.25 * values, values)  # after PReLU
    low, high = values.min(), values.max()
    counts, _ = np.histogram(values, 4096, (low, high))
    full = (low, high) if target == "cpu" else (-max(-low, high), max(-low, high))
    clipped = least_error_range(Histogram(low, high, counts), target)
    errors = [np.square(values - on_grid(values, *ends, target)).mean() for ends in (clipped, full)]
    assert errors[0] < 0.85 * errors[1]


def test_range_of_a_tensor_that_is_always_zero_is_usable():
    low, high = least_error_range(Histogram(0.0, 0.0, np.bincount([0], minlength=4096)), "cpu")
    assert low < high


def test_sensitivity_by_parts_equals_the_whole_network(serving, ranges):
    faces = synthetic_faces(4, seed=9)
    layers = quantizable_layers(serving)[10:40:12]
    by_parts = measure_sensitivities(
        serving, layers, lambda part, layer: make_coarse(part, layer, ranges, "cpu"), faces
    )
    reference = open_session(serving).run(None, {"face": faces})[0]
    for layer in layers:
        whole = quantize_convolutions(serving, ranges, "cpu", keep=set(quantizable_layers(serving)) - {layer})
        drift = 1 - compare_embeddings(reference, open_session(whole).run(None, {"face": faces})[0]).mean_cosine
        assert by_parts[layer] == pytest.approx(drift, rel=0.02), layer


def test_network_behind_a_cut_gives_the_same_embeddings(serving):
    faces = synthetic_faces(2, seed=9)
    network = embedding_only(serving)
    cuts = cut_tensors(network)
    assert len(cuts) > 10
    watched = onnx.ModelProto()
    watched.CopyFrom(network)
    middle = cuts[len(cuts) // 2]
    watched.graph.output.append(onnx.ValueInfoProto(name=middle))
    whole, value = open_session(watched).run(["embedding", middle], {"face": faces})
    assert np.allclose(open_session(part_from(network, middle)).run(None, {middle: value})[0], whole, atol=1e-6)


def test_int8_without_search_is_refused_by_how_much_on_which_faces_and_kept_aside(model_dir):
    wish = Wish("int8", target="tensorrt", eval_faces=FACES, limits={"int8": 0.02}, search=False)
    with pytest.raises(ProofFailed) as refused:
        make_variant(model_dir, wish)
    message = str(refused.value)
    assert "int8 of" in message
    assert "× the limit 0.02 for int8, on 12 of 12 faces; worst: synthetic 0:" in message
    assert "Try --search, which finds the layers to keep. Kept beside its report, never served: " in message
    folder = model_dir / "variants"
    assert (folder / "int8-tensorrt.onnx.refused").is_file()
    assert json.loads((folder / "int8-tensorrt.json.refused").read_text())["passed"] is False
    assert not (folder / "int8-tensorrt.onnx").exists()
    assert not (folder / "int8-tensorrt.json").exists()


def test_search_turns_a_failing_int8_into_a_passing_one_whose_recipe_can_be_replayed(model_dir, tmp_path):
    wish = Wish("int8", target="tensorrt", eval_faces=FACES, limits={"int8": 0.03})
    stages: list[str] = []

    def stage(title):
        stages.append(title)
        return lambda done, total: None

    sidecar, path = make_variant(model_dir, wish, stage)
    folder = model_dir / "variants"
    assert sidecar["passed"]
    assert sidecar["gates"][0]["drift"]["max_drift"] <= 0.03
    recipe = sidecar["recipe"]
    attempts = recipe["search"]["attempts"]
    assert not attempts[0]["passed"]
    assert len(recipe["keep"]) < len(quantizable_layers(onnx.load(model_dir / "serving.onnx")))
    smaller = [a for a in attempts if a["kept"] == len(recipe["keep"]) - 1]
    assert smaller and not smaller[0]["passed"]  # one layer fewer was tried and fails
    assert "sensitivity of each layer" in stages
    assert (folder / "int8-tensorrt.search.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "int8-tensorrt.onnx.refused").exists()

    saved = tmp_path / "recipe.json"
    saved.write_text(json.dumps(recipe))
    (folder / "int8-tensorrt.onnx").unlink()
    again, _ = make_variant(
        model_dir, Wish("int8", target="tensorrt", eval_faces=FACES, limits={"int8": 0.03}, recipe=saved)
    )
    assert again["sha256"] == sidecar["sha256"]

    for_cpu, _ = make_variant(
        model_dir, Wish("int8", target="cpu", eval_faces=FACES, limits={"int8": 0.1}, recipe=path)
    )
    assert for_cpu["recipe"]["calibration"] == recipe["calibration"]  # both targets from one calibration


def test_search_works_for_fp16_too(model_dir):
    sidecar, _ = make_variant(model_dir, Wish("fp16", eval_faces=8, limits={"fp16": 1.5e-5}))
    assert not sidecar["recipe"]["search"]["attempts"][0]["passed"]
    assert sidecar["gates"][0]["drift"]["max_drift"] <= 1.5e-5
    assert types_of_weights(onnx.load(model_dir / sidecar["file"]), "Conv") == {TensorProto.FLOAT, TensorProto.FLOAT16}


def test_recipe_for_another_network_is_refused(model_dir, tmp_path):
    saved = tmp_path / "recipe.json"
    data = {"format": 1, "precision": "fp16", "target": "tensorrt", "serving_sha256": "ab" * 32, "keep": []}
    saved.write_text(json.dumps(data))
    with pytest.raises(WrongUse, match=r"made for another serving ONNX: expected .{12}…, got abababababab…"):
        make_variant(model_dir, Wish("fp16", eval_faces=4, recipe=saved))


@pytest.mark.skipif(not has_openvino(), reason="ONNX Runtime without OpenVINO")
def test_bf16_is_the_serving_onnx_computed_in_bf16_where_the_cpu_can(model_dir):
    wish = Wish("bf16", eval_faces=FACES, limits={"bf16": 0.02})
    if not has_bf16(cpu_flags()):
        with pytest.raises(Missing, match="this CPU has no bf16 instructions"):
            make_variant(model_dir, wish)
        return
    sidecar, _ = make_variant(model_dir, wish)
    assert sidecar["file"] == "serving.onnx"
    assert sidecar["gates"][0]["runtime"] == "openvino-bf16"
    assert sidecar["gates"][0]["drift"]["max_drift"] > 1e-5  # really bf16: fp32 drifts a hundred times less


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Wish("fp16", target="cpu"), "no fp16 for cpu: expected --target tensorrt"),
        (Wish("bf16", target="tensorrt"), "no bf16 for tensorrt: expected --target cpu"),
        (Wish("int8", eval_faces=4, keep=("Conv_x",)), "--keep names no node: Conv_x. Layers: Conv_0, "),
    ],
)
def test_impossible_wishes_are_refused(model_dir, wish, message):
    with pytest.raises(WrongUse) as refused:
        make_variant(model_dir, wish)
    assert str(refused.value).startswith(message)


def test_int8_of_a_real_model_asks_for_real_crops(model_dir, tmp_path):
    folder = Path(shutil.copytree(model_dir, tmp_path / "real"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["source"]["kind"] = "file"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WrongUse, match=r"needs real crops: .* --eval FOLDER"):
        make_variant(folder, Wish("int8", eval_faces=4))
    np.savez(tmp_path / "crops.npz", faces=synthetic_faces(6), identities=np.array(list("aabbcc")))
    with pytest.raises(ProofFailed):  # taken, calibrated, judged, and at this limit refused
        make_variant(folder, Wish("int8", eval_source=str(tmp_path / "crops.npz"), limits={"int8": 1e-9}, search=False))


def test_missing_import_names_the_command(tmp_path):
    with pytest.raises(Missing, match="arcface import SOURCE"):
        make_variant(tmp_path / "nobody", Wish("fp16"))


def test_variants_run_on_plain_onnxruntime(model_dir):
    for variant in (model_dir / "variants").glob("*.onnx"):
        session = onnxruntime.InferenceSession(str(variant), providers=["CPUExecutionProvider"])
        embeddings, norms, contracts = session.run(None, {"face": synthetic_faces(3)})
        assert norms.shape == (3, 1) and (norms > 0).all(), variant.name
        assert {contract_prefix(row) for row in contracts} == {read_import_manifest(model_dir).contract_id[:32]}
        assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5), variant.name


def test_command_prints_the_sidecar_and_refuses_with_exit_code_1(model_dir, capsys):
    from arcface_build.cli import main

    arguments = ["quantize", model_dir.name, "--precision", "fp16", "--models-dir", str(model_dir.parent)]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--eval-faces", "8", "--json"])
    assert done.value.code == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--eval-faces", "8", "--max-drift", "1e-12", "--no-search"])
    assert done.value.code == 1
    assert "ProofFailed: fp16 of demo-mobile refused in onnxruntime with float16 rounding" in capsys.readouterr().err


def test_a_stricter_limit_in_the_configuration_acts_in_quantize(model_dir, monkeypatch):
    from arcface_build.commands.quantize import command

    arguments = [model_dir.name, "--precision", "fp16", "--models-dir", str(model_dir.parent), "--eval-faces", "8"]
    monkeypatch.setenv("ARCFACE_COMPARISON__MAX_DRIFT__FP16", "1e-12")
    refused = CliRunner().invoke(command, [*arguments, "--no-search"], standalone_mode=False).exception
    assert isinstance(refused, ProofFailed)
    assert "× the limit 1e-12 for fp16" in str(refused)


@pytest.mark.skipif(not has_openvino(), reason="ONNX Runtime without OpenVINO")
def test_benchmark_puts_drift_beside_the_speed_of_each_variant(model_dir, tmp_path):
    from arcface_build.bench.variants import run, table

    np.savez(tmp_path / "strangers.npz", faces=synthetic_faces(8))  # nobody knows who they are: drift alone counts
    make_variant(
        model_dir, Wish("int8", eval_source=str(tmp_path / "strangers.npz"), limits={"int8": 0.5}, search=False)
    )
    result = run(model_dir, [2], rounds=1, sample_s=0, faces=evaluation_faces("synthetic", 4))
    rows = {row["name"]: row for row in result["variants"]}
    assert next(iter(rows)) == "bare b2"
    assert rows["fp32 openvino-fp32 b2"]["drift"]["max_drift"] < 1e-5
    assert rows["int8 openvino-fp32 b2"]["drift"]["max_drift"] > 1e-3
    assert rows["int8 openvino-fp32 b2"]["gate"]["limit"] == 0.5
    assert rows["int8 openvino-fp32 b2"]["ratio"]["base"] == "bare b2"
    assert rows["int8 onnxruntime b2"]["gate"] is None, "measured, though it may not be served"
    heading, *lines = table(result)
    assert heading[0] == "variant"
    assert {line[0] for line in lines} == set(rows)
