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
import pytest

from arcface_build.bench.torch_export import export_graph
from arcface_tools.gpu_check.report import to_markdown
from tiny_onnx import DIM, write_tiny

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """models/tiny as import and quantize leave it."""
    folder = tmp_path / "models" / "tiny"
    write_tiny(folder / "serving.onnx")
    for precision in ("fp16", "int8"):
        write_tiny(folder / "variants" / f"{precision}-tensorrt.onnx", precision)
    facts = {"name": "tiny", "dim": DIM, "contract_id": "c" * 64, "serving": {"file": "serving.onnx"}}
    others = dict.fromkeys(["created", "source", "flavour", "preprocessing", "steps", "proof", "tools"])
    (folder / "manifest.json").write_text(json.dumps({"format": 1, **facts, **others}))
    return folder.parent


def check(models: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The report and its Markdown of a run in a process of its own, in a folder without a model repository."""
    command = [sys.executable, "-m", "arcface_tools.gpu_check.run", "--models", "tiny", "--models-dir", str(models)]
    command += ["--out", "out", "--sample-s", "0.01", "--batches", "1", "3", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=models.parent, check=False)
    assert done.returncode == 0, done.stderr
    out = models.parent / "out"
    return json.loads((out / "a10.json").read_text()), (out / "a10.md").read_text()


def test_a_run_measures_every_precision_and_names_its_gaps(fake_host: Callable[..., None], models: Path) -> None:
    fake_host("8.6.0")
    report, text = check(models, "--no-external-tactics")
    plans = report["models"]["tiny"]["plans"]
    assert list(plans) == ["fp16", "fp32", "int8"]
    for plan in plans.values():
        assert [row["batch"] for row in plan["in_process"]] == [1, 3]
        assert all(row["faces_per_s"] > 0 for row in plan["in_process"])
    assert plans["fp32"]["passes_gate"]
    gaps = {gap["step"]: gap["why"] for gap in report["not_measured"]}
    assert "no model_repository/" in gaps["fp16 plan of tiny through tritonserver"]
    assert "no CUDA provider" in gaps["ONNX Runtime CUDA on tiny"]
    assert "--torch-python" in gaps["PyTorch on tiny"]
    assert all(fact in text for fact in ("NVIDIA A10", "SM 8.6", "550.54.15", "CUDA 12.4", "TensorRT 8.6.0"))
    assert text.count("| TensorRT fp16 |") == 2
    assert all(step in text for step in gaps)


def test_a_spent_budget_leaves_a_report_without_figures(fake_host: Callable[..., None], models: Path) -> None:
    fake_host()
    report, _ = check(models, "--budget-s", "1")
    assert report["models"]["tiny"] == {"plans": {}}
    assert all("of the budget were left" in gap["why"] for gap in report["not_measured"])
    assert len(report["not_measured"]) == 8


def test_ratios_are_to_pytorch_at_the_same_batch_and_refusals_are_told() -> None:
    def row(batch: int, speed: float) -> dict:
        return {"batch": batch, "faces_per_s": speed, "median_ms": 1.0}

    entry = {"plans": {"fp16": {"in_process": [row(1, 300.0), row(8, 900.0)]}}, "pytorch": {}}
    entry["plans"]["fp16"]["served"] = {"rows": [], "gpu_faces_rows": [row(1, 200.0)]}
    entry["plans"]["int8"] = {"refused": "holds 2 fp32"}
    entry["pytorch"] = {"fp32": {"batches": [row(1, 100.0)]}}
    host = {"gpu": "X", "sm": "9.0", "driver": "1", "cuda": "12", "tensorrt": "10", "memory_bytes": 1 << 30}
    report = {"host": host, "created": "now", "command": "c", "faces": {"count": 1, "origin": "drawn"}}
    text = to_markdown({**report, "models": {"m": entry}, "not_measured": []})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    ratios = {(row[0], row[1]): (row[3], row[-1]) for row in rows}
    assert ratios["TensorRT fp16", "1"] == ("300", "3.00")
    assert ratios["TensorRT fp16", "8"] == ("900", ""), "PyTorch was not measured at this batch"
    assert ratios["TensorRT fp16, tritonserver, faces on the GPU", "1"] == ("200", "2.00")
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


def test_the_script_exits_3_with_one_sentence_where_there_is_no_gpu(tmp_path: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this host has a GPU")
    environment = {**os.environ, "PYTHON": sys.executable}
    script = REPO / "scripts" / "gpu-check"
    done = subprocess.run([str(script)], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("Missing: no NVIDIA GPU on this host")
    assert len(done.stderr.splitlines()) == 1
