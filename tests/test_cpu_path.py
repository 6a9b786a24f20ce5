"""The CPU fast path: the rule as a table, and sessions that run where they were asked to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from arcface_build.variants.choose import choose, speeds_file
from arcface_clients.engines.runtimes import RUNTIMES, cpu_flags, has_openvino, open_session
from arcface_clients.errors import WrongUse

SAPPHIRE = frozenset({"avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"})
CASCADE = frozenset({"avx512_vnni"})
HASWELL = frozenset({"avx2"})


def model_dir(folder: Path, **drifts: dict[str, float]) -> Path:
    """A model folder with sidecars; drifts: precision → runtime → drift, above 1 meaning refused there."""
    (folder / "variants").mkdir()
    (folder / "serving.onnx").touch()
    (folder / "variants" / "int8-cpu.onnx").touch()
    for precision, by_runtime in drifts.items():
        gates = [
            {"runtime": r, "passed": d < 1, "limit": 0.01, "drift": {"max_drift": d}, "judged_on": "held back"}
            for r, d in by_runtime.items()
        ]
        file = "serving.onnx" if precision == "bf16" else "variants/int8-cpu.onnx"
        sidecar = {"format": 1, "file": file, "gates": gates, "precision": precision, "passed": True}
        (folder / "variants" / f"{precision}-cpu.json").write_text(json.dumps(sidecar))
    return folder


BOTH = {"int8": {"openvino-bf16": 0.009, "openvino-fp32": 0.008}, "bf16": {"openvino-bf16": 0.0008}}


@pytest.mark.parametrize(
    ("variants", "flags", "openvino", "limits", "precision", "runtime", "reason"),
    [
        (BOTH, SAPPHIRE, True, None, "int8", "openvino-bf16", "int8 passed its gate (drift 0.009)"),
        (BOTH, CASCADE, True, None, "int8", "openvino-fp32", "int8 passed its gate (drift 0.008)"),
        (
            BOTH,
            SAPPHIRE,
            True,
            {"int8": 0.001, "bf16": 0.001},
            "bf16",
            "openvino-bf16",
            "not int8: drift 0.009, 9.0 × the limit 0.001 for int8",
        ),
        (
            BOTH,
            CASCADE,
            True,
            {"int8": 0.001, "bf16": 0.001},
            "fp32",
            "openvino-fp32",
            "not bf16: bf16 needs OpenVINO and a CPU",
        ),
        (BOTH, HASWELL, True, None, "fp32", "openvino-fp32", "not int8: no 8-bit dot product"),
        (
            BOTH,
            SAPPHIRE,
            False,
            None,
            "fp32",
            "onnxruntime",
            "passed its gate in openvino-bf16, openvino-fp32, but this host has onnxruntime",
        ),
        ({}, SAPPHIRE, True, None, "fp32", "openvino-fp32", "not int8: none that passed its gate"),
        (
            {"int8": {"openvino-bf16": 2.0, "openvino-fp32": 0.008}},
            SAPPHIRE,
            True,
            None,
            "int8",
            "openvino-fp32",
            "int8 passed its gate (drift 0.008)",
        ),
        ({"int8": {"onnxruntime": 0.008}}, SAPPHIRE, False, None, "fp32", "onnxruntime", "no gain was measured here"),
        (
            {"int8": {"openvino-bf16": 0.009}},
            CASCADE,
            True,
            None,
            "fp32",
            "openvino-fp32",
            "not int8: int8 passed its gate in openvino-bf16, but this",
        ),
    ],
)
def test_fastest_variant_that_passed_and_that_this_cpu_has(
    tmp_path, variants, flags, openvino, limits, precision, runtime, reason
):
    choice = choose(model_dir(tmp_path, **variants), limits, flags, openvino)
    assert (choice.precision, choice.runtime) == (precision, runtime)
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("cpu", "ratio", "precision", "reason"),
    [
        (
            "mine",
            {"int8": 1.8, "bf16": 2.2, "fp32": 1.1},
            "bf16",
            "2.20 × ONNX Runtime fp32; not int8: measured slower",
        ),
        ("mine", {"int8": 2.9, "bf16": 2.2, "fp32": 1.1}, "int8", "measured here: 2.90 ×"),
        ("mine", {"int8": 0.4, "bf16": 0.5, "fp32": 1.1}, "fp32", "not int8: measured slower here; not bf16: measured"),
        ("mine", {"int8": 1.8, "fp32": 1.1}, "int8", "int8 passed its gate"),  # bf16 was made later
        ("another", {"int8": 1.8, "bf16": 2.2, "fp32": 1.1}, "int8", "int8 passed its gate"),
    ],
)
def test_what_was_measured_on_this_cpu_decides(tmp_path, cpu, ratio, precision, reason):
    folder = model_dir(tmp_path, **BOTH)
    speeds_file(folder).write_text(json.dumps({"cpu": "mine", "batch": 8, "ratio": ratio}))
    choice = choose(folder, None, SAPPHIRE, True, "mine" if cpu == "mine" else "another")
    assert choice.precision == precision
    assert reason in choice.reason


def test_sidecar_whose_file_is_gone_names_the_command(tmp_path):
    folder = model_dir(tmp_path, **BOTH)
    (folder / "variants" / "int8-cpu.onnx").unlink()
    with pytest.raises(WrongUse, match=r"names variants/int8-cpu.onnx, which is gone. Make it again: arcface quantize"):
        choose(folder, None, SAPPHIRE, True)


def test_choice_writes_the_field_that_triton_knows(tmp_path):
    text = choose(model_dir(tmp_path, **BOTH), None, SAPPHIRE, True).accelerator_pbtxt()
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
