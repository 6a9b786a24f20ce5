"""What a CPU could serve: the rule as a table, and sessions that run where they were asked to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from arcface_build.variants.candidates import candidates
from arcface_build.variants.choose import Wanted, choose
from arcface_clients.engines.runtimes import RUNTIMES, cpu_flags, cpu_runtimes, has_openvino, open_session
from arcface_clients.errors import GateFailed, WrongUse
from tiny_model import write_model

SAPPHIRE = frozenset({"avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"})
CASCADE = frozenset({"avx512_vnni"})
HASWELL = frozenset({"avx2"})
ORT, FP32, BF16 = "onnxruntime", "openvino-fp32", "openvino-bf16"


def model_dir(folder: Path, **drifts: dict[str, float]) -> Path:
    """A model folder with sidecars; drifts: precision → runtime → drift, above 1 meaning refused there."""
    made = write_model(folder / "models" / "tiny")
    (made / "variants").mkdir()
    for precision, by_runtime in drifts.items():
        gates = [
            {"runtime": r, "passed": d < 1, "limit": 0.01, "drift": {"max_drift": d}, "judged_on": "held back"}
            for r, d in by_runtime.items()
        ]
        file = "serving.onnx" if precision == "bf16" else "variants/int8-cpu.onnx"
        if precision == "int8":
            shutil.copyfile(made / "serving.onnx", made / file)
        sidecar = {"format": 1, "file": file, "gates": gates, "precision": precision, "passed": True}
        (made / "variants" / f"{precision}-cpu.json").write_text(json.dumps(sidecar))
    return made


BOTH = {"int8": {BF16: 0.009, FP32: 0.008}, "bf16": {BF16: 0.0008}}
EXACT = [("fp32", ORT), ("fp32", FP32)]
STRICT = {"int8": 0.001, "bf16": 0.001}


@pytest.mark.parametrize(
    ("variants", "flags", "openvino", "limits", "expected", "why_not"),
    [
        (BOTH, SAPPHIRE, True, None, [*EXACT, ("bf16", BF16), ("int8", BF16), ("int8", FP32)], ""),
        (BOTH, CASCADE, True, None, [*EXACT, ("int8", FP32)], "bf16 needs OpenVINO and a CPU with"),
        (BOTH, HASWELL, True, None, [*EXACT, ("int8", FP32)], "bf16 needs OpenVINO and a CPU with"),
        (BOTH, SAPPHIRE, True, STRICT, [*EXACT, ("bf16", BF16)], "drift 0.009, 9.0 × the limit 0.001 for int8"),
        (BOTH, CASCADE, True, STRICT, EXACT, "drift 0.008, 8.0 × the limit 0.001 for int8"),
        (BOTH, SAPPHIRE, False, None, EXACT[:1], "in openvino-bf16, openvino-fp32, but this host has onnxruntime"),
        ({}, SAPPHIRE, True, None, EXACT, "none that passed its gate (arcface quantize tiny makes one)"),
        ({"int8": {BF16: 2.0, FP32: 0.008}}, SAPPHIRE, True, None, [*EXACT, ("int8", FP32)], ""),
        ({"int8": {ORT: 0.008}}, SAPPHIRE, False, None, [("fp32", ORT), ("int8", ORT)], ""),
        ({"int8": {BF16: 0.009}}, CASCADE, True, None, EXACT, "int8 passed its gate in openvino-bf16, but this"),
    ],
)
def test_what_passed_its_gate_competes_in_every_runtime_that_can_compute_it(
    tmp_path, variants, flags, openvino, limits, expected, why_not
):
    found, reasons = candidates(model_dir(tmp_path, **variants), limits, cpu_runtimes(flags, openvino))
    assert [(one.precision, one.runtime) for one in found] == expected
    assert why_not in " ".join(reasons.values())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (SAPPHIRE, [("fp32", ORT), ("int8", BF16)]),  # OpenVINO takes bf16 by itself: fp32 in it would be none
        (HASWELL, [("fp32", ORT), ("fp32", FP32), ("int8", FP32)]),
    ],
)
def test_an_openvino_that_is_not_told_a_precision_is_one_runtime(tmp_path, flags, expected):
    found, _ = candidates(model_dir(tmp_path, **BOTH), None, cpu_runtimes(flags, True), told_precision=False)
    assert [(one.precision, one.runtime) for one in found] == expected


def gone(folder):
    (folder / "variants" / "int8-cpu.onnx").unlink()
    return "names variants/int8-cpu.onnx, which is gone. Make it again: arcface quantize tiny --precision int8"


def cut_off(folder):
    (folder / "variants" / "int8-cpu.json").write_text('{"format": 1, "fi')
    return "int8-cpu.json is not JSON"


@pytest.mark.parametrize("damage", [gone, cut_off])
def test_a_damaged_variant_is_named_with_the_command_and_keeps_nothing_else_from_being_served(tmp_path, damage):
    folder = model_dir(tmp_path, int8={ORT: 0.008})
    told = damage(folder)
    choice = choose(folder, None, (ORT,))
    assert (choice.precision, choice.runtime) == ("fp32", ORT) and told in choice.reason
    with pytest.raises(GateFailed, match=f"int8 of tiny is not served: .*{told}"):
        choose(folder, None, (ORT,), wanted=Wanted(precision="int8"))


@pytest.mark.parametrize("digest", [{"sha256": "5" * 64}, {}])
def test_a_form_that_was_deleted_takes_no_part_and_is_named(tmp_path, digest):
    folder = model_dir(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["winograd"] = {"file": "serving_winograd.onnx", **digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found, why_not = candidates(folder, None, (FP32, ORT))
    assert [one.name for one in found] == ["fp32 in onnxruntime", "fp32 in openvino-fp32"]
    expected = "serving_winograd.onnx is gone. Import the model again: arcface import SOURCE"
    assert [why_not[f"fp32 by Winograd in {runtime}"] for runtime in (ORT, FP32)] == [expected] * 2


def test_without_its_serving_onnx_nothing_of_a_model_is_chosen_and_that_is_said(tmp_path):
    folder = model_dir(tmp_path)
    (folder / "serving.onnx").unlink()
    with pytest.raises(GateFailed, match=r"tiny is not served: fp32 in onnxruntime: serving\.onnx is gone\. Import"):
        choose(folder, None, (ORT,))
    with pytest.raises(GateFailed, match=r"fp32 of tiny is not served: serving\.onnx is gone"):
        choose(folder, None, (ORT,), wanted=Wanted(precision="fp32"))


def test_choice_writes_the_field_that_triton_knows(tmp_path):
    here = cpu_runtimes(SAPPHIRE, True)
    text = choose(model_dir(tmp_path, **BOTH), None, here, wanted=Wanted(precision="int8")).accelerator_pbtxt()
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    (accelerator,) = config.optimization.execution_accelerators.cpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("openvino", {"precision": "bf16"})


def test_flags_are_read_as_the_kernel_writes_them(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx512_bf16 amx_int8\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert cpu_flags(cpuinfo) == {"fpu", "avx512_bf16", "amx_int8"}
    assert cpu_flags(tmp_path / "none") == frozenset()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_session_runs_in_the_runtime_that_was_asked_for(runtime):
    if runtime != "onnxruntime" and not has_openvino():
        pytest.skip("ONNX Runtime without OpenVINO")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", values[:1], values[1:])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = open_session(model, runtime, threads=1)
    assert session.get_providers()[0].startswith("OpenVINO") == runtime.startswith("openvino")
    assert session.run(None, {"x": np.float32([[-1, 0, 1, 2]])})[0].tolist() == [[0, 0, 1, 2]]


def test_unknown_runtime_lists_those_that_exist():
    with pytest.raises(WrongUse, match="no runtime 'ncnn': expected one of onnxruntime, openvino-fp32, openvino-bf16"):
        open_session(b"", "ncnn")
