"""scripts/gpu-check: its report names what it measured and what it did not; on a host without a GPU it says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from arcface_tools.gpu_check.contestants import find_torch_python, torch_baseline
from onnx import helper

from arcface_build.bench.torch_export import export_graph
from arcface_clients.contract import Preprocessing
from arcface_clients.engines.runtimes import open_session
from arcface_clients.errors import Missing
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_tools.gpu_check.clocks import parse_reading
from arcface_tools.gpu_check.report import to_markdown
from tiny_model import write_manifest
from tiny_onnx import DIM, tiny_onnx, write_tiny

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """models/tiny as import and quantize leave it."""
    folder = tmp_path / "models" / "tiny"
    write_tiny(folder / "serving.onnx")
    for precision in ("fp16", "int8"):
        write_tiny(folder / "variants" / f"{precision}-tensorrt.onnx", precision)
    write_manifest(folder, "5" * 64, Preprocessing(), DIM)
    return folder.parent


SMI = """#!/bin/sh
echo "$@" >> "$0.calls"
case "$*" in
  *-lms*) while :; do echo "1410, 1215, 250.5, 61, 1024, 97"; echo "[N/A], 0, 0, 0, 0, 0"; sleep 0.05; done ;;
  --query*) echo "0, NVIDIA A10, 8.6, 550.54.15, 23028, 312" ;;
  *) echo "CUDA Version: 12.4" ;;
esac
"""


def command(models: Path, *arguments: str) -> list[str]:
    line = [sys.executable, "-m", "arcface_tools.gpu_check.run", "--models", "tiny", "--models-dir", str(models)]
    return [*line, "--out", "out", "--sample-s", "0.01", "--batches", "1", "3", *arguments]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}


def written(models: Path) -> dict[str, Any]:
    return json.loads((models.parent / "out" / "a10.json").read_text())


def check(models: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The report and its Markdown of a run in a process of its own, in a folder without a model repository."""
    line = command(models, *arguments)
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), cwd=models.parent, check=False)
    assert done.returncode == 0, done.stderr
    return written(models), (models.parent / "out" / "a10.md").read_text()


def test_a_run_measures_every_precision_and_names_its_gaps(
    fake_host: Callable[..., None], models: Path, tmp_path: Path
) -> None:
    fake_host("8.6.0")
    (tmp_path / "host" / "nvidia-smi").write_text(SMI)
    report, text = check(models, "--no-external-tactics")
    plans = report["models"]["tiny"]["plans"]
    assert list(plans) == ["fp16", "fp32", "int8"]
    for plan in plans.values():
        assert [row["batch"] for row in plan["in_process"]] == [1, 3]
        assert all(row["faces_per_s"] > 0 for row in plan["in_process"])
        assert [(row["batch"], row["graph"]) for row in plan["on_gpu"]] == [(1, True), (3, True)]
        for row in plan["on_gpu"]:
            assert row["replays"] >= 200 and row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
            assert row["max_drift"] <= plan["drift"]["limit"], "the replays left other embeddings than the plan gives"
            assert row["tflops"] == pytest.approx(plan["gflop_per_face"] * row["faces_per_s"] / 1e3)
        for row in (*plan["on_gpu"], *plan["in_process"]):
            assert (row["gpu"]["sm_clock_mhz"], row["gpu"]["power_w"], row["gpu"]["temperature_c"]) == (1410, 250.5, 61)
    assert plans["fp32"]["passes_gate"]
    gaps = {gap["step"]: gap["why"] for gap in report["not_measured"]}
    assert "no model_repository/" in gaps["fp16 plan of tiny through tritonserver"]
    assert "no CUDAExecutionProvider" in gaps["ONNX Runtime CUDA on tiny"]
    assert "no Python here has torch with CUDA" in gaps["PyTorch on tiny"]
    assert text.startswith("# NVIDIA A10\n\nSM 8.6, driver 550.54.15, CUDA 12.4, TensorRT 8.6.0")
    assert text.count("| TensorRT fp16 |") == 4
    assert all(step in text for step in gaps)
    readers = [line for line in (tmp_path / "host" / "nvidia-smi.calls").read_text().splitlines() if "-lms 100" in line]
    assert len(readers) == 1, "one nvidia-smi reads the clocks of the whole run"
    assert len(list((models / "tiny").glob("gpu-check-*.npy"))) == 1, "the CPU's embeddings are computed once a model"


def test_without_cuda_graphs_plain_launches_are_timed_and_the_report_says_so(
    fake_host: Callable[..., None], models: Path
) -> None:
    fake_host("8.6.0", "nograph")
    report, text = check(models, "--no-external-tactics")
    row = report["models"]["tiny"]["plans"]["fp16"]["on_gpu"][0]
    assert row["graph"] is False and "CUDA Error: 900" in row["why_no_graph"]
    assert row["max_drift"] < 0.001
    assert "| TensorRT fp16, no graph | 1 |" in text


