"""Which variant is served follows from the server that will run it: its providers, and the kind of its instances."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import sys

import onnx
import pytest

from arcface_build.repository.assemble import GPU_FILE, assemble
from arcface_build.serving.binary import TritonBinary, find_tritonserver
from arcface_build.serving.server_runtimes import _ONNX, ServerRuntimes, loads_openvino, runtimes_of_server
from arcface_build.serving.variant import take_best_variant
from arcface_build.variants.speeds import Speed, SpeedTable
from arcface_clients.engines.runtimes import cpu_flags, cpu_runtimes, has_openvino
from arcface_clients.evidence.drift import DRIFT_LIMITS
from conftest import REPO, copy_repository
from test_assemble import judged
from tiny_model import write_model


@pytest.fixture
def on_path(triton_binary, tmp_path, monkeypatch):
    """on_path(model.py of its onnxruntime backend): a tritonserver on PATH with backends of its own."""

    def put(backend: str) -> TritonBinary:
        shutil.copytree(triton_binary.backend_directory / "python", tmp_path / "native" / "python")
        (tmp_path / "native" / "onnxruntime").mkdir()
        (tmp_path / "native" / "onnxruntime" / "model.py").write_text(backend)
        exports = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in triton_binary.environment.items())
        program = tmp_path / "bin" / "tritonserver"
        program.parent.mkdir()
        line = f'exec {triton_binary.path} --backend-directory {tmp_path / "native"} "$@"\n'
        program.write_text(f"#!/bin/sh\n{exports}{line}")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        found = find_tritonserver()
        assert found.path == program and found.backend_directory is None
        return found

    return put


OURS = (REPO / "backends" / "onnxruntime" / "model.py").read_text()
WITHOUT = OURS.replace('"openvino": "OpenVINOExecutionProvider",', "")


def test_the_probe_is_a_model():
    onnx.checker.check_model(onnx.load_from_string(base64.b64decode(_ONNX)))


def test_a_server_whose_backend_has_no_openvino_is_known_by_its_refusal(on_path):
    assert runtimes_of_server(on_path(WITHOUT), pytest.fail) == ServerRuntimes(("onnxruntime",), told_precision=False)


def test_a_server_whose_backend_has_openvino_is_known_by_loading_a_model_with_it(on_path):
    if not has_openvino():
        pytest.skip("this ONNX Runtime has no OpenVINO (onnxruntime-openvino has it)")
    assert loads_openvino(on_path(OURS))


def test_the_wheels_server_has_what_this_environment_has(triton_binary):
    if triton_binary.backend_directory is None:
        pytest.skip("a tritonserver of its own is on PATH")
    assert runtimes_of_server(triton_binary, pytest.fail) == ServerRuntimes(cpu_runtimes(cpu_flags(), has_openvino()))


def bf16_twice_as_fast(model_dir, found, *_):
    rates = {"fp32": (10.0,), "bf16": (20.0,)}
    return SpeedTable(4, tuple(Speed(*one.key, rates[one.precision], rates[one.precision], 0.0) for one in found))


@pytest.mark.parametrize(
    ("server", "precision"),
    [
        (ServerRuntimes(("openvino-bf16", "openvino-fp32", "onnxruntime")), "bf16"),
        (ServerRuntimes(("openvino-bf16", "openvino-fp32", "onnxruntime"), told_precision=False), "fp32"),
        (ServerRuntimes(("onnxruntime",)), "fp32"),
    ],
)
def test_bf16_is_chosen_and_claimed_only_where_the_server_computes_it(tmp_path, monkeypatch, server, precision):
    monkeypatch.setattr("arcface_build.variants.choose.measure", bf16_twice_as_fast)
    folder = write_model(tmp_path / "models" / "tiny")
    (folder / "variants").mkdir()
    sidecar = {**judged("bf16", 8e-4), "file": "serving.onnx"}
    (folder / "variants" / "bf16-cpu.json").write_text(json.dumps(sidecar))
    repository = copy_repository(tmp_path)
    assemble(folder, repository)
    said = take_best_variant(repository, folder.parent, 3, DRIFT_LIMITS, lambda: server)
    assert said.startswith(precision), said
    overlay = (repository / "arcface_onnx" / "configs" / "onnx.pbtxt").read_text()
    assert f'key: "precision" value: {{ string_value: "{precision}" }}' in overlay


REFUSAL = "failed to load 'arcface_probe' version 1: Invalid argument: unknown Execution Accelerator 'openvino'"


@pytest.mark.parametrize(
    ("says", "known"),
    [
        (f"E1122 04:00:00.0 1 model_lifecycle.cc:654] {REFUSAL} is requested", True),
        ("error: creating server: Internal - failed to bind to 127.0.0.1:8001", False),
        ("failed to load 'arcface_probe' version 1: Internal: no space left on device", False),
    ],
    ids=["a refusal of OpenVINO", "a port that was taken", "a full disk"],
)
def test_a_trial_that_says_nothing_about_openvino_is_told_and_tried_again(tmp_path, says, known):
    program, starts = tmp_path / "tritonserver", tmp_path / "starts"
    program.write_text(f'#!/bin/sh\necho start >>{starts}\ncat <<"END"\n{says}\nEND\nexit 1\n')
    program.chmod(0o755)
    warnings = []
    for times in (1, 2):
        found = runtimes_of_server(TritonBinary(program), warnings.append)
        assert found == ServerRuntimes(("onnxruntime",), told_precision=False)
        assert len(warnings) == (0 if known else times)
        assert len(starts.read_text().split()) == (1 if known else times)
    assert all("whether this tritonserver has OpenVINO is not known" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("kind", "sm", "file"),
    [("CPU", "8.6", "model.onnx"), ("GPU", "8.6", GPU_FILE), ("GPU", "9.9", "model.onnx"), ("GPU", "", "model.onnx")],
)
def test_the_serving_host_takes_the_form_for_its_kind(monkeypatch, kind, sm, file):
    backend = _backend(monkeypatch)
    monkeypatch.setattr(backend, "_sm", lambda device: sm)
    config = {"default_model_filename": "model.onnx", "cc_model_filenames": {"8.6": GPU_FILE, "9.0": GPU_FILE}}
    assert backend._file_name(config, kind, 0) == file
    assert backend._file_name({"default_model_filename": "other.onnx"}, kind, 0) == "other.onnx"


@pytest.mark.parametrize(
    ("level", "name"),
    [(-1, "ORT_ENABLE_BASIC"), (0, "ORT_ENABLE_ALL"), (1, "ORT_ENABLE_EXTENDED"), (2, "ORT_DISABLE_ALL")],
)
def test_graph_levels_mean_what_they_mean_natively(monkeypatch, level, name):
    import onnxruntime

    backend = _backend(monkeypatch)
    options = backend._session_options({"optimization": {"graph": {"level": level}}}, 1)
    assert options.graph_optimization_level == getattr(onnxruntime.GraphOptimizationLevel, name)


def _backend(monkeypatch: pytest.MonkeyPatch):
    """The stand-in as a module; what only its stub has is not called."""
    import importlib.util
    import types

    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))
    path = REPO / "backends" / "onnxruntime" / "model.py"
    spec = importlib.util.spec_from_file_location("stand_in", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
