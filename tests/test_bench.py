"""Benchmark arithmetic, the regression check, and the real perf_analyzer on the real server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from arcface_build.bench import perf_analyzer
from arcface_build.bench.contestants import in_process
from arcface_build.bench.cpu_time import watch_cpu
from arcface_build.bench.gpu_use import gpu_use
from arcface_build.bench.host import describe_host
from arcface_build.bench.interleaved import Sample, Variant, Work, measure_in_turns, ratio, undisturbed_rounds
from arcface_build.bench.perf_analyzer import (
    Load,
    PerfAnalyzer,
    deadline_s,
    find_perf_analyzer,
    work_from_timestamps,
    write_input_data,
)
from arcface_build.bench.result import regressions, summarise
from arcface_build.bench.server import check_names, own_server, running_server
from arcface_build.bench.triton_statistics import ensemble_cost
from arcface_build.commands.bench import command as bench_command
from arcface_build.errors import ServerFailed
from arcface_clients.errors import ArcFaceError, Missing, WrongUse
from conftest import copy_repository
from deadlines import HANG_S


def _ms(*values: float) -> np.ndarray:
    return np.array([int(v * 1e6) for v in values], np.int64)


@pytest.mark.parametrize(
    ("ends_ms", "concurrency", "faces_per_s"),
    [
        ((10, 20, 30, 40, 50), 1, 100.0),  # one caller, one face each 10 ms; the first is warm-up
        ((10, 10, 20, 20, 30, 30), 2, 200.0),  # pairs that the server answers in one batch
        ((5, 10, 15, 20, 25, 30), 2, 200.0),  # two callers that take turns
        ((50, 20, 40, 10, 30), 1, 100.0),  # perf_analyzer writes requests in any order
        ((10, 10, 20, 20, 30), 2, 200.0),  # half a generation at the end is not counted
    ],
)
def test_rate_is_that_of_whole_generations_after_the_first(
    ends_ms: tuple[float, ...], concurrency: int, faces_per_s: float
) -> None:
    ends = _ms(*ends_ms)
    starts = ends - np.where(np.argsort(np.argsort(ends, kind="stable")) < concurrency, 9_000_000, 1_000_000)
    work = work_from_timestamps(starts, ends, 1, concurrency)
    assert work.faces_per_s == pytest.approx(faces_per_s)
    assert work.faces_in_all == len(ends_ms)
    assert set(np.round(work.latencies_ms, 6)) == {1.0}, "the first generation met an idle server"


def test_ratios_are_paired_within_a_round_so_a_slow_minute_cancels() -> None:
    speed = iter([100.0, 50.0, 10.0, 5.0, 40.0, 20.0])  # the machine slows down tenfold in round 2

    def worker(seconds: float) -> Work:
        return Work(1, 1.0) if seconds == 0 else Work(1, 1 / next(speed))

    # Each round turns the order by one, so round 2 is (half, full): its speeds come the other way round.
    full, half = Variant("full", worker), Variant("half", worker)
    samples = measure_in_turns([full, half], rounds=1, sample_s=1.0, foreign_limit=float("inf"))
    assert ratio(samples, "half", "full", [0]).median == pytest.approx(0.5)
    assert [s.round_number for s in samples["full"]] == [0]


def _sample(number: int, share: float, speed: float = 1.0) -> Sample:
    return Sample(number, speed, None, share, [1.0], {})


def test_rounds_with_a_disturbed_sample_are_dropped_for_all_variants() -> None:
    samples = {
        "a": [_sample(i, share) for i, share in enumerate((0.0, 0.3, 0.01, 0.0, 0.0))],
        "b": [_sample(i, share) for i, share in enumerate((0.0, 0.0, 0.02, 0.9, 0.0))],
    }
    assert undisturbed_rounds(samples) == ([0, 2, 4], False)


def test_a_busy_machine_keeps_the_least_disturbed_rounds_and_says_so() -> None:
    samples = {"a": [_sample(i, share) for i, share in enumerate((0.5, 0.2, 0.9, 0.3))]}
    assert undisturbed_rounds(samples) == ([0, 1, 3], True)


def test_another_process_on_a_core_is_seen_as_foreign(tmp_path: Path) -> None:
    code = f"""
