"""What holds for every command: options that mean the same everywhere, refusals before any work, names of old."""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from arcface_build.cli import cli
from arcface_build.commands.options.numbers import FiniteNumber
from arcface_build.commands.options.output import NewFile
from arcface_build.old_command_lines import translated
from arcface_clients.atomic import write_json
from arcface_clients.errors import WrongUse
from arcface_clients.plans.manifest import manifest_path
from conftest import REPO
from deadlines import HANG_S
from plan_samples import write_plan

MAIN = [sys.executable, "-c", "from arcface_build.program import main; main()"]


def arcface(*arguments: object, cwd: Path = REPO, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [*MAIN, *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(line, capture_output=True, text=True, timeout=HANG_S, cwd=cwd, env=env, check=False)


def leaves(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        else:
            assert command is not None
            yield " ".join((*path, name)), command


COMMANDS = dict(leaves())


def option(command: click.Command, name: str) -> click.Option | None:
    return next((p for p in command.params if isinstance(p, click.Option) and name in p.opts), None)


@pytest.mark.parametrize("name", COMMANDS)
def test_json_quiet_and_config_mean_the_same_in_every_command(name):
    command = COMMANDS[name]
    for flag in ("--json", "--quiet"):
        found = option(command, flag)
        assert found is not None and found.is_flag, f"arcface {name} {flag}"
    assert option(command, "--config") is not None
    for files in ("--report", "--html", "--csv"):
        found = option(command, files)
        assert found is None or isinstance(found.type, NewFile)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example_of_itself(name):
    command = COMMANDS[name]
    assert f"arcface {name}" in f"{command.help}{command.epilog}"
    assert command.help and command.help.strip()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_has_to_be_finite(name):
    for parameter in COMMANDS[name].params:
        if isinstance(parameter.type, click.types.FloatParamType | click.FloatRange):
            assert isinstance(parameter.type, FiniteNumber), f"arcface {name} {parameter.opts[0]} takes nan"


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "line",
    [
        "bench --margin {}",
        "tune --sample-s {}",
        "quantize m --precision int8 --max-drift {}",
        "compare a b --max-drift {}",
    ],
)
def test_nan_and_inf_are_refused(line, text):
    done = arcface(*line.format(text).split())
    assert done.returncode == 2
    assert "is not a finite number" in done.stderr or "is not in the range" in done.stderr


def test_mean_and_std_of_an_import_are_finite_too(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"")
    done = arcface("import", tmp_path / "m.onnx", "--mean", "nan", "--std", "1")
    assert (done.returncode, "--mean is 'nan': expected one number, or three" in done.stderr) == (2, True)


def test_nan_in_a_variable_is_refused():
    done = arcface("parity", ARCFACE_COMPARISON__MAX_DRIFT__FP32="nan")
    assert done.returncode == 2 and "comparison.max_drift.fp32: got 'nan'" in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "bench --json out.json",
        "matrix --json=out.json",
        "compare a b --json -",
        "tune --json x/y.json",
        "parity --json -",
    ],
)
def test_a_file_after_json_is_answered_by_the_option_that_writes_it(line):
    done = arcface(*line.split())
    assert done.returncode == 2
    assert "--json takes no file: it prints the result. Next: " in done.stderr
    assert ("--report" in done.stderr) == (not line.endswith("-"))


@pytest.mark.parametrize("name", [n for n, c in COMMANDS.items() if option(c, "--report") or option(c, "--html")])
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(name, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ["a", "b"][: sum(isinstance(p, click.Argument) and p.required for p in COMMANDS[name].params)]
    for where in (tmp_path, tmp_path / "file" / "report.json"):
        done = arcface(*name.split(), *arguments, "--report", where)
        assert done.returncode == 2, done.stderr
        assert "Invalid value for '--report'" in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("typed", "meant"), [("servve", "serve"), ("quantise", "quantize"), ("docter", "doctor"), ("plan biuld", "build")]
)
def test_a_mistyped_command_is_answered_with_the_right_one(typed, meant):
    done = arcface(*typed.split())
    assert done.returncode == 2
    assert f"did you mean '{meant}'?" in done.stderr


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("bench-clients", "scripts/bench clients"),
        ("bench-vectors", "scripts/bench vectors"),
        ("consensus-demo", "scripts/consensus-demo"),
    ],
)
def test_a_command_that_left_says_where_it_went(name, home):
    done = arcface(name)
    assert done.returncode == 2 and f"in a checkout, run {home}." in done.stderr


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ("build x.onnx --fp16", "plan build x.onnx --precision fp16"),
        ("build --onnx x.onnx --fp16", "plan build x.onnx --precision fp16"),
        ("build --onnx-path x.onnx --max-batch-size 8", "plan build x.onnx --max-batch 8"),
        (
            "--mode build --onnx-path x.onnx --engine-path plans/x.plan --precision fp16",
            "plan build x.onnx --output plans --precision fp16",
        ),
        ("--mode=build --onnx-path=x.onnx --workspace-gb=2", "plan build x.onnx --workspace 2GB"),
        (
            "--mode compare --onnx-path x.onnx --engine-path x.plan --num-samples 9",
            "compare x.onnx x.plan --n-samples 9",
        ),
        ("benchmark --batch-size 8", "bench --batch 8"),
        ("--mode benchmark --onnx-path x.onnx", "bench --onnx x.onnx"),
        ("info --engine-path x.plan", "plan show x.plan"),
        ("info --engine x.plan", "plan show x.plan"),
        ("info x.plan --json", "plan show x.plan --json"),
        ("upload --engine-path x.plan --s3-bucket models", "plan push x.plan --store s3://models/plans"),
    ],
)
def test_a_command_line_of_old_is_one_of_today(old, now):
    words, told = translated(shlex.split(old))
    assert shlex.join(words) == now
    assert told == f"an old name; use: arcface {now}"


