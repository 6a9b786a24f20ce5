"""`scripts/bench vectors`: time and memory of distances, neighbours and gallery search against naive code."""

from __future__ import annotations

from pathlib import Path

import click

from arcface_build.commands.options.output import hand_over, json_option, report_option

EPILOG = """\b
Examples:
  scripts/bench vectors                              16 faces, 1,000 × 1,000, 50,000 top 10, a gallery of 100,000
  scripts/bench vectors --rows 5000 --rounds 1       in seconds
"""


@click.command("bench-vectors", epilog=EPILOG)
@click.option("--rows", default=50_000, show_default=True, type=click.IntRange(100), help="Embeddings to search among.")
@click.option(
    "--gallery", default=100_000, show_default=True, type=click.IntRange(100), help="Embeddings in the gallery."
)
@click.option("--dim", default=512, show_default=True, type=click.IntRange(2))
@click.option("--k", default=10, show_default=True, type=click.IntRange(1), help="Neighbours of each row.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@json_option
@report_option
def command(rows: int, gallery: int, dim: int, k: int, rounds: int, as_json: bool, report: Path | None) -> None:
    """Measure distances by matrix product against naive code, interleaved in one run."""
    from arcface_tools import vectors

    result = vectors.run(rows, gallery, dim, k, rounds)
    hand_over(result, lambda: vectors.table(result), as_json, report)
