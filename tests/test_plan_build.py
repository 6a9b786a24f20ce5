"""Building plans: what the typed ONNX says, Polygraphy's real loaders, and the builder's child process end to end.

TensorRT is tests/fake_tensorrt.py in three versions; behind the marker `gpu` the same tests run on the real one.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from arcface_build.errors import ProofFailed
from arcface_build.plans.build import PlanProof, build_plan, child_error, timing_cache_path
from arcface_build.plans.inspect import check_precision, count_precisions, layer_precision
from arcface_build.plans.loaders import pin_precisions
from arcface_build.plans.source import PlanSource
from arcface_build.plans.typed import check_buildable, read_typed_onnx
from arcface_build.plans.weakly_typed import float_weights
from arcface_clients.contract import Preprocessing, contract_id
from arcface_clients.errors import ArcFaceError, Missing, PlanRefused, WrongUse
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.plans.manifest import PlanManifest
from arcface_clients.plans.read import check_content
from arcface_clients.plans.spec import BuilderOptions, PlanSpec
from deadlines import HANG_S
from tiny_model import write_manifest
from tiny_onnx import DIM, tiny_onnx, write_tiny

TESTS = Path(__file__).resolve().parent


# --- what the typed ONNX says ---


@pytest.mark.parametrize(
    ("precision", "layers"),
    [("fp32", {"fp32": 2}), ("fp16", {"fp16": 2}), ("int8", {"int8": 1, "fp32": 1})],
)
def test_the_typed_onnx_tells_which_layers_compute_in_what(tmp_path: Path, precision: str, layers: dict) -> None:
    typed = read_typed_onnx(write_tiny(tmp_path / "x.onnx", precision))
    assert (typed.precision, dict(typed.layers), typed.dim, typed.opset) == (precision, layers, DIM, 17)


def test_what_a_weakly_typed_builder_must_be_told(tmp_path: Path) -> None:
    assert read_typed_onnx(write_tiny(tmp_path / "a.onnx", "fp32")).pins == {}
    half = read_typed_onnx(write_tiny(tmp_path / "b.onnx", "fp16")).pins
    assert half == {"conv": "fp16", "c": "fp16", "fc": "fp16", "e": "fp16", "norm": "fp32", "n": "fp32", "unit": "fp32",
                    "embedding": "fp32"}  # fmt: skip
    assert read_typed_onnx(write_tiny(tmp_path / "c.onnx", "int8")).pins == {}  # its Q/DQ nodes say it


def test_a_uint8_input_that_is_not_cast_first_is_refused(tmp_path: Path) -> None:
    onnx.save(tiny_onnx(first_op="Transpose"), tmp_path / "x.onnx")
    with pytest.raises(WrongUse, match="face is read by Transpose: expected only Cast"):
        read_typed_onnx(tmp_path / "x.onnx")


def test_a_file_that_is_no_serving_onnx_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="no ONNX file at"):
        read_typed_onnx(tmp_path / "absent.onnx")
    (tmp_path / "x.onnx").write_bytes(b"\x08\x07garbage")
    with pytest.raises(WrongUse, match="is not"):
        read_typed_onnx(tmp_path / "x.onnx")
    model = tiny_onnx()
    model.graph.input[0].name = "data"
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(WrongUse, match=r"expected one input face\[N, 112, 112, 3\], got data\['N', 112, 112, 3\]"):
        read_typed_onnx(tmp_path / "x.onnx")


@pytest.mark.parametrize(
    ("have", "asked", "tensorrt", "message"),
    [("fp32", "fp16", "10.3.0", "computes in fp32 .* expected fp16: the ONNX determines the precision"),
     ("fp16", "fp32", "10.3.0", "computes in fp16"),
     ("int8", "fp16", "8.6.0", "computes in int8")],
)  # fmt: skip
def test_an_onnx_of_another_precision_is_refused_before_the_build(
    tmp_path: Path, have: str, asked: str, tensorrt: str, message: str
) -> None:
    typed = read_typed_onnx(write_tiny(tmp_path / "x.onnx", have))
    check_buildable(typed, have, tensorrt)
    with pytest.raises(WrongUse, match=message):
        check_buildable(typed, asked, tensorrt)


def test_an_opset_that_8_6_cannot_parse_is_refused_there_only(tmp_path: Path) -> None:
    onnx.save(tiny_onnx(opset=18), tmp_path / "x.onnx")
    typed = read_typed_onnx(tmp_path / "x.onnx")
    check_buildable(typed, "fp32", "10.3.0")
    with pytest.raises(WrongUse, match=r"has opset 18; TensorRT 8\.6\.1 parses up to 17"):
        check_buildable(typed, "fp32", "8.6.1")


def test_float_weights_round_to_the_very_int8_weights_that_were_stored(tmp_path: Path) -> None:
    import onnxruntime

    model = tiny_onnx("int8")
    before = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert float_weights(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert "conv_w" not in {i.name for i in model.graph.initializer}
    after = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    faces = synthetic_faces(4)
    np.testing.assert_array_equal(before.run(None, {"face": faces})[0], after.run(None, {"face": faces})[0])
    assert float_weights(model) == 0
    assert float_weights(tiny_onnx("fp16")) == 0
    onnx.save(model, tmp_path / "x.onnx")
    assert read_typed_onnx(tmp_path / "x.onnx").layers == {"int8": 1, "fp32": 1}


# --- the inspector's JSON (shapes as NVIDIA's documentation shows them) ---

DOCUMENTED_8 = {
    "Name": "node_of_gpu_0/res4_0_branch2a_1 + node_of_gpu_0/res4_0_branch2a_bn_1",
    "LayerType": "CaskConvolution",
    "Inputs": [{"Name": "a", "Dimensions": [16, 512, 28, 28],
                "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format."}],
    "Outputs": [{"Name": "b", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
    "ParameterType": "Convolution", "Weights": {"Type": "Int8", "Count": 131072},
    "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32",
}  # fmt: skip


def conv(text: str = "", field: str = "Format/Datatype", **more: Any) -> dict[str, Any]:
    return {"Name": "c", "LayerType": "CaskConvolution", "Inputs": [{"Name": "x", field: text}], **more}


@pytest.mark.parametrize(
    ("layer", "precision"),
    [(DOCUMENTED_8, "int8"),
     (conv("Row major linear FP32"), "fp32"), (conv("Row major linear FP16 format"), "fp16"),
     (conv("Channel major FP16 format where channel % 8 == 0"), "fp16"), (conv("Half"), "fp16"),
     (conv("Float"), "fp32"),
     (conv("BFloat16"), "bf16"), (conv("Row major linear BF16 format"), "bf16"), (conv("Int8"), "int8"),
     (conv("Float", "DataType", Format="Row major"), "fp32"), (conv("Half", "DataType"), "fp16"),
     (conv("", Weights={"Type": "Half", "Count": 9}), "fp16"), (conv("", Weights={"Type": "Float"}), "fp32"),
     (conv("", TacticName="sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc"), "fp16"),
     (conv("", TacticName="sm86_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32"), "fp32"),
     (conv("N/A due to dynamic shapes"), "unknown"), ({"Name": "c", "LayerType": "CaskConvolution"}, "unknown")],
)  # fmt: skip
def test_the_precision_of_a_layer_is_read_in_every_spelling(layer: dict[str, Any], precision: str) -> None:
    assert layer_precision(layer) == precision


def test_convolutions_and_products_are_counted_and_hidden_subgraphs_named() -> None:
    layers = [
        conv("Row major linear FP16 format"), conv("Half"), DOCUMENTED_8,
        {"Name": "fc", "LayerType": "gemm", "Inputs": [{"Format/Datatype": "Float"}]},
        {"Name": "r", "LayerType": "Reformat", "Inputs": [{"Format/Datatype": "Float"}], "ParameterType": "Reformat"},
        {"Name": "cv", "LayerType": "Convert", "Inputs": [{"Format/Datatype": "Float"}]},
        {"Name": "{ForeignNode[embedding_norm...embedding]}", "LayerType": "Myelin"},
        {"Name": "p", "LayerType": "Prelu", "ParameterType": "ParametricReLU"},
        {"Name": "f", "LayerType": "fusion", "Inputs": [{"Format/Datatype": "Half"}],
         "TacticName": "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc"},
        {"Name": "k", "LayerType": "kgen", "TacticName": "__myl_CastAddMax_fused"},
    ]  # fmt: skip
    proof = count_precisions(json.dumps({"Layers": layers, "Bindings": ["face", "embedding"]}))
    assert proof.compute == {"fp16": 3, "int8": 1, "fp32": 1}
    assert proof.opaque == 1
    assert proof.all_layers["CaskConvolution"] == 3


def test_kernels_that_compute_one_layer_of_the_onnx_count_once() -> None:
    def product(name: str, source: str) -> dict[str, Any]:
        return {"Name": name, "LayerType": "gemm", "Inputs": [{"Format/Datatype": "Float"}], "Metadata": source}

    split = [product(f"fc_{half}", "[ONNX Layer: Gemm_69]") for half in (0, 1)]
    proof = count_precisions({"Layers": [conv("Half", Metadata="[ONNX Layer: Conv_0]"), *split]})
    assert proof.compute == {"fp16": 1, "fp32": 1}
    check_precision(proof, "fp16", {"fp16": 1, "fp32": 1})
    more = count_precisions({"Layers": [*split, product("other", "[ONNX Layer: Conv_1]"), product("x", "")]})
    assert more.compute == {"fp32": 3}


# As the parser of TensorRT 8.6 makes ReduceL2 and what stands around it: type, name, output, dtype.
PARSED_BY_8_6 = (
    ("CONVOLUTION", "Conv_0", "Conv_0.out", "fp16"),
    ("ELEMENTWISE", "(Unnamed Layer* 10)", "(Unnamed Layer* 10)_output", "fp16"),
    ("CONVOLUTION", "Conv_1", "Conv_1.out", "fp16"),
    ("ELEMENTWISE", "(Unnamed Layer* 87)", "(Unnamed Layer* 87)_output", "fp32"),
    ("REDUCE", "embedding_norm", "(Unnamed Layer* 88)_output", "fp32"),
    ("UNARY", "embedding_norm_49", "embedding_norm", "fp32"),
    ("CONSTANT", "smallest_norm", "(Unnamed Layer* 90)_output", "fp32"),
    ("SHUFFLE", "(Unnamed Layer* 91)", "(Unnamed Layer* 91)_output", "fp32"),
    ("ELEMENTWISE", "embedding_length", "embedding_length", "fp32"),
)


def test_the_unnamed_layer_that_squares_is_pinned_with_the_norm() -> None:
    class Trt:
        float32, float16 = "fp32", "fp16"
        LayerType = SimpleNamespace(CONSTANT="CONSTANT", SHUFFLE="SHUFFLE", SHAPE="SHAPE", CAST="CAST")

    def layer(kind: str, name: str, output: str, dtype: str) -> SimpleNamespace:
        tensor = SimpleNamespace(name=output, dtype=dtype)
        return SimpleNamespace(type=kind, name=name, num_outputs=1, get_output=lambda _: tensor, precision=None)

    network = [layer(*row) for row in PARSED_BY_8_6]
    pins = {"Conv_0": "fp16", "Conv_1": "fp16", "embedding_norm": "fp32", "embedding_length": "fp32"}
    pin_precisions(Trt, network, pins)  # type: ignore[arg-type]
    assert [one.precision for one in network] == ["fp16", None, "fp16", "fp32", "fp32", "fp32", None, None, "fp32"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"Layers": ["conv1", "conv2"]}', '{"Layers": 3}'])
def test_what_proves_nothing_is_refused(text: str) -> None:
    with pytest.raises(PlanRefused, match=r"gave no layers|only the names of its layers"):
        count_precisions(text)


@pytest.mark.parametrize(
    ("plan", "asked", "onnx_layers", "refused"),
    [({"fp16": 50}, "fp16", {"fp16": 50}, None),
     ({"fp16": 48}, "fp16", {"fp16": 50}, None),
     ({"fp16": 49, "fp32": 1}, "fp16", {"fp16": 49, "fp32": 1}, None),
     ({"fp16": 49, "fp32": 1}, "fp16", {"fp16": 50}, "should be fp16 but has 1 fp32"),
     ({"fp32": 50}, "fp16", {"fp16": 50}, "should be fp16 but has 50 fp32"),
     ({}, "fp16", {"fp16": 50}, "the plan has no fp16 convolution or matrix product"),
     ({"fp16": 49, "unknown": 1}, "fp16", {"fp16": 50}, "has 1 unknown"),
     ({"int8": 40, "fp16": 10}, "int8", {"int8": 40, "fp16": 10}, None),
     ({"int8": 39, "fp16": 11}, "int8", {"int8": 40, "fp16": 10}, "has 11 fp16"),
     ({"int8": 40, "fp32": 10}, "int8", {"int8": 40, "fp16": 10}, "has 10 fp32"),
     ({"fp32": 50}, "fp32", {"fp32": 50}, None),
     ({"bf16": 50}, "bf16", {"bf16": 50}, None),
     ({"fp32": 50}, "bf16", {"bf16": 50}, "has 50 fp32")],
)  # fmt: skip
def test_a_plan_of_a_higher_precision_than_its_onnx_is_refused(
    plan: dict, asked: str, onnx_layers: dict, refused: str | None
) -> None:
    proof = count_precisions({"Layers": []})
    proof = type(proof)(compute=plan)
    if refused is None:
        check_precision(proof, asked, onnx_layers)
    else:
        with pytest.raises(PlanRefused, match=refused):
            check_precision(proof, asked, onnx_layers)


# --- the builder ---


@pytest.fixture(scope="session")
def faces() -> np.ndarray:
    return synthetic_faces(12)


def ask(tmp_path: Path, precision: str, version: str, **options: Any) -> tuple[Any, PlanSpec, PlanSource]:
    typed = read_typed_onnx(write_tiny(tmp_path / "onnx" / f"{precision}.onnx", precision))
    serving = write_tiny(tmp_path / "onnx" / "fp32.onnx")
    spec = PlanSpec("tiny", typed.sha256, precision, "8.6", version, 1, 4, 8, BuilderOptions(**options))
    return typed, spec, PlanSource("tiny", typed.path, serving, "c" * 64)


LOOSE = {"fp32": 1e-5, "fp16": 1e-3, "int8": 0.2}  # three layers of noise are coarser than a network


def build(
    tmp_path: Path, faces: np.ndarray, precision: str = "fp16", version: str = "10.3.0", **more: Any
) -> PlanManifest:
    typed, spec, source = ask(tmp_path, precision, version, **more.pop("options", {}))
    proof = PlanProof(faces, source.embed(faces), LOOSE)
    return build_plan(typed, spec, tmp_path / "out" / spec.file_name, proof, contract_id="c" * 64, **more)


def left(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    ("precision", "version", "flags"),
    [("fp32", "8.6.0", []), ("fp16", "8.6.0", ["FP16", "PREFER_PRECISION_CONSTRAINTS"]), ("int8", "8.6.0", ["INT8"]),
     ("fp16", "10.3.0", []), ("int8", "11.0.0", [])],
)  # fmt: skip
def test_a_plan_is_built_proved_and_described_with_flags_on_8_6_and_by_its_onnx_from_10_on(
    fake_host: Callable[..., None], tmp_path: Path, faces: np.ndarray, precision: str, version: str, flags: list[str]
) -> None:
    fake_host(version)
    phases: list[str] = []
    timing = tmp_path / "timing"
    manifest = build(
        tmp_path, faces, precision, version, timing_caches=timing, on_phase=lambda name, *_: phases.append(name)
    )
    assert left(tmp_path) == [f"tiny-{precision}-sm86.plan"]
    check_content(tmp_path / "out" / manifest.spec.file_name, manifest, "here")
    assert manifest.precision_proof["compute"] == dict(read_typed_onnx(tmp_path / "onnx" / f"{precision}.onnx").layers)
    assert manifest.drift["faces"] == 12
    assert manifest.drift["max_drift"] <= LOOSE[precision]
    assert manifest.gpu == {"name": "NVIDIA A10", "driver": "550.54.15", "cuda": "12.4", "memory_bytes": 23028 << 20}
    assert (manifest.dim, manifest.contract_id) == (DIM, "c" * 64)
    assert manifest.build["seconds"] >= 0
    assert ("Building" in phases) == (version != "8.6.0")  # 8.6 reports no progress
    assert {"parsing and building", "proving the precision", "measuring drift"} <= set(phases)
    assert timing_cache_path(timing, version, "NVIDIA A10").read_bytes() == b"timings"
    plan = pickle.loads((tmp_path / "out" / manifest.spec.file_name).read_bytes())  # what the builder was told
    assert sorted(plan["flags"]) == flags  # and TF32 off
    assert plan["typed"] == (version != "8.6.0")
    assert bool(plan["pins"]) == (version == "8.6.0" and precision == "fp16")
    assert plan["profile"] == {"face": ((1, 112, 112, 3), (4, 112, 112, 3), (8, 112, 112, 3))}


def test_int8_with_fp16_is_built_as_it_is_from_10_on_and_with_both_flags_on_8_6(
    fake_host: Callable[..., None], tmp_path: Path, faces: np.ndarray
) -> None:
    typed = read_typed_onnx(write_tiny(tmp_path / "onnx" / "int8.onnx", "int8+fp16"))
    assert (typed.precision, typed.opset) == ("int8", 19)
    reference = PlanSource("tiny", typed.path, write_tiny(tmp_path / "fp32.onnx"), None).embed(faces)
    built = {}
    for version in ("8.6.0", "10.3.0"):
        fake_host(version)
        spec = PlanSpec("tiny", typed.sha256, "int8", "8.6", version, 1, 4, 8)
        target = tmp_path / version / spec.file_name
        build_plan(typed, spec, target, PlanProof(faces, reference, LOOSE))
        built[version] = pickle.loads(target.read_bytes())
    assert sorted(built["8.6.0"]["flags"]) == ["FP16", "INT8", "PREFER_PRECISION_CONSTRAINTS"]
    assert built["8.6.0"]["pins"]["norm"] == "FLOAT"
    assert "conv" not in built["8.6.0"]["pins"]  # its Q/DQ nodes say it
    assert built["10.3.0"]["flags"] == []
    opsets = {version: onnx.load_from_string(plan["onnx"]).opset_import[0].version for version, plan in built.items()}
    assert opsets == {"8.6.0": 17, "10.3.0": 19}


def test_builder_options_reach_the_builder(fake_host: Callable[..., None], tmp_path: Path, faces: np.ndarray) -> None:
    fake_host("8.6.0")
    options = {"workspace_bytes": 256 << 20, "external_tactics": False, "tf32": True, "hardware_compatible": True}
    manifest = build(tmp_path, faces, "fp32", "8.6.0", options=options)
    plan = pickle.loads((tmp_path / "out" / manifest.spec.file_name).read_bytes())
    assert plan["workspace"] == 256 << 20
    assert plan["sources"] == 0b11000  # edge mask and JIT convolutions need no library of their own
    assert plan["flags"] == ["TF32"]


def test_a_plan_for_all_cards_of_an_sm_is_asked_of_the_builder(
    fake_host: Callable[..., None], tmp_path: Path, faces: np.ndarray
) -> None:
    fake_host("10.9.0")
    manifest = build(tmp_path, faces, "fp32", "10.9.0", options={"same_compute_capability": True})
    plan = pickle.loads((tmp_path / "out" / manifest.spec.file_name).read_bytes())
    assert plan["level"] == "SAME_COMPUTE_CAPABILITY"


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [("driver", Missing, r"^TensorRT cannot run here: RuntimeError: CUDA finds no GPU \(error 35, 0 GPUs\)"),
     ("crash", PlanRefused, r"^TensorRT crashed \(SIGABRT\)"),
     ("oom", Missing, r"^the GPU ran out of memory: .*OutOfMemory.*--workspace 512MB"),
     ("error", PlanRefused, r"^TensorRT built no plan: .*no kernel for Conv_7"),
     ("fp32", PlanRefused, r"^the plan should be fp16 but has 2 fp32"),
     ("drift", ProofFailed, r"^the fp16 plan is refused: drift .* × the limit 0\.001 for fp16")],
)  # fmt: skip
def test_a_build_that_fails_is_named_and_leaves_nothing_behind(
    fake_host: Callable[..., None],
    tmp_path: Path,
    faces: np.ndarray,
    fault: str,
    error: type[ArcFaceError],
    message: str,
) -> None:
    fake_host(fault=fault)
    with pytest.raises(error, match=message):
        build(tmp_path, faces, timing_caches=tmp_path / "timing")
    assert left(tmp_path) == []
    assert not (tmp_path / "timing").exists()


def test_a_plan_that_fails_its_proof_is_kept_beside_its_report_where_asked(
    fake_host: Callable[..., None], tmp_path: Path, faces: np.ndarray
) -> None:
    fake_host(fault="drift")
    with pytest.raises(ProofFailed, match=r"It is kept, with its report: .*tiny-fp16-sm86\.plan\.refused"):
        build(tmp_path, faces, refused=tmp_path / "refused")
    assert left(tmp_path) == []
    assert sorted(p.name for p in (tmp_path / "refused").iterdir()) == [
        "tiny-fp16-sm86.plan.inspector.json", "tiny-fp16-sm86.plan.json.refused", "tiny-fp16-sm86.plan.log",
        "tiny-fp16-sm86.plan.refused"]  # fmt: skip
    assert json.loads((tmp_path / "refused" / "tiny-fp16-sm86.plan.inspector.json").read_text())["Layers"]
    report = json.loads((tmp_path / "refused" / "tiny-fp16-sm86.plan.json.refused").read_text())
    assert report["why"].startswith("the fp16 plan is refused: drift")
    assert report["precision_proof"]["compute"] == {"fp16": 2}


def test_the_log_of_a_build_that_failed_is_kept_where_asked(
    fake_host: Callable[..., None], tmp_path: Path, faces: np.ndarray
) -> None:
    fake_host(fault="error")
    with pytest.raises(PlanRefused, match=r"Full log: .*refused/tiny-fp16-sm86\.plan\.log$"):
        build(tmp_path, faces, refused=tmp_path / "refused")
    assert "no kernel for Conv_7" in (tmp_path / "refused" / "tiny-fp16-sm86.plan.log").read_text()
    assert left(tmp_path) == []


def test_a_build_that_takes_too_long_is_stopped(
    fake_host: Callable[..., None], tmp_path: Path, faces: np.ndarray
) -> None:
    fake_host(fault="slow")
    with pytest.raises(PlanRefused, match="took longer than 3 s and was stopped"):
        build(tmp_path, faces, timeout_s=3)
    assert left(tmp_path) == []


def test_a_child_that_was_killed_or_never_started_is_told_apart() -> None:
    assert isinstance(child_error(-signal.SIGKILL, "", ""), Missing)
    assert "was killed" in str(child_error(-signal.SIGKILL, "", ""))
    assert "SIGSEGV" in str(child_error(-signal.SIGSEGV, "", "[E] 3: bad thing\n"))
    warned = "[W] TensorRT was linked against cuDNN 8.9\n[W] CUDA initialization failure with error: 35\n"
    assert "built no plan: [W] CUDA initialization failure with error: 35" in str(child_error(1, "TypeError", warned))
    missing = child_error(3, "ImportError: libcudart.so.12", "")
    assert isinstance(missing, Missing)
    assert "libcudart.so.12" in str(missing)


def test_without_tensorrt_the_child_says_what_is_missing(
    fake_host: Callable[..., None], tmp_path: Path, faces: np.ndarray
) -> None:
    fake_host()
    (tmp_path / "host" / "tensorrt.py").write_text(
        "raise ImportError('libnvinfer.so.10: cannot open shared object file')"
    )
    with pytest.raises(Missing, match=r"TensorRT cannot run here: ImportError: libnvinfer\.so\.10"):
        build(tmp_path, faces)
    assert left(tmp_path) == []


# --- the command ---


def test_a_plan_set_is_proved_on_each_of_its_profiles_and_says_what_each_takes(
    fake_host: Callable[..., None], tmp_path: Path, faces: np.ndarray
) -> None:
    fake_host()
    typed, spec, source = ask(tmp_path, "fp16", "10.3.0")
    spec, target = replace(spec, tuned_batches=(3, 1)), tmp_path / "out" / spec.file_name
    proof = PlanProof(faces, source.embed(faces), LOOSE)
    manifest = build_plan(typed, spec, target, proof, logs=tmp_path / "logs")
    profiles = [[shape[0] for shape in one["face"]] for one in pickle.loads(target.read_bytes())["profiles"]]
    assert profiles == [[1, 4, 8], [1, 3, 3], [1, 1, 1]]
    assert manifest.build["memory"] == {"loaded_bytes": 0, "context_bytes": [8_000_000, 3_000_000, 1_000_000]}
    assert sorted(file.name for file in (tmp_path / "logs").iterdir()) == [
        f"{spec.file_name}.inspector.json", f"{spec.file_name}.log",
    ]  # fmt: skip
    fake_host(fault="drift_small")
    with pytest.raises(ProofFailed, match="the fp16 plan is refused"):
        build_plan(typed, spec, target, proof)
    build_plan(typed, replace(spec, tuned_batches=()), target, proof)  # the first profile alone is right


@pytest.mark.parametrize("version", ["8.6.0", "10.3.0", "11.0.0"])
def test_every_version_tells_what_a_context_takes(
    fake_host: Callable[..., None], tmp_path: Path, faces: np.ndarray, version: str
) -> None:
    fake_host(version)
    assert build(tmp_path, faces, "fp16", version).build["memory"]["context_bytes"] == [8_000_000]


@pytest.fixture
def plan_build(
    fake_host: Callable[..., None], tmp_path: Path
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """plan_build(*arguments): `arcface plan build tiny …` in a process of its own, in a folder with models/tiny."""
    fake_host()
    folder = tmp_path / "models" / "tiny"
    write_tiny(folder / "serving.onnx")
    write_tiny(folder / "variants" / "fp16-tensorrt.onnx", "fp16")
    write_manifest(folder, "5" * 64, Preprocessing(), DIM)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from arcface_build.cli import main; main()", "plan", "build", *arguments]
        path = os.pathsep.join(filter(None, sys.path))
        places = {"ARCFACE_STORAGE__PLANS": str(tmp_path / "cache"), "ARCFACE_PLAN_STORE": str(tmp_path / "store")}
        environment = {**os.environ, "PYTHONPATH": path, **places}
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)

    yield run


def test_plan_build_builds_once_then_finds_it(plan_build: Callable[..., Any], tmp_path: Path) -> None:
    first = plan_build("tiny", "--precision", "fp16", "--max-batch", "8", "--workspace", "512MB", "--push", "--json")
    assert first.returncode == 0, first.stderr
    said = json.loads(first.stdout)
    contract = contract_id("5" * 64, Preprocessing(), DIM)
    assert (said["source"], said["file"], said["contract_id"]) == ("build", "tiny-fp16-sm86.plan", contract)
    assert said["spec"]["opt_batch"] == 8
    assert said["spec"]["options"]["workspace_bytes"] == 512 << 20
    shutil.rmtree(tmp_path / "cache")
    again = plan_build("tiny", "--precision", "fp16", "--max-batch", "8", "--workspace", "0.5GB", "--json")
    assert json.loads(again.stdout)["source"] == "store"
    arguments = ["tiny", "--precision", "fp16", "--max-batch", "8", "--workspace", "512MB", "--output", "plans"]
    assert "from the cache: plans/tiny-fp16-sm86.plan" in plan_build(*arguments).stdout
    assert (tmp_path / "plans" / "tiny-fp16-sm86.plan.json").is_file()
    forced = plan_build("tiny", "--precision", "fp16", "--max-batch", "8", "--workspace", "512MB", "--force")
    assert "built: " in forced.stdout


def test_profiles_make_a_plan_set_with_the_largest_of_them_in_the_middle(plan_build: Callable[..., Any]) -> None:
    done = plan_build("tiny", "--precision", "fp16", "--profiles", "1,8,64", "--json")
    spec = json.loads(done.stdout)["spec"]
    assert (spec["min_batch"], spec["opt_batch"], spec["max_batch"], spec["tuned_batches"]) == (1, 64, 64, [8, 1])
    other = plan_build("tiny", "--precision", "fp16", "--profiles", "8,1", "--opt-batch", "64", "--json")
    assert json.loads(other.stdout)["key"] == json.loads(done.stdout)["key"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [(["tiny", "--profiles", "1,1"], 2, "is not a list of different batch sizes such as 1,8,64"),
     (["tiny", "--profiles", "1,many"], 2, "is not a list of different batch sizes such as 1,8,64"),
     (["tiny", "--precision", "fp16", "--profiles", "1,64", "--max-batch", "8"], 2, "expected 1 ≤ min ≤ opt ≤ max"),
     (["absent"], 3, "no imported model in"),
     (["tiny", "--precision", "int8"], 3, "arcface quantize tiny --precision int8"),
     (["tiny", "--precision", "fp32", "--sm", "9.0"], 2, "of SM 8.6, expected SM 9.0"),
     (["tiny", "--precision", "fp32", "--min-batch", "9", "--max-batch", "8"], 2, "expected 1 ≤ min ≤ opt ≤ max"),
     (["tiny", "--precision", "fp32", "--workspace", "lots"], 2, "such as 2GB or 2048MB"),
     (["absent.onnx"], 3, "no ONNX file at absent.onnx"),
     (["models/tiny/variants/fp16-tensorrt.onnx", "--precision", "fp16"], 2, "add --reference SERVING.onnx"),
     (["models/tiny/serving.onnx", "--precision", "fp16", "--reference", "models/tiny/serving.onnx"], 2, "in fp32")],
)  # fmt: skip
def test_plan_build_refuses_before_it_builds(
    plan_build: Callable[..., Any], arguments: list[str], code: int, message: str
) -> None:
    done = plan_build(*arguments)
    assert done.returncode == code
    assert message in done.stderr


def test_ctrl_c_stops_the_child_and_leaves_nothing(
    plan_build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TRT_FAULT", "slow")
    code = "from arcface_build.cli import main; main()"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "ARCFACE_STORAGE__PLANS": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-c", code, "plan", "build", "tiny", "--precision", "fp16"]
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + HANG_S
    while not list((tmp_path / "cache").rglob("request.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1].strip() == "interrupted"
    assert process.returncode == 130
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"] == []


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_real_tensorrt_builds_what_was_asked(tmp_path: Path, faces: np.ndarray, precision: str) -> None:
    from arcface_build.plans.build import tensorrt_version
    from arcface_build.plans.gpu import find_gpus

    typed, spec, source = ask(tmp_path, precision, tensorrt_version())
    spec = type(spec)(**{**spec.to_json(), "sm": find_gpus()[0].sm, "options": BuilderOptions(external_tactics=False)})
    proof = PlanProof(faces, source.embed(faces), LOOSE)
    manifest = build_plan(typed, spec, tmp_path / "out" / spec.file_name, proof)
    assert manifest.precision_proof["compute"].get(precision)
    assert left(tmp_path) == [spec.file_name]