@pytest.mark.parametrize(
    "today", ["compare a b", "plan build x.onnx", "embed build -o x.npz", "serve -- --mode x", "", "--help"]
)
def test_a_command_line_of_today_is_left_alone(today):
    assert translated(shlex.split(today)) == (shlex.split(today), None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--mode train", "--mode train: expected one of build, compare, benchmark, info, upload"),
        ("--mode", "--mode needs a value"),
        ("build --onnx-path", "--onnx-path needs a value"),
        ("benchmark --engine-path x.plan", "Next: arcface assemble NAME --plan FILE, then arcface bench --config-name"),
        ("benchmark --num-iterations 5", "is now --rounds and --sample-s"),
    ],
)
def test_an_option_of_old_without_a_successor_is_one_sentence(line, message):
    with pytest.raises(WrongUse, match=message):
        translated(line.split())


def test_python_m_runs_a_mode_of_old_with_one_line_of_notice(tmp_path):
    line = [sys.executable, "-m", "arcface_build", "--mode", "info", "--engine-path", "no.plan"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=HANG_S, cwd=tmp_path, check=False)
    notice, error = done.stderr.splitlines()
    assert notice == "an old name; use: arcface plan show no.plan"
    assert done.returncode == 3 and error.startswith("PlanNotFound: ")
    silent = subprocess.run([*line, "-q"], capture_output=True, text=True, timeout=HANG_S, cwd=tmp_path, check=False)
    assert silent.stderr.splitlines() == [error]


def test_a_variable_of_old_is_one_line_and_none_with_quiet(tmp_path):
    old = {"ARCFACE_CACHE": str(tmp_path)}
    assert arcface("plan", "list", cwd=tmp_path, **old).stderr == (
        "environment variable ARCFACE_CACHE is an old name; use ARCFACE_STORAGE__CACHE\n"
    )
    assert arcface("plan", "list", "-q", cwd=tmp_path, **old).stderr == ""
    assert arcface("-q", "plan", "list", cwd=tmp_path, **old).stderr == ""


def test_an_empty_variable_is_one_that_is_not_set(tmp_path):
    empty = dict.fromkeys(
        (
            "ARCFACE_BACKEND",
            "ARCFACE_CONFIG",
            "ARCFACE_CACHE",
            "ARCFACE_TRITON__URL",
            "ARCFACE_STORAGE__RETRIES",
            "ARCFACE_NO__SUCH_KEY",
            "ARCFACE_PLAN_STORE",
            "ARCFACE_BENCH_BATCH",
            "ARCFACE_DETECTOR",
            "INSIGHTFACE_HOME",
        ),
        "",
    )
    done = arcface("plan", "list", "--json", cwd=tmp_path, **empty)
    assert (done.returncode, json.loads(done.stdout)) == (0, {"plans": [], "refused": []}), done.stderr
    done = arcface("doctor", "--json", cwd=tmp_path, **empty)
    assert json.loads(done.stdout)["checks"][0]["status"] == "ok"


@pytest.mark.parametrize("command", [["--help"], ["plan", "list", "--json"], ["doctor"]])
def test_a_reader_that_goes_away_ends_a_command_quietly(command, tmp_path):
    nobody = {**os.environ, "ARCFACE_TRITON__URL": "localhost:9"}  # where this host may serve, doctor asks and may warn
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*MAIN, *command], stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=HANG_S, env=nobody
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("module", "command", "how"),
    [
        ("onnx", "import demo", "-e '.[tools]'"),
        ("onnx", "bench-variants m", "-e '.[tools]'"),
        ("onnxruntime", "quantize m --precision bf16", "pip install onnxruntime"),
        ("matplotlib", "quantize m --precision int8", "-e '.[tools]'"),
        ("sklearn", "compare a.npz b.npz --identities", "-e '.[evidence]'"),
        ("sklearn", "matrix --identities", "-e '.[evidence]'"),
        ("polygraphy", "plan build m", "-e '.[tools]'"),
        ("cryptography", "plan push --all --sign-key private.pem", "-e '.[store]'"),
        ("boto3", "plan list --store s3://bucket/plans", "-e '.[store]'"),
        ("pyarrow", "embed crops -o out.parquet", "-e '.[bulk]'"),
        ("ray", "embed crops -o out.parquet --engine ray", "-e '.[ray]'"),
        ("ray", "consensus docs -o out.json --engine ray", "-e '.[ray]'"),
        ("torch", "bench --pytorch", "-e '.[pytorch]'"),
    ],
)
def test_a_package_that_is_missing_is_one_sentence_before_any_work(module, command, how, tmp_path):
    code = f"import sys; sys.modules[{module!r}] = None; from arcface_build.program import main; main()"
    line = [sys.executable, "-c", code, *command.split()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=HANG_S, cwd=REPO, check=False)
    if module == "torch" and "perf_analyzer" in done.stderr:
        pytest.skip("no perf_analyzer here")
    assert done.returncode == 3, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert f"needs {module}, which is not installed. Next: " in done.stderr and how in done.stderr


