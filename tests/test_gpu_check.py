"""scripts/gpu-check: all stages on stand-ins, what is left of a run that ends early, and the report's own rules."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from arcface_build.bench.torch_export import export_graph
from arcface_build.serving.binary import TritonBinary
from arcface_clients.contract import Preprocessing
from arcface_clients.engines.runtimes import open_session
from arcface_clients.errors import Missing
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_tools.gpu_check.clocks import GpuLog, parse_reading
from arcface_tools.gpu_check.goals import Goal, goals
from arcface_tools.gpu_check.other_python import find_torch_python, torch_baseline
from arcface_tools.gpu_check.rehearsal import SMALL, stand_ins
from arcface_tools.gpu_check.report import to_markdown
from arcface_tools.gpu_check.stages.baselines import device_ms
from deadlines import HANG_S
from tiny_model import write_manifest
from tiny_onnx import DIM, tiny_onnx, write_tiny

REPO = Path(__file__).resolve().parent.parent
SCRIPT = str(REPO / "scripts" / "gpu-check")
NO_REGION = r"the server cannot open a region of ours on GPU 0"
NO_PROVIDER = r"this ONNX Runtime has no CUDAExecutionProvider"
GAPS = {  # what a rehearsal cannot show, and why: a real GPU must close each of them
    "0 tensors on the GPU in Triton's python backend": NO_REGION,
    "4 ONNX Runtime CUDA on first, fp32": NO_PROVIDER,
    "4 ONNX Runtime CUDA on first, fp32 with TF32": NO_PROVIDER,
    "4 ONNX Runtime CUDA on first, fp16": NO_PROVIDER,
    "5 first fp16": rf"^Missing: CUDA shared memory: Missing: .*{NO_REGION}",
    "5 the tests of CUDA shared memory that need a GPU": r"pytest ended with 1: 2 failed",
}


needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc: the stand-in for libcuda cannot be compiled")


@pytest.fixture(scope="module")
def rehearsal(triton_binary: TritonBinary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a rehearsal wrote its report to."""
    out = tmp_path_factory.mktemp("rehearsal")
    done = subprocess.run([SCRIPT, "--rehearse", "--out", str(out)], capture_output=True, text=True, env=ours())
    assert done.returncode == 0, done.stderr
    return out


def ours(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": paths, **more}


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "stand-in.json").read_text())