def test_the_first_model_has_its_baselines_before_anything_else_is_built(
    fake_host: Callable[..., None], models: Path
) -> None:
    fake_host("8.6.0")
    shutil.copytree(models / "tiny", models / "second")
    report, _ = check(models, "--no-external-tactics", "--models", "tiny", "second")
    steps = [step["step"] for step in report["steps"]]
    of_the_first = ["import tiny", "fp16 variant of tiny", "fp16 plan of tiny", "fp16 plan of tiny on the GPU alone"]
    of_the_first += ["fp16 plan of tiny through tritonserver", "PyTorch on tiny", "ONNX Runtime CUDA on tiny"]
    assert steps[:8] == [*of_the_first, "import second"]
    assert all(step["seconds"] >= 0 for step in report["steps"])


def test_sigterm_ends_the_run_with_what_was_measured(fake_host: Callable[..., None], models: Path) -> None:
    fake_host("8.6.0")
    # The plan of `tiny` is measured; then a Python that never answers holds up the baseline.
    stuck = models.parent / "stuck"
    stuck.write_text("#!/bin/sh\nexec sleep 600\n")
    stuck.chmod(0o755)
    line = command(models, "--no-external-tactics", "--torch-python", str(stuck))
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment(), cwd=models.parent)
    assert process.stderr is not None
    said = []
    for text in process.stderr:
        said.append(text)
        if "PyTorch on tiny" in text:
            break
    before = written(models)
    process.terminate()
    assert process.wait(timeout=60) == 143, "".join(said)
    assert "ended by SIGTERM" in process.stderr.read()
    process.stderr.close()
    for report in (before, written(models)):  # it was on disk already, and stays
        assert report["models"]["tiny"]["plans"]["fp16"]["in_process"][0]["faces_per_s"] > 0
    assert written(models)["not_measured"][-1] == {"step": "PyTorch on tiny", "why": "the run was ended: Stopped"}


def test_a_killed_run_leaves_the_steps_before(fake_host: Callable[..., None], models: Path) -> None:
    fake_host("8.6.0")
    line = command(models, "--no-external-tactics")
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment(), cwd=models.parent)
    assert process.stderr is not None
    for text in process.stderr:
        if "fp32 plan of tiny" in text:
            break
    process.kill()
    process.wait()
    process.stderr.close()
    assert len(written(models)["models"]["tiny"]["plans"]["fp16"]["in_process"]) == 2


def test_a_spent_budget_leaves_a_report_without_figures(fake_host: Callable[..., None], models: Path) -> None:
    fake_host()
    report, _ = check(models, "--budget-s", "1")
    assert report["models"]["tiny"] == {"plans": {}}
    assert all("of the budget were left" in gap["why"] for gap in report["not_measured"])
    assert len(report["not_measured"]) == 8


def test_a_baseline_that_outlasts_the_budget_keeps_what_it_printed(tmp_path: Path) -> None:
    python = tmp_path / "python"
    row = {"batch": 1, "faces_per_s": 10.0, "median_ms": 100.0}
    way = {"kind": "fp32", "layout": "NCHW", "compiled": False, "min_cosine": 1.0, "batches": [row]}
    python.write_text(f"#!/bin/sh\necho '{json.dumps({'torch': '2'})}'\necho '{json.dumps(way)}'\nexec sleep 600\n")
    python.chmod(0o755)
    onnx, faces = write_tiny(tmp_path / "x.onnx"), np.zeros((2, 112, 112, 3), np.uint8)
    found = torch_baseline(str(python), onnx, faces, np.zeros((2, DIM)), [1], 0.1, tmp_path / "t", timeout_s=1.5)
    assert (found["torch"], found["ways"], found["stopped"]) == ("2", [way], "TimeoutExpired after 2 s")
    python.write_text("#!/bin/sh\necho 'NotImplementedError: no eager form of Conv' >&2\nexit 1\n")
    with pytest.raises(Missing, match="the PyTorch baseline did not run: NotImplementedError: no eager form of Conv"):
        torch_baseline(str(python), onnx, faces, np.zeros((2, DIM)), [1], 0.1, tmp_path / "t", timeout_s=30)


