"""`python -m arcface_tools bench-detector`: YuNet as a served model against the session inside `photo_faces`."""

from __future__ import annotations

from pathlib import Path

import click

from arcface_build import terminal
from arcface_build.commands.options.folders import model_repository_option, repository_at
from arcface_build.commands.options.numbers import NOT_NEGATIVE
from arcface_build.commands.options.output import hand_over, json_option, report_option

EPILOG = """\b
Examples:
  python -m arcface_tools bench-detector raw250/ --report docs/measured/served-detector.json
"""


@click.command("bench-detector", epilog=EPILOG, context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--callers", multiple=True, type=click.IntRange(1, 256), default=(1, 4), help="Callers; repeatable.")
@click.option("--rounds", default=5, type=click.IntRange(1))
@click.option("--sample-s", default=3.0, type=NOT_NEGATIVE)
@click.option("--limit", default=200, type=click.IntRange(1), help="Photos to take from the folder.")
@model_repository_option
@json_option
@report_option
def command(
    folder: Path,
    callers: tuple[int, ...],
    rounds: int,
    sample_s: float,
    limit: int,
    model_repository: Path | None,
    as_json: bool,
    report: Path | None,
) -> None:
    """Measure `photo_faces` against a copy of it that calls its detector as a served model, in turns on one server."""
    from arcface_clients.faces.images import find_files
    from arcface_tools.served_detector import run, text

    files = find_files([folder])
    photos = [Path(name).read_bytes() for name in files[:: max(1, len(files) // limit)][:limit]]
    result = run(
        photos,
        repository_at(model_repository),
        callers=callers,
        rounds=rounds,
        sample_s=sample_s,
        bars=terminal.round_bar,
    )
    hand_over(result, lambda: text(result), as_json, report)
