"""`arcface bench-variants` measures speed and drift of a model's variants, interleaved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from arcface_build import terminal
from arcface_build.commands.options.folders import models_dir_option
from arcface_build.commands.options.numbers import NOT_NEGATIVE
from arcface_build.commands.options.output import hand_over, json_option, report_option
from arcface_build.commands.options.plans import table as columns

EPILOG = """\b
Examples:
  arcface bench-variants demo-r50                            fp32, bf16 and int8 in each runtime; two threads
  arcface bench-variants mymodel --faces crops/ --report variants.json
"""


@click.command(epilog=EPILOG, context_settings={"auto_envvar_prefix": "ARCFACE_BENCH_VARIANTS", "show_default": True})
@click.argument("name")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 8, 32), help="Faces per call.")
@click.option("--threads", default=2, type=click.IntRange(1), help="Threads of each session.")
@click.option("--rounds", default=7, type=click.IntRange(1), help="Undisturbed rounds; each measures everything once.")
@click.option("--sample-s", default=2.0, type=NOT_NEGATIVE, help="Approximate length of a sample in seconds.")
@click.option("--faces", "faces_from", default="synthetic", help="FOLDER of crops, .npz, or synthetic.")
@click.option("--insightface", is_flag=True, help="Also InsightFace in-process, one face per call.")
@models_dir_option
@json_option
@report_option
def command(
    name: str,
    batches: tuple[int, ...],
    faces_from: str,
    models_dir: Path,
    as_json: bool,
    report: Path | None,
    **how_long: Any,
) -> None:
    """Measure speed and drift of NAME's variants in each runtime of this host against ONNX Runtime fp32, interleaved.

    What is served is chosen by a short measurement of its own: `arcface assemble NAME --variant auto --remeasure`.
    """
    from arcface_build.bench.variants import run, table
    from arcface_build.variants.eval_set import evaluation_faces
    from arcface_clients.engines.import_manifest import model_at

    model_dir = model_at(models_dir, name)
    with terminal.status_line("loading") as progress:
        result = run(
            model_dir,
            batches,
            faces=evaluation_faces(faces_from, 64),
            on_sample=lambda variant, number: progress(f"round {number}: {variant}"),
            **how_long,
        )
    header, *rows = table(result)
    hand_over(result, lambda: columns(header, rows), as_json, report)
    if result["rounds"]["disturbed"]:
        terminal.complaint("other processes used the cores in every round: measure again on an idle machine")