def test_the_python_with_torch_is_found_behind_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours comes first on PATH, as in an activated environment, and has no torch with CUDA."""
    for folder, code in (("ours", 1), ("theirs", 0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "python3").write_text(f"#!/bin/sh\necho no torch here >&2\nexit {code}\n")
        (tmp_path / folder / "python3").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "ours" / "python3"))
    monkeypatch.setenv("PATH", f"{tmp_path}/ours{os.pathsep}{tmp_path}/theirs")
    assert find_torch_python(None) == f"{tmp_path}/theirs/python3"
    with pytest.raises(Missing, match=r"no Python here has torch with CUDA \(.*ours/python3: no torch here\)\. Name"):
        find_torch_python(f"{tmp_path}/ours/python3")


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("1410, 1215, 250.5, 61, 1024, 97\n", (1410, 1215, 250.5, 61, 1024, 97)),
        ("1410, 1215, [N/A], 61, 1024, 97\n", None),
        ("1410, 12", None),
        ("Unable to determine the device handle for GPU\n", None),
        ("", None),
    ],
)
def test_a_line_of_nvidia_smi_that_is_no_reading_is_left_out(line: str, values: tuple | None) -> None:
    assert parse_reading(line) == values


def test_ratios_are_to_the_best_pytorch_of_each_kind_and_refusals_are_told() -> None:
    def row(batch: int, ms: float, **more: Any) -> dict:
        return {"batch": batch, "faces_per_s": batch / ms * 1e3, "median_ms": ms, **more}

    def way(kind: str, layout: str, *rows: dict) -> dict:
        return {"kind": kind, "layout": layout, "compiled": False, "batches": list(rows)}

    fp16 = {"in_process": [row(1, 2.0), row(8, 4.0)], "served": {"rows": [], "gpu_faces_rows": [row(1, 5.0)]}}
    fp16["on_gpu"] = [row(1, 1.0, tflops=50.0, graph=True, gpu={"sm_clock_mhz": 1410.0})]
    ways = [way("fp32", "NCHW", row(1, 20.0, device_ms=12.0)), way("fp32", "NHWC", row(1, 10.0, device_ms=11.0))]
    ways += [way("fp16", "NHWC", row(1, 4.0, device_ms=3.0))]
    ways += [{"kind": "fp16", "layout": "NHWC", "compiled": True, "error": "Unsupported: a graph break"}]
    pytorch = {"torch": "2", "python": "/usr/bin/python3", "gemm_tflops": {"fp16": 200.0}, "ways": ways}
    entry = {"plans": {"fp16": fp16, "int8": {"refused": "holds 2 fp32"}}, "pytorch": pytorch}
    host = {"gpu": "X", "sm": "9.0", "driver": "1", "cuda": "12", "tensorrt": "10", "memory_bytes": 1 << 30}
    report = {"host": host, "created": "now", "command": "c", "faces": {"count": 1, "origin": "drawn"}}
    text = to_markdown({**report, "models": {"m": entry}, "not_measured": []})
    assert "| TensorRT fp16 | 1 | 1 | 500 | 2.00 | 5.00 |  | 2.00 |" in text
    assert "| TensorRT fp16 | 8 | 1 | 2000 | 4.00 |  |  |  |" in text
    assert "| TensorRT fp16, tritonserver, faces on the GPU | 1 | 1 | 200 | 5.00 | 2.00 |  | 0.80 |" in text
    assert "| TensorRT fp16 | 1 | 1.000 | 1000 | 50.0 | 25% of fp16 | 1410 | 11.00 |  | 3.00 |" in text
    assert "PyTorch 2 of /usr/bin/python3" in text
    assert "PyTorch fp16 NHWC compiled failed: Unsupported: a graph break" in text
    assert "int8 was refused: holds 2 fp32" in text


def test_the_graph_for_pytorch_holds_every_node_and_weight(tmp_path: Path) -> None:
    export_graph(write_tiny(tmp_path / "x.onnx"), tmp_path)
    graph = json.loads((tmp_path / "graph.json").read_text())
    weights = np.load(tmp_path / "weights.npz")
    assert [node["op"] for node in graph["nodes"]][:3] == ["Cast", "Transpose", "Mul"]
    known = {graph["input"], *weights.files}
    for node in graph["nodes"]:
        assert set(filter(None, node["inputs"])) <= known
        known.add(node["output"])
    assert graph["output"] in known


def test_a_graph_with_a_text_attribute_is_exported(tmp_path: Path) -> None:
    model = tiny_onnx()
    model.graph.node[-1].attribute.append(helper.make_attribute("mode", "linear"))
    model.graph.node[-1].attribute.append(helper.make_attribute("modes", ["a", "b"]))
    onnx.save(model, tmp_path / "x.onnx")
    export_graph(tmp_path / "x.onnx", tmp_path)
    attributes = json.loads((tmp_path / "graph.json").read_text())["nodes"][-1]["attributes"]
    assert (attributes["mode"], attributes["modes"]) == ("linear", ["a", "b"])


def test_the_baseline_runs_both_layouts_and_agrees_with_onnx_runtime(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    file, faces = write_tiny(tmp_path / "x.onnx"), synthetic_faces(5)
    reference = open_session(file).run(["embedding"], {"face": faces})[0]
    found = torch_baseline(
        sys.executable, file, faces, reference, [1, 2], 0.01, tmp_path / "t", timeout_s=120, device="cpu"
    )
    assert [(way["kind"], way["layout"]) for way in found["ways"]] == [("fp32", "NCHW"), ("fp32", "NHWC")]
    assert all(way["min_cosine"] > 0.99999 for way in found["ways"])


def test_the_script_exits_3_with_one_sentence_where_there_is_no_gpu(tmp_path: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this host has a GPU")
    environment = {**os.environ, "PYTHON": sys.executable}
    script = REPO / "scripts" / "gpu-check"
    done = subprocess.run([str(script)], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("Missing: no NVIDIA GPU on this host")
    assert len(done.stderr.splitlines()) == 1