import os, time
os.setsid()
if os.fork(): os._exit(0)  # so that it is no child of ours
open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
end = time.time() + 20
while time.time() < end: pass
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG_S)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    pid = int((tmp_path / "pid").read_text())
    try:
        with watch_cpu() as cpu:
            time.sleep(0.5)
        with watch_cpu(pid) as known:
            time.sleep(0.5)
    finally:
        os.kill(pid, 9)
    assert cpu.foreign_share > 0.2 / (os.cpu_count() or 1)
    assert known.servers_s > 0.1
    assert cpu.this_process_s < 0.45  # it slept


def _result(median: float, low: float, high: float, variant: str = "served") -> dict:
    row = {"variant": variant, "base": "bare b32", "median": median, "low": low, "high": high, "count": 7}
    return {"format": 1, "kind": "bench", "ratios": [row]}


@pytest.mark.parametrize(
    ("old", "new", "worse"),
    [
        ((0.98, 0.97, 0.99), (0.97, 0.96, 0.98), False),  # within the spread
        ((0.98, 0.97, 0.99), (0.945, 0.94, 0.95), False),  # beyond the spread, within the margin on top of it
        ((0.98, 0.97, 0.99), (0.93, 0.92, 0.94), True),
        ((0.98, 0.97, 0.99), (0.90, 0.80, 1.00), False),  # a spread that wide proves nothing
        ((0.98, 0.97, 0.99), (1.20, 1.10, 1.30), False),  # better is never worse
    ],
)
def test_a_ratio_is_worse_only_beyond_margin_and_spread(old: tuple, new: tuple, worse: bool) -> None:
    found = regressions(_result(*old), _result(*new), margin=0.03)
    assert bool(found) is worse
    if worse:
        assert found[0].startswith("served / bare b32: 0.930 (0.920–0.940), was 0.980 (0.970–0.990); fell by 0.050")


def test_results_without_a_common_ratio_are_not_compared() -> None:
    with pytest.raises(WrongUse, match=r"share no ratio: expected some of .*served.*, got .*other"):
        regressions(_result(1, 1, 1), _result(1, 1, 1, "other"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (
            "[1]",
            "is not a benchmark of format 1: format None, kind None; expected what arcface bench --report FILE wrote",
        ),
        ("{}", "is not a benchmark of format 1: format None"),
        ('{"format": 1, "kind": "tune"}', "format 1, kind 'tune'"),
        ('{"format": 1, "kind": "bench"}', "is not a benchmark"),
    ],
)
def test_what_is_no_older_result_is_refused_before_anything_is_measured(content: str | bytes, message: str, tmp_path):
    path = tmp_path / "old.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(WrongUse, match=message):
        bench_command.main(["--against", str(path)], standalone_mode=False)


@pytest.mark.parametrize(
    ("models", "config", "message"),
    [
        (("arcface", "nosuch"), "onnx", "no model nosuch in .*: expected some of arcface, arcface_onnx, "),
        (("arcface",), "tunde", r"has configs/tunde\.pbtxt: expected one of onnx, reference, tensorrt"),
    ],
)
def test_names_that_triton_would_pass_over_are_refused(models, config: str, message: str, tmp_path: Path) -> None:
    repository = copy_repository(tmp_path)
    check_names(repository, ("arcface", "arcface_onnx"), "onnx")
    with pytest.raises(WrongUse, match=message):
        check_names(repository, models, config)


@pytest.mark.parametrize("url", [":8001", "gpu-host:eight", "http://gpu-host:8000"])
def test_an_address_that_is_not_grpc_s_is_refused(url: str) -> None:
    with pytest.raises(WrongUse, match=f"{url}'.*xpected "):
        running_server(url)


def test_http_is_looked_for_one_port_below_grpc() -> None:
    target = running_server("grpcs://[::1]:9001")
    assert (target.grpc_url, target.http_url, target.encrypted) == ("[::1]:9001", "[::1]:9000", True)


def test_in_process_variants_report_calls_and_cpu_time() -> None:
    faces = np.zeros((5, 112, 112, 3), np.uint8)
    seen: list[int] = []
    variants = [in_process("bare b2", lambda batch: seen.append(len(batch)), faces, 2)]
    variants += [in_process("insightface b1", lambda batch: time.sleep(0.001), faces, 1)]
    result = summarise(variants, measure_in_turns(variants, 2, 0.02, foreign_limit=float("inf")), {})
    assert set(seen) == {2}
    assert result["rounds"]["measured"] == 2
    assert [row["name"] for row in result["variants"]] == ["bare b2", "insightface b1"]
    assert result["variants"][1]["latency_ms"]["p50"] >= 1.0
    assert ("bare b2", "insightface b1") in {(r["variant"], r["base"]) for r in result["ratios"]}


