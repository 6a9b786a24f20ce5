"""`arcface bench-variants`: a model with variants in; a table of speed and drift out."""

from __future__ import annotations

import json
from pathlib import Path

import click

EPILOG = """\b
Examples:
  arcface bench-variants demo-r50                            fp32, bf16 and int8, batch 8 and 32, two threads
  arcface bench-variants mymodel --faces crops/ --json variants.json
"""


@click.command(epilog=EPILOG, context_settings={"auto_envvar_prefix": "ARCFACE_BENCH_VARIANTS", "show_default": True})
@click.argument("name")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=(8, 32), help="Faces a call.")
@click.option("--threads", default=2, type=click.IntRange(1), help="Threads of each session.")
@click.option("--rounds", default=7, type=click.IntRange(1), help="Undisturbed rounds; each measures everything once.")
@click.option("--sample-s", default=2.0, type=click.FloatRange(0), help="Seconds of one sample, about.")
@click.option("--faces", "faces_from", default="synthetic", help="FOLDER of crops, .npz, or synthetic.")
@click.option("--insightface", is_flag=True, help="Also InsightFace in-process, one face a call.")
@click.option("--models-dir", type=click.Path(path_type=Path), default=Path("models"))
@click.option("--json", "json_to", type=click.Path(path_type=Path), help="Write the result here; - prints it.")
def command(
    name: str,
    batches: tuple[int, ...],
    threads: int,
    rounds: int,
    sample_s: float,
    faces_from: str,
    insightface: bool,
    models_dir: Path,
    json_to: Path | None,
) -> None:
    """Measure the variants of NAME in turns against ONNX Runtime fp32, with their drift beside the speed.

    The order is kept in models/NAME/variants/speed.json: `arcface assemble NAME --variant auto` follows it on this CPU.
    """
    from rich.console import Console

    from arcface_build.bench.variants import run, speeds, table
    from arcface_build.variants.choose import speeds_file
    from arcface_build.variants.eval_set import evaluation_faces
    from arcface_clients.atomic import write_json

    console = Console(stderr=True)
    with console.status("loading"):  # shows only on a terminal
        result = run(
            models_dir / name,
            batches,
            threads=threads,
            rounds=rounds,
            sample_s=sample_s,
            faces=evaluation_faces(faces_from, 64),
            insightface=insightface,
            on_sample=lambda variant, number: (
                console.print(f"round {number}: {variant}", style="dim") if console.is_terminal else None
            ),
        )
    write_json(speeds_file(models_dir / name), speeds(result))
    if json_to == Path("-"):
        click.echo(json.dumps(result, indent=2))
        return
    if json_to:
        write_json(json_to, result)
    rows = table(result)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if result["rounds"]["disturbed"]:
        click.echo("other processes took part of the cores in every round: measure again on a quiet machine", err=True)