def steps(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, stage in report["stages"].items():
        for name, step in stage["steps"].items():
            yield f"{number} {name}", step


@needs_gcc
def test_a_rehearsal_runs_every_stage_to_its_end_but_for_what_needs_a_gpu(rehearsal: Path) -> None:
    report = read(rehearsal)
    assert list(report["stages"]) == [str(number) for number in range(7)]
    assert not [stage for stage in report["stages"].values() if {"died", "not_started"} & set(stage)]
    gaps = {name: step["why"] for name, step in steps(report) if "why" in step}
    assert set(gaps) == set(GAPS), gaps
    for name, why in GAPS.items():
        assert re.search(why, gaps[name]), gaps[name]
    bare = report["stages"]["2"]["steps"]["first fp16"]["result"]
    assert [row["batch"] for row in bare["rows"]] == [1, 3]
    for row in bare["rows"]:
        assert row["graph"] and row["replays"] >= 5 and row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["max_drift"] < 0.001, "the timed replays left other embeddings than the plan gives"
        assert row["tflops"] == pytest.approx(row["faces_per_s"] * bare["gflop_per_face"] / 1e3)
        assert row["share_of_peak"] == pytest.approx(row["tflops"] / bare["gemm_tflops"])
    layers = report["stages"]["2"]["steps"]["first fp16, layers at batch 3"]["result"]
    assert layers["layers"] > 10 and layers["slowest"][0]["kind"] is not None
    served = report["stages"]["5"]["steps"]["first fp16"]["result"]["ways"]
    for way in ("gRPC", "system shared memory"):
        assert [(row["batch"], row["callers"]) for row in served[way]["rows"]] == [(1, 1), (1, 2), (3, 1), (3, 2)]
        assert served[way]["drift"]["max_drift"] < 0.001
    tuned = report["stages"]["6"]["steps"]["first fp16, set"]["result"]["plan"]
    assert len(tuned["memory"]["context_bytes"]) == 2, "the plan set has a profile for batch 1 of its own"


@needs_gcc
def test_every_figure_has_clocks_power_and_temperature_beside_it(rehearsal: Path) -> None:
    def figures(value: Any) -> Iterator[dict[str, Any]]:
        if isinstance(value, dict):
            if {"faces_per_s", "tflops", "gb_per_s"} & set(value):
                yield value
            value = list(value.values())
        for item in value if isinstance(value, list) else ():
            yield from figures(item)

    found = list(figures([stage for number, stage in read(rehearsal)["stages"].items() if number != "0"]))
    assert len(found) > 40
    for row in found:
        assert (row["gpu"]["sm_clock_mhz"], row["gpu"]["power_w"], row["gpu"]["temperature_c"]) == (1410, 250.5, 61)


@needs_gcc
def test_the_page_has_the_goals_every_stage_and_every_gap_and_the_logs_are_kept(rehearsal: Path) -> None:
    report, text = read(rehearsal), (rehearsal / "stand-in.md").read_text()
    assert text == to_markdown(report)
    assert "| first fp16, batch 3: share of the GEMM peak | ≥ 0.5 |" in text
    for stage in report["stages"].values():
        assert stage["title"] in text
    for gap in GAPS:
        number, _, name = gap.partition(" ")
        assert f"- {number}. {name}: " in text.partition("## Not measured")[2]
    with tarfile.open(rehearsal / "stand-in-logs.tar.gz") as packed:
        names = packed.getnames()
    for kept in ("stage-0.log", "tritonserver-first.log", "first-fp16-dynamic/first-fp16-sm86.plan.inspector.json"):
        assert f"logs/{kept}" in names


@pytest.fixture
def host(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a host of stand-ins, in tmp_path; models/tiny in its state folder, as import leaves it."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc: the stand-in for libcuda cannot be compiled")
    folder = tmp_path / "state" / "models" / "tiny"
    write_tiny(folder / "serving.onnx")
    for precision in ("fp16", "int8"):
        write_tiny(folder / "variants" / f"{precision}-tensorrt.onnx", precision)
    write_manifest(folder, "5" * 64, Preprocessing(), DIM)
    yield stand_ins(tmp_path)


def line(*arguments: str) -> list[str]:
    small = [*SMALL.split(), "--networks", "tiny", "--state", "state", "--out", "out"]
    return [sys.executable, "-m", "arcface_tools.gpu_check.run", *small, *arguments]


def check(host: dict[str, str], folder: Path, *arguments: str, code: int = 0, **more: str) -> tuple[dict, str, str]:
    """The report, its page and what was said, of a run in a process of its own."""
    done = subprocess.run(line(*arguments), capture_output=True, text=True, env={**host, **more}, cwd=folder)
    assert done.returncode == code, done.stderr
    return read(folder / "out"), (folder / "out" / "stand-in.md").read_text(), done.stderr


def test_a_stage_that_crashes_leaves_its_traceback_and_the_next_one_runs(host: dict[str, str], tmp_path: Path) -> None:
    stages = ("--stage", "2", "--stage", "3")
    report, text, _ = check(host, tmp_path, *stages, FAKE_TRT_FAULT="abort_capture")
    died = report["stages"]["2"]["died"]
    assert "the stage ended with SIGABRT" in died and "plan_timer.py" in died and died in text
    assert "- 2. tiny fp16: the process ended during it" in text
    assert report["stages"]["3"]["steps"]["tiny fp32"]["result"]["passed"] is True
    plan = tmp_path / "state" / "plans" / "tiny-fp16-dynamic" / "tiny-fp16-sm86.plan"
    built, drift = plan.stat().st_mtime_ns, report["stages"]["3"]
    again, text, _ = check(host, tmp_path, *stages)  # the same state folder: goes on where it stopped
    assert "died" not in again["stages"]["2"] and again["stages"]["2"]["steps"]["tiny fp16"]["result"]["rows"]
    assert again["stages"]["3"] == drift, "a finished step was measured again"
    assert plan.stat().st_mtime_ns == built, "a plan that was there was built again"
    assert len(again["commands"]) == 2


def test_a_step_that_fails_leaves_its_reason_and_the_next_one_runs(host: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "state" / "models" / "tiny" / "variants" / "int8-tensorrt.onnx").write_bytes(b"no ONNX")
    report, text, _ = check(host, tmp_path, "--stage", "3")
    found = report["stages"]["3"]["steps"]
    assert "why" not in found["tiny fp32"] and "Traceback" in found["tiny int8"]["traceback"]
    assert f"- 3. tiny int8: {found['tiny int8']['why']}" in text


def test_a_plan_of_another_precision_is_measured_and_called_refused(host: dict[str, str], tmp_path: Path) -> None:
    stages = ("--stage", "3")
    report, text, _ = check(host, tmp_path, *stages, FAKE_TRT_FAULT="fp32", FAKE_TRT_VERSION="8.6.0")
    result = report["stages"]["3"]["steps"]["tiny fp16"]["result"]
    assert "the plan should be fp16 but has 2 fp32 convolutions" in result["plan"]["refused"]
    assert not result["plan"]["passes_gate"] and result["drift"]["max_drift"] < 0.001
    assert "**Refused**, and measured all the same: the plan should be fp16" in text
    assert report["stages"]["3"]["steps"]["tiny fp32"]["result"]["plan"]["passes_gate"]


def test_without_cuda_graphs_plain_launches_are_timed_and_the_report_says_so(
    host: dict[str, str], tmp_path: Path
) -> None:
    report, text, _ = check(host, tmp_path, "--stage", "2", FAKE_TRT_FAULT="nograph", FAKE_TRT_VERSION="8.6.0")
    row = report["stages"]["2"]["steps"]["tiny fp16"]["result"]["rows"][0]
    assert row["graph"] is False and "CUDA Error: 900" in row["why_no_graph"]
    assert row["max_drift"] < 0.001
    assert "No graph at batch 1: " in text


def test_without_a_driver_the_first_minute_stops_the_run_with_a_sentence(host: dict[str, str], tmp_path: Path) -> None:
    report, text, said = check(host, tmp_path, code=3, FAKE_TRT_FAULT="driver")
    assert said.splitlines()[-1] == (
        "Stopped: nothing can be measured here: driver: RuntimeError: CUDA finds no GPU (error 35, 0 GPUs)"
    )
    assert list(report["stages"]) == ["0"] and "**Stopped:** nothing can be measured here" in text


def test_a_wrong_fp16_plan_stops_the_run(host: dict[str, str], tmp_path: Path) -> None:
    _, _, said = check(host, tmp_path, code=3, FAKE_TRT_FAULT="drift")
    assert "nothing can be measured here: fp16 plan of three layers: ProofFailed: the embeddings are wrong" in said


def test_sigterm_ends_the_run_with_what_was_measured(host: dict[str, str], tmp_path: Path) -> None:
    # The plan is measured; then a Python that never answers holds up the baseline.
    stuck = tmp_path / "stuck"
    stuck.write_text('#!/bin/sh\ncase "$1" in -c) exit 0 ;; esac\nexec sleep 600\n')
    stuck.chmod(0o755)
    arguments = line("--torch-python", str(stuck), "--stage", "2", "--stage", "4")
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=host, cwd=tmp_path
    )
    assert process.stdout is not None and process.stderr is not None
    for text in process.stdout:
        if "PyTorch on tiny" in text:
            break
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert "ended by SIGTERM" in process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    report = read(tmp_path / "out")
    assert report["stages"]["2"]["steps"]["tiny fp16"]["result"]["rows"]
    assert report["stages"]["4"]["steps"]["PyTorch on tiny"]["why"] == "the run was ended"


