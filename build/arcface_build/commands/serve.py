"""`arcface serve`: weights, backend choice, a real tritonserver, a parity table, then serving until it is stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    import numpy as np

    from arcface_build.serving.choose import Choice
    from arcface_build.serving.process import TritonProcess
    from arcface_clients.checks.parity import ParityReport

EPILOG = """\b
Examples:
  arcface serve                              the best backend this host has, demo weights where there are none
  arcface serve --backend onnx --http-port 8010 --grpc-port 8011 --metrics-port 8012
  arcface serve --no-reference               without InsightFace beside it: half the memory, no parity table
  arcface serve --once --json                start, prove, print, stop: for scripts and CI
  arcface serve -- --log-verbose=1           what follows -- goes to tritonserver as it is
"""
PORT = click.IntRange(1, 65535)


@click.command(epilog=EPILOG, context_settings={"auto_envvar_prefix": "ARCFACE_SERVE", "show_default": True})
@click.option("--model-repository", type=click.Path(path_type=Path), help="Default: model_repository/ here or above.")
@click.option(
    "--backend",
    "--model-config-name",
    "backend",
    default="auto",
    type=click.Choice(["auto", "tensorrt", "onnx", "reference", "tuned"]),
    help="What answers as `arcface`; auto: a verified plan for this GPU, else ONNX Runtime, else InsightFace; "
    "tuned: ONNX Runtime with what `arcface tune` found.",
)
@click.option(
    "--variant",
    default="auto",
    type=click.Choice(["auto", "installed"]),
    help="On a CPU; auto: the fastest variant of the installed model that passed its gate here.",
)
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all.")
@click.option("--http-port", default=8000, type=PORT)
@click.option("--grpc-port", default=8001, type=PORT)
@click.option("--metrics-port", default=8002, type=PORT)
@click.option("--demo/--no-demo", default=True, help="Import the demo network where there are no weights.")
@click.option("--reference/--no-reference", default=True, help="Load InsightFace beside it and print the parity table.")
@click.option(
    "--faces", "faces_from", type=click.Path(path_type=Path), help="Crops for the table; default: drawn faces."
)
@click.option("--once", is_flag=True, help="Stop after the table; exit 1 when a gate fails.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option(
    "--ready-timeout",
    "ready_timeout_s",
    default=300.0,
    type=click.FloatRange(0, min_open=True),
    help="Seconds to wait for the models.",
)
@click.argument("triton_arguments", nargs=-1, type=click.UNPROCESSED)
def command(
    model_repository: Path | None,
    backend: str,
    variant: str,
    host: str,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    demo: bool,
    reference: bool,
    faces_from: Path | None,
    once: bool,
    as_json: bool,
    ready_timeout_s: float,
    triton_arguments: tuple[str, ...],
) -> int:
    """Start Triton on model_repository/, prove it with a few faces, keep serving until Ctrl-C or SIGTERM."""
    from arcface_build.plans.gpu import gpu_sm
    from arcface_build.repository.versions import find_repository
    from arcface_build.serving.binary import find_tritonserver
    from arcface_build.serving.choose import Choice, order_of_backends
    from arcface_build.serving.process import LATENCY_QUANTILES, Ports, TritonProcess
    from arcface_build.serving.variant import take_best_variant
    from arcface_clients.config.sources import load_config
    from arcface_clients.errors import GateFailed
    from arcface_clients.faces.images import load_or_draw

    interrupt = Interrupt()
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell's background job starts with SIGINT ignored
        signal.signal(number, interrupt)
    repository = find_repository(model_repository)
    ports = Ports(http_port, grpc_port, metrics_port)
    ports.check_free(host)  # before any work
    settings = load_config()
    said = partial(click.echo, err=True)
    faces, _ = load_or_draw([faces_from] if faces_from else [], settings.validation.eval_set_size, said)
    choice, with_reference = _prepare(repository, backend, demo, reference and settings.validation.run_on_startup)
    binary = find_tritonserver()
    _say(f"tritonserver {binary.origin}\nbackend {choice.backend}: {choice.reason}", as_json)
    # Tuned for the installed weights: another variant would take the tuned settings away.
    if choice.backend == "onnx" and variant == "auto" and backend != "tuned" and gpu_sm() is None:
        _say(f"variant {take_best_variant(repository, repository.parent / 'models')}", as_json)
    backends = order_of_backends(choice.backend, settings.fallback) if with_reference and not once else [choice.backend]
    for position, name in enumerate(backends):
        server = TritonProcess(
            binary,
            repository,
            ["arcface", "arcface_parity"] if with_reference and name != "reference" else ["arcface"],
            config_name="tuned" if backend == "tuned" and name == "onnx" else name,
            ports=ports,
            host=host,
            log_path=_log_path(repository, http_port),
            extra=(LATENCY_QUANTILES, *triton_arguments),
        )
        with server:
            server.wait_ready(ready_timeout_s)
            report = _prove(server, Choice(name, choice.reason), faces, with_reference, as_json)
            if once:
                return 0 if report.passed else 1
            if report.passed or name == "reference":
                with contextlib.suppress(KeyboardInterrupt):  # from here on it is how one ends it
                    _say(_invitation(server), as_json)
                    _serve(server, interrupt)
                break
            _complain(report, backends[position + 1 : position + 2])
    else:
        raise GateFailed(
            "no backend passed its gate, nothing is served. See which faces: arcface compare; go back: arcface rollback"
        )
    _say("stopped: no process is left", as_json)
    return 0


def _prepare(repository: Path, asked: str, demo: bool, reference: bool) -> tuple[Choice, bool]:
    """Weights where there are none, then the backend choice and whether InsightFace is loaded beside it."""
    from arcface_build.plans.gpu import gpu_sm
    from arcface_build.repository.versions import versions
    from arcface_build.serving.choose import choose_backend, plan_sms
    from arcface_clients.errors import Missing

    if demo and not versions(repository / "arcface_onnx") and not versions(repository / "arcface_trt"):
        from arcface_build.commands.import_ import command as import_command

        click.echo("no weights in model_repository/: importing the demo network (NOT for recognition)", err=True)
        folders = ["--models-dir", str(repository.parent / "models"), "--model-repository", str(repository)]
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table, or for one JSON object
            import_command.main(["demo", *folders], standalone_mode=False)
    has_reference = bool(versions(repository / "arcface_reference")) and find_spec("insightface") is not None
    if asked == "tuned":
        if not (repository / "arcface_onnx" / "configs" / "tuned.pbtxt").is_file():
            raise Missing("arcface_onnx has no configs/tuned.pbtxt for the weights that it serves. Next: arcface tune")
        asked = "onnx"
    choice = choose_backend(
        asked, gpu_sm(), plan_sms(repository), bool(versions(repository / "arcface_onnx")), has_reference
    )
    return choice, reference and has_reference and choice.backend != "reference"


def _log_path(repository: Path, http_port: int) -> Path:
    """Where tritonserver's output goes; each port its own, so that two servers of one repository keep theirs."""
    folder = repository.parent / ".cache"
    name = f"tritonserver-{http_port}.log"
    if os.access(folder if folder.is_dir() else repository.parent, os.W_OK):
        return folder / name
    return Path(tempfile.gettempdir()) / f"arcface-{os.getuid()}" / name


