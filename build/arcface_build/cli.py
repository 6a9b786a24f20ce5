"""The `arcface` command: imports subcommands only when called, and turns an error into one line and an exit code.

Exit codes: 0 success, 1 a gate failed, 2 wrong use, 3 something needed is missing, 130 interrupted, 141 the reader of
our output closed the pipe.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import warnings
from typing import NoReturn

import click

from arcface_build.commands.options.settings import config_option
from arcface_build.lazy_group import LazyGroup
from arcface_build.old_command_lines import translated
from arcface_build.terminal import notice, quiet_option, visible
from arcface_clients.errors import ArcFaceError
from arcface_clients.extras import how_to_mend

COMMANDS = {  # name -> (module under arcface_build.commands, one line for --help)
    "import": ("import_", "Turn an ArcFace ONNX into a verified serving ONNX and install it in model_repository/."),
    "import-detector": ("import_detector", "Install a face detector, so that the server takes photos."),
    "quantize": ("quantize", "Make an fp16, bf16 or int8 variant that passes its drift gate."),
    "assemble": ("assemble", "Install a model, a variant or plans in model_repository/ as a new version."),
    "rollback": ("rollback", "Go back to the previous version."),
    "serve": ("serve", "Start Triton on model_repository/, verify it with a few faces, keep serving."),
    "embed": ("embed", "Embed face crops from files or folders through a server."),
    "consensus": ("consensus", "Find who most photos of each person show, and which photos do not belong."),
    "parity": ("parity", "Compare every loaded backend with the reference, face by face."),
    "compare": ("compare", "Compare two engines, servers, files or saved embeddings: drift, accuracy, and why."),
    "matrix": ("matrix", "Drift, changed decisions and batch invariance by backend, precision and batch size."),
    "bench": ("bench", "Measure throughput through the server and of the bare runtime, side by side."),
    "bench-photos": ("bench_photos", "Measure photos a second through the server and in one process."),
    "tune": ("tune", "Find the best instances, threads, queue delay and largest batch for this host."),
    "bench-variants": ("bench_variants", "Measure speed and drift of fp32, bf16 and int8, interleaved."),
    "plan": ("plan", "Build, verify, store and move TensorRT plans: one for each kind of GPU."),
    "doctor": ("doctor", "Check this host and the configuration; say what is wrong and how to fix it."),
}
NEEDS = {  # what a command cannot start without; packages that only some options need are checked with those options
    "import": ("onnx", "onnxruntime"),
    "import-detector": ("cv2", "PIL"),
    "quantize": ("onnx", "onnxruntime"),
    "bench-photos": ("cv2", "PIL", "onnxruntime", "insightface"),
    "bench-variants": ("onnx", "onnxruntime"),
}
GONE = {  # benchmarks of this project itself: not in the wheel
    "bench-clients": "in a checkout, run scripts/bench clients.",
    "bench-vectors": "in a checkout, run scripts/bench vectors.",
    "consensus-demo": "in a checkout, run scripts/consensus-demo.",
}
_DEMO_SAID: list[float] = []
CLOSED_PIPE = 128 + signal.SIGPIPE  # a shell's exit code for a program ended by a closed pipe


@click.group(
    cls=LazyGroup,
    package="arcface_build.commands",
    table=COMMANDS,
    common=(config_option, quiet_option),
    needs=NEEDS,
    gone=GONE,
    params=[quiet_option()],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="arcface-triton", prog_name="arcface")
def cli() -> None:
    """ArcFace embeddings on NVIDIA Triton: import, verify, serve, embed, compare.

    Exit codes: 0 success, 1 a gate failed, 2 wrong use, 3 something needed is missing, 130 interrupted.
    """


def main(argv: list[str] | None = None) -> None:
    """Run `arcface`, translating old command lines."""
    try:
        argv, told = translated(sys.argv[1:] if argv is None else argv)
    except ArcFaceError as exc:
        click.echo(f"{type(exc).__name__}: {exc}", err=True)
        sys.exit(exc.exit_code)
    if told and not {"-q", "--quiet"}.intersection(argv):
        click.echo(told, err=True)
    run(cli, "arcface", argv)


def run(group: click.Group, prog_name: str, argv: list[str] | None = None) -> NoReturn:
    """Run a command line; an error becomes one line, or with ARCFACE_TRACEBACK=1 a traceback."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # arcface_build.program
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up after `kill` and systemd as after Ctrl-C
    _show_old_names_in_a_line()
    _DEMO_SAID.clear()
    if logging.lastResort is not None:  # what shows warnings where nobody configured logging
        logging.lastResort.addFilter(_first_of_its_kind)
    try:
        status = group.main(args=argv, prog_name=prog_name, standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _interrupted()
    except SystemExit as exc:
        if _reader_went_away():  # how click ends on any broken pipe
            sys.exit(CLOSED_PIPE)
        if isinstance(exc.__context__, OSError):  # a pipe other than stdout
            _fail(f"{type(exc.__context__).__name__}: {exc.__context__}", 3)
        raise
    except ImportError as exc:
        if isinstance(exc.__cause__, KeyboardInterrupt):  # Ctrl-C while pybind11 initialised an extension
            _interrupted()
        if os.environ.get("ARCFACE_TRACEBACK"):
            raise
        _fail(f"DependencyMissing: {exc}. Next: {how_to_mend(exc)}", 3)
    except ArcFaceError as exc:
        if os.environ.get("ARCFACE_TRACEBACK"):
            raise
        _fail(f"{type(exc).__name__}: {exc}", exc.exit_code)
    except OSError as exc:  # a full or read-only disk, a file that may not be read
        if os.environ.get("ARCFACE_TRACEBACK"):
            raise
        _fail(f"{type(exc).__name__}: {exc}. Next: {_after(exc)}", 3)
    sys.exit(status if isinstance(status, int) else 0)


def _after(exc: OSError) -> str:
    """What to do about it; os.getcwd() names no file where the current folder was removed."""
    if isinstance(exc, FileNotFoundError) and exc.filename is None:
        return "cd into a folder that exists: the one in which this runs was removed"
    return "check the path, its permissions and the free disk space"


def _fail(sentence: str, status: int) -> NoReturn:
    click.echo(visible(sentence, kept="\n\t"), err=True)
    sys.exit(status)


def _interrupted() -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):  # a second one during exit: stop at once, without a traceback
        signal.signal(number, signal.SIG_DFL)
    _fail("interrupted", 130)


def _reader_went_away() -> bool:
    """Whether stdout is a pipe whose reader is gone: `arcface … | head -1`."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _first_of_its_kind(record: logging.LogRecord) -> bool:
    """Whether to show a log record: that weights are a demo, each client of a command says; once is enough."""
    demo = "DEMO weights" in str(record.msg)
    if demo:
        _DEMO_SAID.append(record.created)
    return not demo or len(_DEMO_SAID) == 1


def _show_old_names_in_a_line() -> None:
    """Print an old key or variable as one line; programs that import us get the FutureWarning."""
    show = warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], *args: object, **kwargs: object) -> None:
        if issubclass(category, FutureWarning) and "is an old name" in str(message):
            notice(str(message))
        else:
            show(message, category, *args, **kwargs)  # type: ignore[arg-type]

    warnings.showwarning = shown
