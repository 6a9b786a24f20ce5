"""`arcface serve`: weights, backend choice, a real tritonserver, a parity table, then serving until it is stopped."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arcface_build import terminal
from arcface_build.commands.options.folders import model_repository_option, models_dir_option, repository_at
from arcface_build.commands.options.numbers import POSITIVE
from arcface_build.commands.options.output import hand_over, json_option
from arcface_build.commands.options.settings import settings

if TYPE_CHECKING:
    import numpy.typing as npt

    from arcface_build.serving.choose import BackendChoice
    from arcface_build.serving.exposure import ServerTls
    from arcface_build.serving.process import TritonProcess
    from arcface_clients.checks.parity import ParityReport

EPILOG = """\b
Examples:
  arcface serve                              the best backend this host has, demo weights where there are none
  arcface serve --backend onnx --http-port 8010 --grpc-port 8011 --metrics-port 8012
  arcface serve --host 0.0.0.0 --tls-cert server.pem --tls-key server.key    for other hosts, encrypted
  arcface serve --no-reference               without InsightFace beside it: half the memory, no parity table
  arcface serve --once --json                start, prove, print, stop: for scripts and CI
  arcface serve -- --log-verbose=1           what follows -- goes to tritonserver as it is
"""
PORT = click.IntRange(1, 65535)
PEM = click.Path(path_type=Path, dir_okay=False)


@click.command(epilog=EPILOG, context_settings={"auto_envvar_prefix": "ARCFACE_SERVE", "show_default": True})
@model_repository_option
@models_dir_option
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
    type=click.Choice(["auto", "installed", "fp32", "bf16", "int8"]),
    help="On a CPU; auto: what was measured to be the fastest of the installed model's variants that passed their "
    "gates; a precision: that one, unmeasured.",
)
@click.option("--remeasure", is_flag=True, help="Measure the variants again, for --variant auto.")
@click.option("--host", default="127.0.0.1", help="Address for gRPC; any but loopback needs TLS or --insecure.")
@click.option("--tls-cert", type=PEM, help="Certificate of gRPC (PEM); with --tls-key.")
@click.option("--tls-key", type=PEM, help="Its private key, without a password.")
@click.option("--client-ca", type=PEM, help="Mutual TLS: let in only clients whose certificates this authority signed.")
@click.option("--insecure", is_flag=True, help="The network is trusted: listen on it without encryption.")
@click.option("--http-host", default="127.0.0.1", help="Address for HTTP, which has no TLS; not loopback: --insecure.")
@click.option("--metrics-host", default="127.0.0.1", help="Address for Prometheus metrics.")
@click.option("--http-port", default=8000, type=PORT)
@click.option("--grpc-port", default=8001, type=PORT)
@click.option("--metrics-port", default=8002, type=PORT)
@click.option("--demo/--no-demo", default=True, help="Import the demo network where there are no weights.")
@click.option("--reference/--no-reference", default=True, help="Load InsightFace beside it and print the parity table.")
@click.option(
    "--faces", "faces_from", type=click.Path(path_type=Path), help="Crops for the table; default: synthetic faces."
)
@click.option("--once", is_flag=True, help="Stop after the table; exit 1 when a gate fails.")
@json_option
@click.option(
    "--ready-timeout",
    "ready_timeout_s",
    default=300.0,
    type=POSITIVE,
    help="Seconds to wait for the models.",
)
@click.option(
    "--exit-timeout",
    "exit_timeout_s",
    default=15.0,
    type=POSITIVE,
    help="Seconds that running requests get to finish when it is stopped.",
)
@click.argument("triton_arguments", nargs=-1, type=click.UNPROCESSED)
def command(
    model_repository: Path | None,
    models_dir: Path,
    backend: str,
    variant: str,
    remeasure: bool,
    host: str,
    tls_cert: Path | None,
    tls_key: Path | None,
    client_ca: Path | None,
    insecure: bool,
    http_host: str,
    metrics_host: str,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    demo: bool,
    reference: bool,
    faces_from: Path | None,
    once: bool,
    as_json: bool,
    ready_timeout_s: float,
    exit_timeout_s: float,
    triton_arguments: tuple[str, ...],
) -> int:
    """Start Triton on model_repository/, prove it with a few faces, keep serving until Ctrl-C or SIGTERM."""
    from arcface_build.serving.exposure import Exposure, address_of, server_tls
    from arcface_build.serving.ports import Ports
    from arcface_build.serving.request import ServeRequest
    from arcface_build.serving.run import Interrupt, serve

    interrupt = Interrupt()
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell's background job starts with SIGINT ignored
        signal.signal(number, interrupt)
    repository, config = repository_at(model_repository, make=True), settings()
    asked = ServeRequest(
        repository=repository,
        models_dir=repository.parent / models_dir,  # beside it, where the configuration names no absolute folder
        faces_bgr_u8=_faces(faces_from, config.validation.eval_set_size),
        backend=backend,
        variant=variant,
        remeasure=remeasure,
        exposure=Exposure(
            host=address_of(host),
            http_host=address_of(http_host),
            metrics_host=address_of(metrics_host),
            tls=server_tls(tls_cert, tls_key, client_ca),
            insecure=insecure,
        ),
        ports=Ports(http_port, grpc_port, metrics_port),
        demo=demo,
        reference=reference,
        once=once,
        ready_timeout_s=ready_timeout_s,
        exit_timeout_s=exit_timeout_s,
        extra=triton_arguments,
    )
    passed = serve(asked, config, Shell(as_json), interrupt)
    if not once:
        _say("stopped: no process is left", as_json)
    return 0 if passed else 1


class Shell:
    """Who called `arcface serve`; with --json only the proof goes to stdout."""

    notice = staticmethod(terminal.notice)
    importing = staticmethod(terminal.phase_bar)

    def __init__(self, as_json: bool) -> None:
        """Nothing is said yet."""
        self._as_json = as_json
        self._told = False
        self._with_reference = True

    def warned(self, text: str) -> None:
        """In yellow, whatever is asked for."""
        line = click.style(text, fg="yellow", bold=True)
        (terminal.complaint if self._as_json else click.echo)(line)

    def chosen(self, line: str) -> None:
        """What will serve, and why."""
        _say(line, self._as_json)

    def proved(self, server: TritonProcess, choice: BackendChoice, report: ParityReport, with_reference: bool) -> None:
        """The table of backends, or the one JSON document."""
        from arcface_clients.checks.parity import render_table

        self._with_reference = with_reference or choice.backend == "reference"
        urls = {"grpc": server.grpc_url, "http": server.http_url, "metrics": server.metrics_url}
        result = {"backend": choice.backend, "reason": choice.reason, "urls": urls, "parity": report.to_json()}
        golden = any(row.golden_drift is not None for row in report.rows)
        with_what = "only InsightFace's rows of two golden faces were compared" if golden else "nothing was compared"
        alone = "" if with_reference else f"\nno reference is loaded: {with_what}"
        if self._as_json and self._told:  # one document, however often the server is started again
            terminal.notice(render_table(report))
            return
        self._told = True
        hand_over(result, lambda: render_table(report) + alone, self._as_json)

    def failed(self, why: str, instead: str | None) -> None:
        """In red: a backend is not served."""
        following = f"serving {instead} instead" if instead else "no fallback is left"
        terminal.complaint(click.style(f"{why}; {following}", fg="red", bold=True))

    def serving(self, server: TritonProcess) -> None:
        """How to use it and how to end it."""
        _say(_invitation(server, self._with_reference), self._as_json)


def _faces(faces_from: Path | None, count: int) -> npt.NDArray[Any]:
    """What the table is made of: uint8 (N,112,112,3) BGR, N ≥ 1.

    Raises:
        WrongUse: there is not one face in `faces_from`.
    """
    from arcface_clients.faces.images import faces_or_synthetic

    return faces_or_synthetic([faces_from] if faces_from else [], count, terminal.complaint)[0]


def _invitation(server: TritonProcess, with_reference: bool) -> str:
    activate = Path(sys.prefix) / "bin" / "activate"
    enter = f"source {shlex.quote(str(activate))}\n" if activate.is_file() else ""
    tls = server.exposure.tls
    look = f"arcface parity --url {server.own_url}" if with_reference else f"arcface doctor {server.own_url}"
    return f"""
serving   gRPC {server.grpc_url}   HTTP http://{server.http_url}   metrics {server.metrics_url}
log       {server.log_path}
try it: paste these lines into another shell

{enter}{look}
python - <<'PY'
import numpy as np
from arcface_clients import {"Tls, " * bool(tls)}TritonEmbedder
faces = np.random.default_rng(0).integers(0, 256, (4, 112, 112, 3), np.uint8)  # your aligned BGR crops
with TritonEmbedder("{server.grpc_url}"{_access(tls)}) as embedder:
    print(embedder.encode(faces).shape, embedder.contract_id)
PY

Ctrl-C stops it."""


def _access(tls: ServerTls | None) -> str:
    """What a client must say beside the address; files that only the client's owner knows by a likely name."""
    if tls is None:
        return ""
    authority = tls.cert_file if tls.certificate.self_signed else "ca.pem"  # who signed it
    ours = ', cert_file="client.pem", key_file="client.key"' if tls.client_ca_file else ""
    return f', tls=Tls(ca_file="{authority}"{ours})'


def _say(text: str, as_json: bool) -> None:
    (terminal.notice if as_json else click.echo)(text)