def _prove(
    server: TritonProcess,
    choice: Choice,
    faces: np.ndarray,
    with_reference: bool,
    as_json: bool,
) -> ParityReport:
    """Embed a few faces through every loaded backend and print the table."""
    from arcface_clients.checks.parity import measure_parity, render_table

    report = measure_parity(server.grpc_url, faces)
    if as_json:
        urls = {"grpc": server.grpc_url, "http": server.http_url, "metrics": server.metrics_url}
        told = {"backend": choice.backend, "reason": choice.reason, "urls": urls, "parity": report.to_json()}
        click.echo(json.dumps(told, indent=2))
    else:
        click.echo(render_table(report))
        if not with_reference:
            click.echo("no reference is loaded: nothing was compared with InsightFace")
    return report


def _complain(report: ParityReport, following: list[str]) -> None:
    failed = "; ".join(f"{row.model} {row.gate}" for row in report.rows if not row.passed)
    instead = f"serving {following[0]} instead" if following else "no fallback is left"
    click.secho(f"VALIDATION FAILED: {failed}; {instead}", fg="red", bold=True, err=True)


def _invitation(server: TritonProcess) -> str:
    return f"""
serving   gRPC {server.grpc_url}   HTTP http://{server.http_url}   metrics {server.metrics_url}
log       {server.log_path}
try it:
    import numpy as np
    from arcface_clients import TritonEmbedder
    faces = np.random.default_rng(0).integers(0, 256, (4, 112, 112, 3), np.uint8)  # your aligned BGR crops
    with TritonEmbedder("{server.grpc_url}") as embedder:
        embeddings = embedder.encode(faces)
    print(embeddings.shape, embeddings @ embeddings.T)
Ctrl-C stops it."""


def _serve(server: TritonProcess, interrupt: Interrupt) -> NoReturn:
    """Wait until the server ends by itself, which it should not, or until we are interrupted."""
    from arcface_build.errors import ServerFailed
    from arcface_build.serving.process import reason_of_end

    while (status := server.wait(timeout_s=1.0)) is None:
        if interrupt.came:
            raise KeyboardInterrupt
    raise ServerFailed(f"tritonserver ended by itself {reason_of_end(status, server.log_path)}")


def _say(text: str, as_json: bool) -> None:
    click.echo(text, err=as_json)


class Interrupt:
    """A signal handler that raises KeyboardInterrupt, and remembers it.

    Python drops what is raised while it runs a finaliser (`__del__`): one SIGTERM in some thousand would be lost.
    """

    def __init__(self) -> None:
        """No signal yet."""
        self.came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Called by Python between two instructions of the main thread."""
        self.came = True
        raise KeyboardInterrupt
