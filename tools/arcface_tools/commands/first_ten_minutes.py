"""`python -m arcface_tools first-ten-minutes`: what a newcomer sees, recorded with times and sizes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from arcface_build import terminal
from arcface_build.commands.options.output import NewFile

EPILOG = """\b
Examples:
  python -m arcface_tools first-ten-minutes -o docs/measured/first-ten-minutes.md
  python -m arcface_tools first-ten-minutes -o recording.md --model MobileFaceNet.onnx --first-port 9000
"""


@click.command(epilog=EPILOG, context_settings={"show_default": True})
@click.option("-o", "--output", type=NewFile(), required=True, help="The Markdown page to write.")
@click.option("--source", default=".", help="What is cloned.")
@click.option("--model", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Also import this ONNX.")
@click.option("--first-port", default=8000, type=click.IntRange(1024, 65533), help="Of HTTP, gRPC and metrics.")
def command(output: Path, source: str, model: Path | None, first_port: int) -> int:
    """Clone, run `scripts/serve` and README's lines as a new user would, and write down what is seen.

    Exit code 1: a line failed.
    """
    from arcface_clients.atomic import new_file
    from arcface_tools.first_ten_minutes import page, record

    where = source if "://" in source else str(Path(source).resolve())
    steps, sizes = record(where, model, first_port, terminal.notice)
    typed = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    text = page(steps, sizes, f"python -m arcface_tools {shlex.join(typed)}")
    with new_file(output) as temporary:
        temporary.write_text(text.replace(where, "REPOSITORY"))
    return 1 if any(step.status for step in steps) else 0