def test_a_killed_run_leaves_the_steps_before(host: dict[str, str], tmp_path: Path) -> None:
    process = subprocess.Popen(line("--stage", "2"), stdout=subprocess.PIPE, text=True, env=host, cwd=tmp_path)
    assert process.stdout is not None
    for text in process.stdout:
        if "layers at batch 1" in text:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    report = json.loads((tmp_path / "state" / "report.json").read_text())
    assert len(report["stages"]["2"]["steps"]["tiny fp16"]["result"]["rows"]) == 2


def test_a_spent_budget_leaves_a_report_without_figures(host: dict[str, str], tmp_path: Path) -> None:
    report, text, _ = check(host, tmp_path, "--budget-s", "1")
    assert [stage["steps"] for stage in report["stages"].values()] == [{}] * 7
    assert text.count("s of the budget were left") == 7


def test_a_report_of_another_tensorrt_is_kept_and_a_new_one_begins(host: dict[str, str], tmp_path: Path) -> None:
    before, _, _ = check(host, tmp_path, "--budget-s", "1")
    after, _, said = check(host, tmp_path, "--budget-s", "1", FAKE_TRT_VERSION="11.0.0")
    assert "is of another GPU, driver or TensorRT: kept as report-" in said
    assert (after["host"]["tensorrt"], len(after["commands"])) == ("11.0.0", 1)
    kept = list((tmp_path / "state").glob("report-*.json"))
    assert [json.loads(file.read_text())["host"]["tensorrt"] for file in kept] == [before["host"]["tensorrt"]]


