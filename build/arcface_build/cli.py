"""The `arcface` command: subcommands are imported when called, an error becomes one line and an exit code.

Exit codes: 0 good, 1 a gate failed, 2 wrong use, 3 something needed is missing, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

import click

from arcface_build.lazy_group import LazyGroup
from arcface_clients.errors import ArcFaceError

COMMANDS = {  # name -> (module under arcface_build.commands, one line for --help)
    "import": ("import_", "Turn an ArcFace ONNX into a proved serving ONNX and put it into model_repository/."),
    "quantize": ("quantize", "Make an fp16, bf16 or int8 variant that passed its drift gate."),
    "assemble": ("assemble", "Put an imported model, a variant or plans into model_repository/ as a new version."),
    "rollback": ("rollback", "Go back to the version before."),
    "serve": ("serve", "Start Triton on model_repository/, prove it with a few faces, keep serving."),
    "embed": ("embed", "Embed face crops from files or folders through a server."),
    "consensus": ("consensus", "Find who most photos of each person show, and which photos do not belong."),
    "parity": ("parity", "Compare every loaded backend with the reference, face by face."),
    "compare": ("compare", "Compare two engines, servers, files or saved embeddings: drift, accuracy, and why."),
    "matrix": ("matrix", "Drift, changed decisions and batch invariance by backend, precision and batch size."),
    "bench": ("bench", "Measure throughput through the server beside the bare runtime, in one run."),
    "tune": ("tune", "Search instances, threads, queue delay and largest batch for this host."),
    "bench-variants": ("bench_variants", "Measure fp32, bf16 and int8 in turns, with their drift beside the speed."),
    "plan": ("plan", "Build, prove, keep and move TensorRT plans: one for each kind of GPU."),
    "doctor": ("doctor", "Look at this host and the configuration; say what is wrong and how to mend it."),
}


@click.group(
    cls=LazyGroup,
    package="arcface_build.commands",
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="arcface-triton", prog_name="arcface")
def cli() -> None:
    """ArcFace embeddings on NVIDIA Triton: import, prove, serve, embed, compare.

    Exit codes: 0 good, 1 a gate failed, 2 wrong use, 3 something needed is missing, 130 interrupted.
    """


def main(argv: list[str] | None = None) -> None:
    """Run `arcface`."""
    run(cli, "arcface", argv)


def run(group: click.Group, prog_name: str, argv: list[str] | None = None) -> NoReturn:
    """Run a command line; an error becomes one line, with ARCFACE_TRACEBACK=1 it keeps its traceback."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # arcface_build.program
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` and systemd leave as little behind as Ctrl-C
    try:
        status = group.main(args=argv, prog_name=prog_name, standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _interrupted()
    except ImportError as exc:
        if isinstance(exc.__cause__, KeyboardInterrupt):  # Ctrl-C while pybind11 initialised an extension
            _interrupted()
        raise
    except ArcFaceError as exc:
        if os.environ.get("ARCFACE_TRACEBACK"):
            raise
        click.echo(f"{type(exc).__name__}: {exc}", err=True)
        sys.exit(exc.exit_code)
    except OSError as exc:  # a full or read-only disk, a file that may not be read
        if os.environ.get("ARCFACE_TRACEBACK"):
            raise
        click.echo(f"{type(exc).__name__}: {exc}. Next: look at the path, its permissions and the free space", err=True)
        sys.exit(3)
    sys.exit(status if isinstance(status, int) else 0)


def _interrupted() -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):  # a second one while Python ends: at once, and without a traceback
        signal.signal(number, signal.SIG_DFL)
    click.echo("interrupted", err=True)
    sys.exit(130)
