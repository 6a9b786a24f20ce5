"""`arcface parity` prints a table of each backend's drift from the reference on a server."""

from __future__ import annotations

from pathlib import Path

import click

from arcface_build import terminal
from arcface_build.commands.options.output import hand_over, json_option, report_option
from arcface_build.commands.options.server import timeout_option, url_option
from arcface_build.commands.options.settings import access_to, settings

EPILOG = """\b
Examples:
  arcface parity
  arcface parity --faces crops/ --json
  arcface parity --url grpc://gpu-host:8001 --faces 'people/**/*.jpg'
  arcface parity --faces crops/ --count      for a scheduled job: feeds the drift alert (docs/operations.md)
"""


@click.command(epilog=EPILOG, context_settings={"show_default": True})
@url_option
@click.option(
    "--faces", "sources", multiple=True, metavar="PATH", help="Folder, file, glob or .npz; default: synthetic faces."
)
@click.option("--limit", type=click.IntRange(1), default=400, help="Use at most this many faces.")
@timeout_option
@click.option("--count", is_flag=True, help="Also have the server count the drift in its metrics (arcface_drift).")
@json_option
@report_option
def command(
    url: str,
    sources: tuple[str, ...],
    limit: int,
    timeout_s: float,
    count: bool,
    as_json: bool,
    report: Path | None,
) -> int:
    """Compare every loaded backend with the reference, face by face.

    Exit code 1 if a backend's drift is above the limit of its precision, 3 if no reference is loaded.
    """
    from arcface_clients.checks.parity import COUNTING, count_drift, measure_parity, render_table
    from arcface_clients.faces.images import faces_or_synthetic

    faces = faces_or_synthetic(sources, 32, terminal.complaint)[0][:limit]
    access, limits = access_to(url), settings().comparison.max_drift.model_dump()
    with terminal.status_line() as progress:
        result = measure_parity(
            url,
            faces,
            limits=limits,
            timeout_s=timeout_s,
            access=access,
            progress=lambda model: progress(f"asking {model} …"),
        )
        counted = count and count_drift(url, faces, timeout_s=timeout_s, access=access)
    hand_over(result.to_json(), lambda: render_table(result), as_json, report)
    if result.skipped:
        terminal.notice(f"not loaded, so not compared: {', '.join(result.skipped)}")
    if count and not counted:
        terminal.complaint(f"not counted: {COUNTING} is not loaded. Next: arcface serve (with the reference)")
    result.require()
    return 0
