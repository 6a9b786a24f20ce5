"""What is served on a CPU is what was measured there: the rule, the table that is kept, and every door to it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from arcface_build.bench.server import still_to_choose
from arcface_build.commands.assemble import command
from arcface_build.commands.bench import command as bench_command
from arcface_build.commands.bench_photos import command as bench_photos
from arcface_build.imports.source import file_digest
from arcface_build.repository.assemble import assemble
from arcface_build.repository.install import roll_back
from arcface_build.repository.integrity import BY_ASSEMBLE
from arcface_build.repository.versions import check_served, served_manifest, versions
from arcface_build.serving.server_runtimes import ServerRuntimes, runtimes_of_host
from arcface_build.serving.variant import check_installed, short_of_memory, take_best_variant
from arcface_build.variants import choose as choosing
from arcface_build.variants.candidates import Candidate, candidates
from arcface_build.variants.choose import Wanted, choose
from arcface_build.variants.fastest import fastest
from arcface_build.variants.gate import VariantVerdict
from arcface_build.variants.measure import measure
from arcface_build.variants.session_process import SessionProcess
from arcface_build.variants.sidecar import set_aside
from arcface_build.variants.speeds import Speed, SpeedTable, host_key, keep_speeds, kept_speeds, speeds_file
from arcface_build.variants.untried import _stand_in, untried
from arcface_clients.engines.runtimes import has_openvino
from arcface_clients.errors import GateFailed, InferenceFailed, Missing, OutOfMemory
from arcface_clients.evidence.drift import DRIFT_LIMITS
from arcface_clients.evidence.gate import GateVerdict
from arcface_clients.evidence.golden import golden_faces
from conftest import copy_repository
from deadlines import wait_until
from test_cpu_path import BF16, FP32, ORT, model_dir
from tiny_model import write_model
from tiny_nets import tiny_net

JUDGED = {"int8": {ORT: 0.008}}
HERE = (ORT,)


def speed(precision: str, runtime: str, *full: float, one: Sequence[float] = ()) -> Speed:
    return Speed(precision, runtime, "ab", tuple(one or full), full, drift=0.0)


FP32_ORT, FP32_OV = speed("fp32", ORT, 10, 10, 10, 10, 10), speed("fp32", FP32, 12, 12, 12, 12, 12)
BF16_OV, INT8_OV = speed("bf16", BF16, 20, 20, 20, 20, 20), speed("int8", BF16, 30, 30, 30, 30, 30)


@pytest.mark.parametrize(
    ("speeds", "goal", "taken", "runner_up"),
    [
        ([FP32_ORT, FP32_OV, BF16_OV, INT8_OV], "throughput", "int8 in openvino-bf16", "bf16 in openvino-bf16"),
        ([FP32_ORT], "throughput", "fp32 in onnxruntime", None),
        ([FP32_ORT, FP32_OV], "throughput", "fp32 in openvino-fp32", "fp32 in onnxruntime"),
        # Level within 3 %: the more exact one, and of two that are equally exact ONNX Runtime's own kernels.
        ([BF16_OV, speed("int8", BF16, *5 * [20.5])], "throughput", "bf16 in openvino-bf16", "int8 in openvino-bf16"),
        ([FP32_ORT, speed("fp32", FP32, *5 * [10.2])], "throughput", "fp32 in onnxruntime", "fp32 in openvino-fp32"),
        ([FP32_ORT, speed("int8", ORT, *5 * [10.4])], "throughput", "int8 in onnxruntime", "fp32 in onnxruntime"),
        # bf16 is level with int8, fp32 is not.
        (
            [FP32_ORT, BF16_OV, speed("int8", FP32, *5 * [20.5])],
            "throughput",
            "bf16 in openvino-bf16",
            "int8 in openvino-fp32",
        ),
        # A lead that two of five rounds did not see is noise; one disturbed round does not hide a lead.
        ([FP32_ORT, speed("int8", ORT, 20, 20, 20, 9, 9)], "throughput", "fp32 in onnxruntime", "int8 in onnxruntime"),
        ([FP32_ORT, speed("int8", ORT, 20, 20, 20, 20, 5)], "throughput", "int8 in onnxruntime", "fp32 in onnxruntime"),
        # A machine that slows down hits both of a round.
        (
            [speed("fp32", ORT, 10, 5, 10, 5, 10), speed("int8", ORT, 11, 5.5, 11, 5.5, 11)],
            "throughput",
            "int8 in onnxruntime",
            "fp32 in onnxruntime",
        ),
        # Slow for a lone face, fast for many.
        ([FP32_ORT, speed("int8", ORT, 30, one=[5])], "throughput", "int8 in onnxruntime", "fp32 in onnxruntime"),
        ([speed("fp32", ORT, 10), speed("int8", ORT, 30, one=[5])], "latency", "fp32 in onnxruntime", "int8 in onnx"),
        ([speed("fp32", ORT, 10), speed("int8", ORT, 5, one=[30])], "latency", "int8 in onnxruntime", "fp32 in onnx"),
    ],
)
def test_the_fastest_is_served_and_level_ones_by_exactness(speeds, goal, taken, runner_up):
    rounds = max(len(one.full) for one in speeds)
    same = [Speed(*one.key, rounds * one.one[:1] if len(one.one) == 1 else one.one,
                  rounds * one.full[:1] if len(one.full) == 1 else one.full) for one in speeds]  # fmt: skip
    for order in (same, same[::-1]):
        chosen, following = fastest(order, goal)
        assert chosen.name == taken
        assert following is None if runner_up is None else following.name.startswith(runner_up)


class Stopwatch:
    """Measures nothing: gives these rates by precision, and counts how often it was asked."""

    def __init__(self, rates: dict[str, float], one: dict[str, float] | None = None) -> None:
        self.rates, self.one, self.asked = rates, one or rates, 0

    def __call__(self, model_dir: Path, found: Sequence[Candidate], missing=()) -> SpeedTable:
        self.asked += 1
        return table_of([*found, *missing], self.rates, self.one)


def table_of(found: Sequence[Candidate], full: dict[str, float], one: dict[str, float]) -> SpeedTable:
    entries = [Speed(*each.key, (one[each.precision],) * 5, (full[each.precision],) * 5, 0.0) for each in found]
    return SpeedTable(8, tuple(entries))


@pytest.fixture
def watch(monkeypatch):
    """int8 is three times as fast as fp32."""
    stopwatch = Stopwatch({"fp32": 10.0, "bf16": 20.0, "int8": 30.0})
    monkeypatch.setattr(choosing, "measure", stopwatch)
    return stopwatch


def test_it_is_measured_once_on_a_host_and_again_when_asked(tmp_path, watch):
    folder, said = model_dir(tmp_path, **JUDGED), []
    first = choose(folder, None, HERE, say=said.append)
    assert said == ["measuring 2 ways to run tiny on this CPU, once: seconds, or a minute or two for a large model"]
    assert first.reason.startswith(
        "int8 in onnxruntime: 30 faces/s, 3.00 × fp32 in onnxruntime (measured on this CPU at batch 8, for throughput);"
        " it passed its gate with drift 0.008; not bf16: none that passed its gate"
    )
    assert choose(folder, None, HERE) == first and watch.asked == 1
    assert choose(folder, None, HERE, wanted=Wanted(goal="latency")).reason.startswith(
        "int8 in onnxruntime: 33.3 ms a face, 3.00 × fp32 in onnxruntime (measured on this CPU at batch 1, for latency)"
    )
    assert watch.asked == 1, "both goals are in one table"
    assert choose(folder, None, HERE, wanted=Wanted(remeasure=True)) == first and watch.asked == 2


def test_what_was_measured_on_another_host_is_not_believed_and_stays_in_the_file(tmp_path, watch, monkeypatch):
    folder = model_dir(tmp_path, **JUDGED)
    keep_speeds(folder, "another CPU", table_of(candidates(folder, None, HERE)[0], *2 * [{"fp32": 99.0, "int8": 1.0}]))
    assert choose(folder, None, HERE).precision == "int8" and watch.asked == 1
    monkeypatch.setattr(choosing, "host_key", lambda: "another CPU")
    assert choose(folder, None, HERE).precision == "fp32" and watch.asked == 1


def test_what_does_not_run_in_the_memory_of_this_host_is_not_served_and_not_tried_again(tmp_path, watch):
    folder = model_dir(tmp_path, **JUDGED)
    fp32, int8 = candidates(folder, None, HERE)[0]
    slow = Speed(*fp32.key, *2 * [5 * (10.0,)], 0.0, memory=1 << 30)
    keep_speeds(folder, host_key(), SpeedTable(8, (slow, Speed(*int8.key, (), (), memory=2 << 30))))
    taken = choose(folder, None, HERE)
    assert taken.precision == "fp32" and taken.measured["memory_bytes"] == 1 << 30
    assert "not int8 in onnxruntime: it does not run in the 2.0 GB that a process of the server may" in taken.reason
    assert not watch.asked


def test_a_form_that_was_chosen_where_there_was_more_memory_is_named_should_it_not_load(tmp_path, monkeypatch):
    served = {"name": "large", "choice": {"memory_bytes": 3 << 30}}
    monkeypatch.setattr("arcface_build.serving.variant.server_memory_limit", lambda: 3 << 30)
    assert short_of_memory(served) == short_of_memory({"name": "older"}) == ""
    monkeypatch.setattr("arcface_build.serving.variant.server_memory_limit", lambda: 2 << 30)
    told = "it took 3.0 GB where it was chosen, and a process of the server may take 2.0 GB here. Give it more memory, "
    assert short_of_memory(served) == told + "or have it chosen here: arcface assemble large --variant auto"


def test_a_candidate_that_takes_all_memory_ends_its_own_process_and_is_kept_as_too_large(tmp_path, monkeypatch):
    folder = model_dir(tmp_path, **JUDGED)
    found, _ = candidates(folder, None, HERE)
    with closing(SessionProcess(folder / "serving.onnx", ORT, "small")) as session:
        session.embed(np.resize(golden_faces(), (64, 112, 112, 3)))
        enough = session.memory
    limit = int(enough / 0.9) + (200 << 20)
    monkeypatch.setattr("arcface_build.variants.measure.server_memory_limit", lambda: limit)
    monkeypatch.setattr("arcface_build.variants.session_process.server_memory_limit", lambda: limit)
    heavy = onnx.load(folder / "serving.onnx")
    heavy.graph.initializer.append(numpy_helper.from_array(np.ones(100 << 20, np.float32), "ballast"))
    heavy.graph.node.append(helper.make_node("ReduceSum", ["ballast"], ["weighed"], keepdims=0))
    heavy.graph.output.append(helper.make_tensor_value_info("weighed", TensorProto.FLOAT, []))
    onnx.save(heavy, folder / found[1].file)
    table = measure(folder, found)
    fp32, int8 = table.speeds
    assert fp32.full and 0 < fp32.memory <= limit and not fp32.too_large and not table.failed
    assert not int8.full and int8.memory == limit and int8.too_large
    keep_speeds(folder, host_key(), table)
    assert kept_speeds(folder, host_key()) == table


@pytest.mark.parametrize(
    ("killed_at", "left"), [((0,), ["int8"]), ((5,), ["fp32"]), ((4, 7), [])], ids=["fp32", "int8", "both"]
)
def test_a_candidate_that_is_killed_while_it_is_timed_leaves_the_others_to_be_served(
    tmp_path, monkeypatch, killed_at, left
):
    rate, calls = SessionProcess.rate, []

    def under_pressure(session: SessionProcess, *arguments) -> float:
        if len(calls) in killed_at:  # as the kernel does where all of them need more than there is
            os.kill(session._child.pid, signal.SIGKILL)
        calls.append(session)
        return rate(session, *arguments)

    monkeypatch.setattr(SessionProcess, "rate", under_pressure)
    folder = model_dir(tmp_path, **JUDGED)
    table = measure(folder, candidates(folder, None, HERE)[0])
    assert [speed.precision for speed in table.speeds] == left and all(len(speed.full) == 5 for speed in table.speeds)
    assert len(table.failed) == 2 - len(left) and all("was killed" in why for why in table.failed.values())
    assert all(session._child.returncode is not None for session in calls)


@pytest.mark.parametrize(
    ("number", "error", "said"),
    [
        (signal.SIGKILL, OutOfMemory, r"tiny: its process was killed, as the kernel does where the [\d.]+ GB"),
        (signal.SIGSEGV, InferenceFailed, r"tiny crashes its runtime \(SIGSEGV\)"),
    ],
)
def test_a_candidate_that_crashes_is_one_error(tmp_path, number, error, said):
    with closing(SessionProcess(model_dir(tmp_path) / "serving.onnx", ORT, "tiny", 64 << 30)) as session:
        os.kill(session._child.pid, number)
        with pytest.raises(error, match=said):
            session.embed(golden_faces())


def test_the_process_of_a_candidate_ends_with_whoever_tries_it(tmp_path):
    opened = "from pathlib import Path; from arcface_build.variants.session_process import SessionProcess as S\n"
    opened += f"s = S(Path({str(model_dir(tmp_path) / 'serving.onnx')!r}), 'onnxruntime', 'tiny')\n"
    opened += "print(s._child.pid, flush=True); import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", opened], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    stat = Path(f"/proc/{child}/stat")
    wait_until(lambda: not stat.exists() or " Z " in stat.read_text(), "it is still there", 10)


def test_a_host_is_known_by_cpu_cores_and_onnx_runtime(monkeypatch):
    import onnxruntime

    here = host_key()
    for name, value in {"cpu_name": "another", "cpu_flags": frozenset({"sse2"}), "available_cores": 999}.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"arcface_build.variants.speeds.{name}", lambda value=value: value)
            assert host_key() != here
    with monkeypatch.context() as patch:
        patch.setattr("arcface_build.variants.speeds.server_memory_limit", lambda: 1 << 30)
        assert host_key() != here
    monkeypatch.setattr(onnxruntime, "__version__", "0.1")
    assert host_key() != here


def test_a_variant_that_was_made_again_is_measured_again(tmp_path, watch):
    folder = model_dir(tmp_path, **JUDGED)
    choose(folder, None, HERE)
    again = onnx.load(folder / "serving.onnx")
    again.doc_string = "made again"
    onnx.save(again, folder / "variants" / "int8-cpu.onnx")
    choose(folder, None, HERE)
    assert watch.asked == 2


DAMAGED = {
    "empty": "",
    "cut short": '{"format": 3, "hosts": {',
    "a list": "[]",
    "of a former format": '{"cpu": "HOST", "batch": 8, "ratio": {"int8": 0.1, "fp32": 1.0}}',
    "hosts are a list": '{"format": 3, "hosts": []}',
    "a host is a number": '{"format": 3, "hosts": {"HOST": 3}}',
    "no batch": '{"format": 3, "hosts": {"HOST": {"speeds": []}}}',
    "not UTF-8": "\udcff",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_measured_again_and_written_whole(tmp_path, watch, text):
    folder = model_dir(tmp_path, **JUDGED)
    text = text.replace("HOST", host_key())
    speeds_file(folder).write_bytes(text.encode(errors="surrogateescape"))
    assert choose(folder, None, HERE).precision == "int8" and watch.asked == 1
    assert choose(folder, None, HERE).precision == "int8" and watch.asked == 1
    assert kept_speeds(folder, host_key()).full_batch == 8


@pytest.mark.parametrize("rate", ["NaN", "Infinity", "-1", "0", "true", '"30"', "null"])
def test_a_rate_that_is_none_is_not_believed(tmp_path, watch, rate):
    folder = model_dir(tmp_path, **JUDGED)
    choose(folder, None, HERE)
    speeds_file(folder).write_text(speeds_file(folder).read_text().replace("30.0", rate, 1))
    choose(folder, None, HERE)
    assert watch.asked == 2


def test_a_runtime_that_is_gone_takes_no_part(tmp_path, watch):
    folder = model_dir(tmp_path, int8={FP32: 0.008}, bf16={BF16: 0.0008})
    assert choose(folder, None, (BF16, FP32, ORT)).runtime == FP32
    choice = choose(folder, None, HERE)
    assert (choice.precision, choice.runtime) == ("fp32", ORT)
    assert "not int8: int8 passed its gate in openvino-fp32, but this host has onnxruntime" in choice.reason
    assert watch.asked == 1


def test_a_folder_that_may_not_be_written_is_measured_each_time(tmp_path, watch, caplog):
    folder = model_dir(tmp_path, **JUDGED)
    speeds_file(folder).mkdir()
    for times in (1, 2):
        assert choose(folder, None, HERE).precision == "int8" and watch.asked == times
    assert "what was measured is not kept" in caplog.text


def test_a_precision_that_is_asked_for_is_obeyed_unmeasured(tmp_path, watch):
    watch.rates |= {"int8": 1.0}
    folder, repository = model_dir(tmp_path, **JUDGED), copy_repository(tmp_path)
    assemble(folder, repository)
    take = partial(take_best_variant, repository, folder.parent, 3, DRIFT_LIMITS, lambda: ServerRuntimes(HERE))
    assert take(Wanted(precision="int8")).startswith("int8 in onnxruntime, as asked for; it passed its gate with drift")
    assert served_manifest(repository)["precision"] == "int8" and watch.asked == 0
    with pytest.raises(GateFailed, match=r"bf16 of tiny is not served: none that passed its gate"):
        take(Wanted(precision="bf16"))
    with pytest.raises(GateFailed, match=r"int8 of tiny is not served: drift 0\.008, 8\.0 × the limit 0\.001 for int8"):
        choose(folder, {"int8": 0.001}, HERE, wanted=Wanted(precision="int8"))
    assert take(Wanted()).startswith("fp32 in onnxruntime: 10 faces/s, 10.00 × int8 in onnxruntime")


def test_where_there_is_no_room_for_the_fastest_what_is_installed_stays(tmp_path, watch):
    folder, repository = model_dir(tmp_path, **JUDGED), copy_repository(tmp_path)
    assemble(folder, repository)
    before, limits = served_manifest(repository), resource.getrlimit(resource.RLIMIT_FSIZE)
    take = partial(take_best_variant, repository, folder.parent, 3, DRIFT_LIMITS, lambda: ServerRuntimes(HERE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a full disk, as far as the weights are concerned
    try:
        assert take() == "fp32 as installed: int8 in onnxruntime could not be installed (File too large)"
        with pytest.raises(OSError, match="File too large"):
            take(Wanted(precision="int8"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert served_manifest(repository) == before and not list(repository.glob("*/.*"))
    assert take().startswith("int8 in onnxruntime")


def test_a_precision_that_is_asked_for_undoes_a_rollback_and_auto_does_not(tmp_path, watch):
    folder, repository = model_dir(tmp_path, **JUDGED), copy_repository(tmp_path)
    assemble(folder, repository)
    take = partial(take_best_variant, repository, folder.parent, 3, DRIFT_LIMITS, lambda: ServerRuntimes(HERE))
    assert take(Wanted()).startswith("int8")
    roll_back(repository, "arcface_onnx")
    assert take(Wanted(remeasure=True)).startswith("fp32 as installed: arcface rollback went back to it")
    assert take(Wanted(precision="int8")).startswith("int8")
    with pytest.raises(
        Missing,
        match=r"cannot serve fp32: .* does not hold this model.* serve --variant installed",
    ):
        take_best_variant(repository, tmp_path, 3, DRIFT_LIMITS, lambda: ServerRuntimes(HERE), Wanted(precision="fp32"))


@pytest.mark.parametrize("asked", ["fp32", "int8"])
def test_a_precision_that_assemble_was_asked_for_by_name_stays_until_the_fastest_is_asked_for(tmp_path, watch, asked):
    folder, repository = model_dir(tmp_path, **JUDGED), copy_repository(tmp_path)
    here = runtimes_of_host(print).here
    if "int8" not in {one.precision for one in candidates(folder, DRIFT_LIMITS, here)[0]}:
        pytest.skip("no runtime here computes the int8 of this test")
    other = "fp32" if asked == "int8" else "int8"
    watch.rates |= {asked: 1.0, other: 30.0}

    def install(*variant: str) -> str:
        line = ["tiny", "--models-dir", str(folder.parent), "--model-repository", str(repository), *variant]
        return CliRunner().invoke(command, line, catch_exceptions=False).stdout

    def served_by_serve() -> tuple[str, str]:
        take = partial(take_best_variant, repository, folder.parent, 3, DRIFT_LIMITS)
        said = take(lambda: ServerRuntimes(here))
        return said, served_manifest(repository).get("precision", "fp32")

    back = "(the fastest instead: arcface assemble tiny --variant auto)"
    assert f"arcface serve leaves it so {back}" in install("--variant", asked)
    assert served_by_serve() == (f"{asked} as installed: arcface assemble --variant asked for it {back}", asked)
    if asked == "fp32":
        install()  # the same weights, and nothing else asked for
        assert served_by_serve()[1] == asked
    install("--variant", "auto")
    assert served_by_serve()[1] == other
    watch.rates |= {asked: 99.0}
    speeds_file(folder).unlink()
    assert served_by_serve()[1] == asked, "and serve chooses again"


@pytest.mark.parametrize("held", [BY_ASSEMBLE, ""], ids=["held", "not held"])
def test_what_failed_its_gate_after_it_was_installed_is_served_by_no_door(tmp_path, watch, held):
    folder, repository = model_dir(tmp_path, **JUDGED), copy_repository(tmp_path)
    file = folder / "variants" / "int8-cpu.json"
    sidecar = json.loads(file.read_text()) | {"target": "cpu", "recipe": {}}
    sidecar["sha256"] = file_digest(folder / sidecar["file"])
    file.write_text(json.dumps(sidecar))
    assemble(folder, repository)
    assemble(folder, repository, choose(folder, None, HERE, wanted=Wanted(precision="int8")), held=held)
    server, said = lambda: ServerRuntimes(HERE), []
    take = partial(take_best_variant, repository, folder.parent, 3, DRIFT_LIMITS, server, say=said.append)
    installed = partial(check_installed, served_manifest(repository), server, DRIFT_LIMITS, folder.parent)
    installed()
    other = folder / "variants" / "int8-cpu.json.refused"
    other.write_text(json.dumps(sidecar | {"sha256": "6" * 64}))  # another try, which failed, condemns nothing
    installed()
    other.write_text(json.dumps(sidecar))  # nor does one with the same file, while the sidecar that passed is there
    installed()
    assert take().startswith("int8")
    gate = GateVerdict("int8", 0.01, 0.02, 9, "drift 0.02 is 2 × the limit 0.01 for int8")
    verdict = VariantVerdict(ORT, gate, None, 0.005)
    set_aside(folder, sidecar, "9 faces of others", verdict)  # as quantize --verify does
    since = r"which failed its gate on other faces since \(in onnxruntime on 9 faces of others: drift 0.02 is 2 ×"
    with pytest.raises(GateFailed, match=f"holds int8 of tiny, {since}"):
        installed()
    retired = json.loads(other.read_text())["retired"]
    other.write_text(json.dumps(sidecar | {"sha256": "6" * 64, "retired": retired}))  # a new try, which failed
    with pytest.raises(GateFailed, match=since):
        installed()
    file.write_text(json.dumps(sidecar | {"sha256": "7" * 64, "retired": retired}))  # one that passed
    other.unlink()
    with pytest.raises(GateFailed, match=since):
        installed()
    file.unlink()
    other.write_text(json.dumps(sidecar | {"retired": retired}))
    with pytest.raises(GateFailed, match="int8 of tiny is not served: none that passed its gate"):
        take(wanted=Wanted(precision="int8"))
    assert take().startswith("fp32 in onnxruntime") and served_manifest(repository).get("precision") == "fp32"
    assert any("int8 of tiny is not served any more: it failed its gate since (in onnxr" in one for one in said)


def test_a_bench_of_what_nobody_has_chosen_yet_says_so(tmp_path, watch, monkeypatch):
    monkeypatch.setattr("arcface_build.bench.server.gpu_sm", lambda: None)
    folder, repository = model_dir(tmp_path, **JUDGED), copy_repository(tmp_path)
    assert still_to_choose(repository, "onnx") == ""
    assemble(folder, repository)
    told = still_to_choose(repository, "onnx")
    assert told.startswith("measuring tiny in fp32 in onnxruntime, as it was installed")
    assert told.endswith("arcface assemble tiny --variant auto") and still_to_choose(repository, "reference") == ""
    for bench, refused in ((bench_command, ["--model", "nosuch"]), (bench_photos, [str(tmp_path)])):
        assert told in CliRunner().invoke(bench, [*refused, "--model-repository", str(repository)]).stderr, bench
    take_best_variant(repository, folder.parent, 3, DRIFT_LIMITS, lambda: ServerRuntimes(HERE))
    assert still_to_choose(repository, "onnx") == ""
    roll_back(repository, "arcface_onnx")
    assert still_to_choose(repository, "onnx") == "", "a rollback is a choice"
    watch.rates |= {"fp32": 99.0}
    assemble(folder, repository, choose(folder, None, HERE, wanted=Wanted(remeasure=True)), held="")
    assert still_to_choose(repository, "onnx") == "", "fp32 in onnxruntime was measured to be the fastest"


def test_a_precision_beside_a_plan_is_wrong_use(tmp_path):
    folder, repository = model_dir(tmp_path), copy_repository(tmp_path)
    line = ["tiny", "--models-dir", str(folder.parent), "--model-repository", str(repository)]
    result = CliRunner().invoke(command, [*line, "--plan", "a.plan", "--variant", "int8"])
    assert result.exit_code == 2 and "--variant is for arcface_onnx, --plan for arcface_trt" in result.output


def test_a_precision_asked_for_by_name_is_held_where_it_is_installed_already(tmp_path, watch):
    folder, repository = model_dir(tmp_path, **JUDGED), copy_repository(tmp_path)
    assemble(folder, repository)
    assemble(folder, repository, held=BY_ASSEMBLE)
    assert versions(repository / "arcface_onnx") == [1] and served_manifest(repository)["held"] == BY_ASSEMBLE
    check_served(repository, "arcface_onnx")
    assemble(folder, repository, held="")
    assert "held" not in served_manifest(repository)


def test_the_choice_travels_in_the_manifest_and_new_figures_are_no_new_version(tmp_path, watch):
    folder, repository = model_dir(tmp_path, **JUDGED), copy_repository(tmp_path)
    assemble(folder, repository, choose(folder, None, HERE))
    told = served_manifest(repository)["choice"]
    assert told["goal"] == "throughput" and told["host"] == host_key() and told["runner_up"] == "fp32 in onnxruntime"
    rates = {"latency_ms": 33.333, "faces_per_s": 30.0}
    assert {"precision": "int8", "runtime": ORT, **rates, "memory_bytes": 0, "drift": 0.0} in told["speeds"]
    watch.rates |= {"int8": 40.0}
    assemble(folder, repository, choose(folder, None, HERE, wanted=Wanted(remeasure=True)))
    assert versions(repository / "arcface_onnx") == [1]
    assert served_manifest(repository)["choice"]["reason"].startswith("int8 in onnxruntime: 40 faces/s, 4.00 ×")


@pytest.mark.skipif(not has_openvino(), reason="ONNX Runtime without OpenVINO")
def test_fp32_in_openvino_is_installed_as_such_where_it_is_faster(tmp_path, monkeypatch):
    def openvino_first(model_dir: Path, found: Sequence[Candidate], *_: object) -> SpeedTable:
        return SpeedTable(
            8, tuple(Speed(*one.key, *2 * [(9.0 if one.runtime == ORT else 10.0,)], 0.0) for one in found)
        )

    monkeypatch.setattr(choosing, "measure", openvino_first)
    folder, repository = model_dir(tmp_path), copy_repository(tmp_path)
    assemble(folder, repository, choose(folder, None, (FP32, ORT)))
    overlay = (repository / "arcface_onnx" / "configs" / "onnx.pbtxt").read_text()
    assert 'name: "openvino" parameters { key: "precision" value: "fp32" }' in overlay
    with pytest.raises(Missing, match="holds fp32 of tiny, which may not run on this host: it is set up for openvino"):
        check_installed(served_manifest(repository) or {}, lambda: ServerRuntimes(HERE), DRIFT_LIMITS)


def test_the_goal_of_the_configuration_decides(tmp_path):
    folder, repository = model_dir(tmp_path, **JUDGED), copy_repository(tmp_path)
    found, _ = candidates(folder, DRIFT_LIMITS, runtimes_of_host(print).here)
    if "int8" not in {one.precision for one in found}:
        pytest.skip("no runtime here computes the int8 of this test")
    keep_speeds(folder, host_key(), table_of(found, {"fp32": 10.0, "int8": 30.0}, {"fp32": 20.0, "int8": 10.0}))
    line = ["tiny", "--variant", "auto", "--json", "--models-dir", str(folder.parent)]
    line += ["--model-repository", str(repository)]
    for goal, precision in (("throughput", "int8"), ("latency", "fp32")):
        answer = json.loads(CliRunner(env={"ARCFACE_GOAL": goal}).invoke(command, line).stdout)
        assert answer["reason"].startswith(precision) and answer["measured"]["goal"] == goal


def test_real_measuring_covers_both_batches_in_seconds(tmp_path):
    folder = model_dir(tmp_path, **JUDGED)
    found, _ = candidates(folder, None, HERE)
    table = measure(folder, found)
    assert [one.name for one in table.speeds] == ["fp32 in onnxruntime", "int8 in onnxruntime"]
    assert all(len(one.one) == len(one.full) == 5 and min(one.one + one.full) > 0 for one in table.speeds)
    assert 4 <= table.full_batch <= 64 and not table.failed
    keep_speeds(folder, host_key(), table)
    assert kept_speeds(folder, host_key()) == table


def test_what_cannot_be_opened_is_named_and_the_rest_is_served(tmp_path):
    folder = model_dir(tmp_path, **JUDGED)
    (folder / "variants" / "int8-cpu.onnx").write_bytes(b"no graph")
    choice = choose(folder, None, HERE)
    assert (choice.precision, choice.runtime) == ("fp32", ORT)
    assert "fp32 in onnxruntime, the only one that may run here" in choice.reason
    assert "not int8 in onnxruntime: variants/int8-cpu.onnx: ONNX Runtime cannot load the graph" in choice.reason
    assert not speeds_file(folder).exists(), "it may be mended: not kept"


@pytest.mark.skipif(not has_openvino(), reason="ONNX Runtime without OpenVINO")
def test_fp32_that_another_runtime_computes_differently_is_judged_by_the_limit_of_the_day(tmp_path):
    folder = model_dir(tmp_path)
    write_model(tmp_path / "drifting", error=0.1)
    (folder / "drifting.onnx").write_bytes((tmp_path / "drifting" / "serving.onnx").read_bytes())
    found = [Candidate("fp32", ORT, "serving.onnx", "a"), Candidate("fp32", FP32, "drifting.onnx", "b")]
    table = measure(folder, found)
    keep_speeds(folder, host_key(), table)
    kept = kept_speeds(folder, host_key())
    assert kept == table and kept.speeds[0].drift < 1e-9
    refused = choosing._refused(kept.speeds, DRIFT_LIMITS)
    assert list(refused) == ["fp32 in openvino-fp32"] and "× the limit 1e-05 for fp32" in refused[found[1].name]
    assert not choosing._refused(kept.speeds, {**DRIFT_LIMITS, "fp32": 2 * kept.speeds[1].drift})


@pytest.mark.skipif(not has_openvino(), reason="ONNX Runtime without OpenVINO")
def test_fp32_in_another_runtime_is_not_compared_with_itself_where_the_proved_one_does_not_load(tmp_path):
    folder = model_dir(tmp_path)
    (folder / "broken.onnx").write_bytes(b"no graph")
    found = [Candidate("fp32", ORT, "broken.onnx", "a"), Candidate("fp32", FP32, "serving.onnx", "b")]
    table = measure(folder, found)
    assert not table.speeds
    assert "nothing to compare it with" in table.failed["fp32 in openvino-fp32"]


def test_ctrl_c_while_measuring_leaves_nothing_half_and_no_process(tmp_path, monkeypatch):
    rate, calls = SessionProcess.rate, []

    def interrupted(session: SessionProcess, *arguments) -> float:
        calls.append(session)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return rate(session, *arguments)

    monkeypatch.setattr(SessionProcess, "rate", interrupted)
    folder, repository = model_dir(tmp_path, **JUDGED), copy_repository(tmp_path)
    assemble(folder, repository)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(KeyboardInterrupt):
        take_best_variant(repository, folder.parent, 3, DRIFT_LIMITS, lambda: ServerRuntimes(HERE))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert len({session._child.pid for session in calls}) == 2
    assert all(session._child.returncode is not None for session in calls)


def test_a_fresh_import_is_told_what_would_win(tmp_path, watch):
    folder, repository = model_dir(tmp_path), copy_repository(tmp_path)
    assemble(folder, repository)
    server = ServerRuntimes((FP32, ORT))
    said = take_best_variant(repository, folder.parent, 3, DRIFT_LIMITS, lambda: server)
    assert said.splitlines()[1:] == [
        "int8 would be faster: tiny ran 3.0 × as fast here with every layer but the first in int8 (the gate will keep "
        "some in float). Next: arcface quantize tiny --precision int8 --eval FOLDER_OF_CROPS"
    ]
    assert served_manifest(repository).get("precision", "fp32") == "fp32"
    asked = Wanted(remeasure=True)
    assert choose(folder, None, (BF16, FP32, ORT), wanted=asked).offer.startswith("int8 would be faster")
    watch.rates |= {"int8": 13.0, "bf16": 12.0}
    assert choose(folder, None, (BF16, FP32, ORT), wanted=asked).offer == (
        "bf16 would be faster: tiny ran 1.2 × as fast here. Next: arcface quantize tiny --precision bf16"
    )
    assert choose(folder, None, (FP32, ORT), wanted=asked).offer == ""


@pytest.mark.parametrize("known", ["demo", "made", "refused", "no OpenVINO"])
def test_nothing_is_offered_that_is_pointless_or_was_tried(tmp_path, known):
    folder = model_dir(tmp_path, **(JUDGED if known == "made" else {}))
    if known == "refused":
        (folder / "variants" / "int8-cpu.json.refused").write_text("{}")
    if known == "demo":
        told = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**told, "source": {**told["source"], "kind": "demo"}}))
    assert untried(folder, HERE if known == "no OpenVINO" else (FP32, ORT)) == []


def test_the_stand_in_for_int8_quantises_every_convolution_but_the_first(tmp_path):
    onnx.save(tiny_net(), tmp_path / "net.onnx")
    made = _stand_in(tmp_path / "net.onnx")
    convolutions = [node for node in made.graph.node if node.op_type == "Conv"]
    quantised = {node.output[0] for node in made.graph.node if node.op_type == "DequantizeLinear"}
    assert [node.input[1] in quantised for node in convolutions] == [False] + [True] * (len(convolutions) - 1)


def test_one_that_nobody_asked_for_may_fail_in_silence(tmp_path):
    folder = model_dir(tmp_path, **JUDGED)
    found, _ = candidates(folder, None, HERE)

    def broken() -> onnx.ModelProto:
        raise RuntimeError("no")

    table = measure(folder, found, [Candidate("int8", FP32, "serving.onnx", "stand-in", made=broken)])
    assert len(table.speeds) == 2 and not table.failed