def _split(requests: float, total_ms: float, queue_ms: float = 0.0) -> dict[str, float]:
    """A row as `server_split` writes it, 20 ms of compute in three parts."""
    parts = {"compute_input_ms": 1.0, "compute_infer_ms": 17.0, "compute_output_ms": 2.0}
    return {"requests": requests, "queue_ms": queue_ms, **parts, "total_ms": total_ms}


@pytest.mark.parametrize(
    ("split", "added_ms"),
    [
        ({"arcface": _split(8, 120.5), "arcface_onnx": _split(8, 120.0, queue_ms=100.0)}, 0.5),
        ({"arcface": _split(8, 120.5)}, None),  # asked directly: no ensemble
        ({"arcface_onnx": _split(8, 120.5)}, None),  # the ensemble did not work
        ({"arcface": _split(8, 120.5), "arcface_onnx": _split(9, 120.0)}, None),  # somebody else asked the leaf
        ({"arcface": _split(8, 50.0), "arcface_onnx": _split(8, 20.0), "arcface_reference": _split(8, 40.0)}, None),
        ({}, None),  # another sample's model, or no server
    ],
)
def test_an_ensemble_of_one_step_costs_what_its_requests_take_longer_than_the_step(split, added_ms) -> None:
    cost = ensemble_cost(split, "arcface")
    if added_ms is None:
        assert cost is None
    else:
        assert cost == {"over": "arcface_onnx", "added_ms": 0.5, "compute_ms": 20.0, "share_of_compute": 0.025}


def test_gpu_readings_are_averaged_and_a_cut_line_is_left_out():
    assert gpu_use("40, 1000\n60, 1500\n[N/A], 3\n7") == {"utilization_percent": 50.0, "memory_mib": 1500.0}
    assert gpu_use("No devices were found\n") == {}


def test_unknown_protocol_lists_the_known() -> None:
    with pytest.raises(WrongUse, match="unknown protocol 'carrier-pigeon': expected one of grpc, grpc-shm"):
        Load("arcface", "carrier-pigeon")


def _perf_analyzer() -> PerfAnalyzer:
    try:
        return find_perf_analyzer()
    except Missing as exc:
        pytest.skip(str(exc))


def test_missing_library_is_named_with_its_package() -> None:
    program = _perf_analyzer()
    if program.path.read_bytes()[:4] != b"\x7fELF":
        pytest.skip("this perf_analyzer is a script")
    with pytest.raises(Missing, match=r"needs libcudart.so.12, which this host lacks. Next: .*pip install"):
        PerfAnalyzer(program.path, {"LD_LIBRARY_PATH": "/nonexistent"}).check()


def test_bench_measures_the_running_server_with_the_real_perf_analyzer(server, demo_repository, tmp_path):
    from click.testing import CliRunner

    from arcface_build.commands.bench import command

    _perf_analyzer()
    arguments = ["--url", server.grpc_url, "--http-url", server.http_url, "--model-repository", str(demo_repository)]
    arguments += ["--batch", "4", "--rounds", "1", "--sample-s", "0.1", "--report", str(tmp_path / "bench.json")]
    arguments += ["--csv", str(tmp_path / "bench.csv"), "--html", str(tmp_path / "bench.html")]
    first = CliRunner().invoke(command, [*arguments, "--insightface"], catch_exceptions=False)
    assert first.exit_code == 0, first.output
    result = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["name"]: row for row in result["variants"]}
    assert set(rows) == {"bare b4", "insightface b1", "insightface b4", "arcface_onnx grpc b4 c2", "arcface grpc b4 c2"}
    served = rows["arcface grpc b4 c2"]
    assert served["faces_per_s"]["median"] > 1
    assert served["cpu_ms_per_face"]["median"] > 0.1, "the server's CPU time was not seen"
    assert served["server"]["arcface_onnx"]["compute_infer_ms"] > 0.1
    assert served["server"]["arcface_onnx"]["faces_per_execution"] >= 4
    assert {(r["variant"], r["base"]) for r in result["ratios"]} >= {
        ("arcface grpc b4 c2", "arcface_onnx grpc b4 c2"),
        ("arcface grpc b4 c2", "bare b4"),
        ("arcface grpc b4 c2", "insightface b1"),
    }
    assert result["host"]["cores"] >= 1
    assert rows["arcface_onnx grpc b4 c2"]["ensemble"] is None
    cost = served["ensemble"]
    share = cost["share_of_compute"]["median"]
    assert (cost["over"], cost["added_ms"]["count"]) == ("arcface_onnx", len(served["samples"]))
    assert 0 < share < 1, "the model inside took longer than the ensemble around it"
    assert cost["added_ms"]["median"] == pytest.approx(share * cost["compute_ms"]["median"], rel=0.5)
    told = f"the ensemble adds {cost['added_ms']['median']:.3f} ms"
    assert f"arcface grpc b4 c2: {told}" in first.output and f"{share:.4%} (" in first.output
    assert (tmp_path / "bench.csv").read_text().splitlines()[-1].endswith(f",{share:.6f}")
    assert "Ensemble overhead" in (tmp_path / "bench.html").read_text()