def test_a_package_that_nobody_asked_for_is_still_one_sentence(tmp_path):
    code = (
        "import sys; sys.modules['rich'] = None; sys.modules['rich.console'] = None;"
        "from arcface_build.program import main; main()"
    )
    line = [sys.executable, "-c", code, "parity", "--url", "127.0.0.1:9"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=HANG_S, cwd=tmp_path, check=False)
    assert done.returncode == 3
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("DependencyMissing: ")
    assert "Next: " in sentence and sentence.endswith("[cli]'")


def test_an_opencv_without_its_display_library_names_the_one_that_needs_none(tmp_path):
    folder = tmp_path / "packages" / "cv2"
    folder.mkdir(parents=True)
    said = "libGL.so.1: cannot open shared object file: No such file or directory"
    (folder / "__init__.py").write_text(f"raise ImportError({said!r}, name='cv2')")
    (tmp_path / "crop.png").write_bytes(b"")
    done = arcface("serve", "--faces", "crop.png", cwd=tmp_path, PYTHONPATH=_before(folder.parent))
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert said in done.stderr and "--no-deps opencv-python-headless" in done.stderr


def _before(folder: Path) -> str:
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def test_a_shell_completes_commands_and_options():
    words = {"COMP_WORDS": "arcface ser", "COMP_CWORD": "1", "_ARCFACE_COMPLETE": "bash_complete"}
    assert arcface(**words).stdout.split() == ["plain,serve"]
    words = {"COMP_WORDS": "arcface plan build --prec", "COMP_CWORD": "3", "_ARCFACE_COMPLETE": "bash_complete"}
    assert arcface(**words).stdout.split() == ["plain,--precision"]
    assert "_arcface_completion" in arcface(_ARCFACE_COMPLETE="bash_source").stdout


def on_a_terminal(*arguments: object, cwd: Path) -> str:
    """What a command writes to stderr where that is a terminal."""
    outer, inner = pty.openpty()
    process = subprocess.Popen(
        [*MAIN, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=inner,
        cwd=cwd,
        env=os.environ | {"TERM": "xterm"},  # one that can draw, wherever the tests run
    )
    os.close(inner)
    shown = b""
    while True:
        try:
            block = os.read(outer, 4096)
        except OSError:  # Linux's way to say that the last writer is gone
            break
        if not block:
            break
        shown += block
    process.wait(HANG_S)
    os.close(outer)
    return shown.decode(errors="replace")


def test_progress_is_shown_on_a_terminal_and_not_with_quiet(tmp_path):
    line = ["import", "demo", "--models-dir", tmp_path / "models", "--no-assemble"]
    shown = on_a_terminal(*line, cwd=tmp_path)
    assert "prove serving.onnx" in shown or "reference" in shown, shown
    assert on_a_terminal(*line, "--force", "--quiet", cwd=tmp_path) == ""


def test_without_a_terminal_progress_is_a_line_now_and_then_and_none_with_quiet(tmp_path):
    (tmp_path / "impatient.py").write_text(
        "import sys, arcface_build.terminal as terminal; terminal.FIRST_S = terminal.EVERY_S = 0.2\n"
        "from arcface_build.cli import main; main(sys.argv[1:])"
    )
    line = [sys.executable, "impatient.py", "import", "demo", "--models-dir", "models", "--no-assemble", "--force"]
    said = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=HANG_S, check=True).stderr
    assert "reference" in said or "prove serving.onnx" in said, said
    quiet = subprocess.run([*line, "-q"], capture_output=True, text=True, cwd=tmp_path, timeout=HANG_S, check=True)
    assert quiet.stderr == ""


def test_bytes_that_move_are_shown_on_a_terminal_and_not_with_quiet(tmp_path):
    plan = tmp_path / "tiny-fp16-sm86.plan"
    write_json(manifest_path(plan), write_plan(plan).to_json())
    line = ["plan", "push", plan, "--cache", tmp_path / "cache", "--store"]
    assert "push tiny-fp16-sm86.plan" in on_a_terminal(*line, tmp_path / "store", cwd=tmp_path)
    assert on_a_terminal(*line, tmp_path / "other", "-q", cwd=tmp_path) == ""
