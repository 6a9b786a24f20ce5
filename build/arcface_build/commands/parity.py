"""`arcface parity`: a server in, a table of its backends' drift from the reference out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from arcface_clients.parity import ParityReport


def parity_table(report: ParityReport) -> Table:
    """The table that `arcface parity` and `arcface serve` print."""
    from rich.table import Table

    table = Table(title=f"{report.faces} faces through {report.url}", title_justify="left")
    for title, justify in (
        ("backend", "left"),
        ("runs", "left"),
        ("faces/s", "right"),
        ("mean cosine", "right"),
        ("min cosine", "right"),
        ("gate", "left"),
    ):
        table.add_column(title, justify=justify, no_wrap=title not in ("runs", "gate"))
    for row in report.rows:
        if row.limit is None:
            gate = "reference"
        else:
            relation, verdict = ("≤", "passed") if row.passed else (">", "FAILED")
            gate = f"{verdict} ({row.precision}: {1 - row.min_cosine:.1e} {relation} {row.limit:g})"
        table.add_row(
            row.model, row.runs, f"{row.faces_per_s:.1f}", f"{row.mean_cosine:.7f}", f"{row.min_cosine:.7f}", gate
        )
    return table


@click.command()
@click.option("--url", default="localhost:8001", show_default=True, envvar="ARCFACE_URL", help="Server to ask.")
@click.option(
    "--faces", "sources", multiple=True, metavar="PATH", help="Folder, file, glob or .npz; default: drawn faces."
)
@click.option("--limit", type=click.IntRange(1), default=400, show_default=True, help="Take at most this many faces.")
@click.option("--timeout-s", type=float, default=120.0, show_default=True, help="Longest wait for one request.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(url: str, sources: tuple[str, ...], limit: int, timeout_s: float, as_json: bool) -> int:
    """Compare every loaded backend with the reference, face by face.

    Exit code 1 when a backend's drift is above the limit of its precision.

    \b
    Examples:
      arcface parity
      arcface parity --faces crops/ --json
      arcface parity --url http://gpu-host:8000 --faces 'people/**/*.jpg'
    """
    from rich.console import Console

    from arcface_clients.parity import measure_parity
    from arcface_clients.synthetic import synthetic_faces

    errors = Console(stderr=True)
    if sources:
        from arcface_clients.images import load_faces

        faces, _, refused = load_faces(sources)
        for crop in refused:
            errors.print(
                f"not read: {crop.name}: {crop.refused}", style="yellow", markup=False, highlight=False, soft_wrap=True
            )
    else:
        faces = synthetic_faces(min(limit, 64))
    with errors.status("") as status:
        report = measure_parity(
            url, faces[:limit], timeout_s=timeout_s, progress=lambda model: status.update(f"asking {model} …")
        )
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        Console().print(parity_table(report))
        for model, reason in report.skipped.items():
            errors.print(f"not compared: {model}: {reason}", markup=False, highlight=False, soft_wrap=True)
    report.require()
    return 0
