"""`arcface parity`: a server in, a table of its backends' drift from the reference out."""

from __future__ import annotations

import json
from functools import partial

import click

from arcface_build.commands.server_option import url_option

EPILOG = """\b
Examples:
  arcface parity
  arcface parity --faces crops/ --json
  arcface parity --url grpc://gpu-host:8001 --faces 'people/**/*.jpg'
  arcface parity --faces crops/ --count      for a timer: feeds the drift alert (docs/operations.md)
"""


@click.command(epilog=EPILOG, context_settings={"show_default": True})
@url_option
@click.option(
    "--faces", "sources", multiple=True, metavar="PATH", help="Folder, file, glob or .npz; default: drawn faces."
)
@click.option("--limit", type=click.IntRange(1), default=400, help="Take at most this many faces.")
@click.option(
    "--timeout-s", type=click.FloatRange(0, min_open=True), default=120.0, help="Longest wait for one request."
)
@click.option("--count", is_flag=True, help="Have the server count the drift in its own metrics too (arcface_drift).")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(url: str, sources: tuple[str, ...], limit: int, timeout_s: float, count: bool, as_json: bool) -> int:
    """Compare every loaded backend with the reference, face by face.

    Exit code 1 when a backend's drift is above the limit of its precision, 3 when no reference is loaded.
    """
    from rich.console import Console

    from arcface_clients.checks.parity import COUNTING, count_drift, measure_parity, render_table
    from arcface_clients.faces.images import load_or_draw

    errors = Console(stderr=True, soft_wrap=True)
    faces = load_or_draw(sources, 32, partial(click.echo, err=True))[0][:limit]
    with errors.status("") as status:
        report = measure_parity(
            url, faces, timeout_s=timeout_s, progress=lambda model: status.update(f"asking {model} …")
        )
        counted = count and count_drift(url, faces, timeout_s=timeout_s)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        click.echo(render_table(report))
        for reason in report.skipped.values():
            click.echo(f"not compared: {reason}", err=True)
    if count and not counted:
        click.echo(f"not counted: {COUNTING} is not loaded. Next: arcface serve (with the reference)", err=True)
    report.require()
    return 0