@pytest.mark.parametrize(
    ("requests", "batch", "requests_per_s", "expected_s"),
    [
        (8, 1, 0.0, 38),  # what one test asks for: a hang must not cost ten minutes
        (8, 32, 0.0, 286),
        (100, 1, 50.0, 50),
        (4, 64, 0.125, 350),  # r100 on two cores, 8 faces/s
    ],
)
def test_a_run_is_taken_for_hung_by_what_was_asked_for(requests, batch, requests_per_s, expected_s) -> None:
    assert deadline_s(requests, batch, requests_per_s) == expected_s


@pytest.mark.parametrize("hangs", [1, 2])
def test_a_hang_is_tried_once_more_and_then_told(hangs: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(perf_analyzer, "START_S", 4.0)
    monkeypatch.setattr(perf_analyzer, "_SLOWEST_FACES_PER_S", 1e9)
    script = tmp_path / "perf_analyzer"
    answers = " ".join(f'{{"timestamp": {i}000000, "response_timestamps": [{i + 1}000000]}}' for i in range(4))
    script.write_text(
        f"#!/bin/sh\necho run >> {tmp_path}/runs\n[ $(wc -l < {tmp_path}/runs) -le {hangs} ] && exec sleep 600\n"
        f"while [ $# -gt 0 ]; do [ $1 = --profile-export-file ] && printf '%s' '{answers}' > $2; shift; done\n"
    )
    script.chmod(0o755)
    program = PerfAnalyzer(script)
    if hangs == 1:
        assert program.measure(Load("m", "grpc", 1, 1), "host:1", tmp_path / "in", 1).faces == 3
    else:
        with pytest.raises(ArcFaceError, match=r"perf_analyzer hung: it did not finish within 4 s, twice\. Check"):
            program.measure(Load("m", "grpc", 1, 1), "host:1", tmp_path / "in", 1)
    assert (tmp_path / "runs").read_text() == "run\n" * 2


def test_a_model_that_the_server_has_not_is_an_error_with_its_reason(server, tmp_path):
    program = _perf_analyzer()
    data = write_input_data(np.zeros((1, 112, 112, 3), np.uint8), tmp_path / "faces.json")
    with pytest.raises(ArcFaceError, match=r"perf_analyzer failed on nonesuch grpc b1 c1 at .*nonesuch"):
        program.measure(Load("nonesuch", "grpc", 1, 1), server.grpc_url, data, 1)


def test_the_log_of_a_server_that_did_not_start_is_there_to_be_read(tmp_path) -> None:
    with (
        pytest.raises(ServerFailed, match=r"arcface_onnx: no weights at .*arcface import") as caught,
        own_server(copy_repository(tmp_path), ["arcface_onnx"], ""),
    ):
        pass
    log = Path(str(caught.value).rpartition("(log: ")[2].removesuffix(")"))
    assert "arcface_onnx" in log.read_text()
    shutil.rmtree(log.parent)


def test_the_host_of_a_report_names_its_gpu_with_units(fake_host) -> None:
    fake_host()
    (gpu,) = describe_host()["gpu"]
    assert (gpu["name"], gpu["sm"], gpu["driver"], gpu["memory_bytes"]) == (
        "NVIDIA A10",
        "8.6",
        "550.54.15",
        23028 << 20,
    )