def test_readings_between_two_times_are_those_and_else_the_last_before() -> None:
    log, now = GpuLog(), time.monotonic()
    log._readings = [(now + second, (1000.0 + second, 1, 2, 3, 4, 5)) for second in range(5)]
    assert log.between(now + 1, now + 3)["sm_clock_mhz"] == 1002
    assert log.between(now + 3.2, now + 3.4)["sm_clock_mhz"] == 1003
    assert GpuLog().between(now) == {}


@pytest.mark.parametrize(
    ("goal", "row"),
    [
        (Goal("share", 0.5, 0.51), ["share", "≥ 0.5", "0.51", "yes"]),
        (Goal("share", 0.5, 0.49), ["share", "≥ 0.5", "0.49", "no"]),
        (Goal("build", 300, 301.2, " s", at_most=True), ["build", "≤ 300 s", "301 s", "no"]),
        (Goal("drift", 0.001, 2e-5, at_most=True), ["drift", "≤ 0.001", "2e-05", "yes"]),
    ],
)
def test_a_goal_says_whether_it_is_met(goal: Goal, row: list[str]) -> None:
    assert goal.row() == row


def test_goals_compare_with_the_best_of_each_kind_on_the_gpu_and_leave_out_what_was_not_measured() -> None:
    def way(kind: str, ms: float, compiled: bool = False) -> dict[str, Any]:
        rows = [{"batch": 64, "device_ms": ms, "median_ms": 1.0, "between": None}]
        return {"kind": kind, "layout": "NCHW", "compiled": compiled, "batches": rows}

    def stage(**results: Any) -> dict[str, Any]:
        return {"steps": {name: {"result": result} for name, result in results.items()}}

    row = {"batch": 64, "median_ms": 4.0, "share_of_peak": None}
    bare = stage(r100={"plan": {}, "rows": [row]})
    torch = {"ways": [way("fp32", 60.0), way("fp32", 50.0), way("fp32", 30.0, compiled=True), way("tf32", 9.0)]}
    assert goals({"stages": {"2": stage()}}) == []
    told = goals({"stages": {"2": bare, "4": stage(torch=torch, ort={"rows": [{"batch": 64, "median_ms": 5.0}]})}})
    assert [(goal.what, goal.measured) for goal in told] == [
        ("r100, batch 64: × PyTorch eager fp32 without TF32", 12.5)
    ]


def test_onnx_runtime_is_timed_with_faces_and_embeddings_on_the_device(tmp_path: Path) -> None:
    session = open_session(write_tiny(tmp_path / "x.onnx"))
    assert 0 < device_ms(session, synthetic_faces(2), 3, 0.01, device="cpu") < 1e4


def test_a_baseline_that_outlasts_the_budget_keeps_what_it_printed(tmp_path: Path) -> None:
    python = tmp_path / "python"
    row = {"batch": 1, "faces_per_s": 10.0, "median_ms": 100.0}
    way = {"kind": "fp32", "layout": "NCHW", "compiled": False, "min_cosine": 1.0, "batches": [row]}
    python.write_text(f"#!/bin/sh\necho '{json.dumps({'torch': '2'})}'\necho '{json.dumps(way)}'\nexec sleep 600\n")
    python.chmod(0o755)
    onnx, faces = write_tiny(tmp_path / "x.onnx"), np.zeros((2, 112, 112, 3), np.uint8)
    found = torch_baseline(str(python), onnx, faces, np.zeros((2, DIM)), [1], 0.1, tmp_path / "t", timeout_s=5)
    assert (found["torch"], found["ways"], found["stopped"]) == ("2", [way], "TimeoutExpired after 5 s")
    python.write_text("#!/bin/sh\necho 'NotImplementedError: no eager form of Conv' >&2\nexit 1\n")
    with pytest.raises(Missing, match="the PyTorch baseline did not run: NotImplementedError: no eager form of Conv"):
        torch_baseline(str(python), onnx, faces, np.zeros((2, DIM)), [1], 0.1, tmp_path / "t", timeout_s=HANG_S)


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
