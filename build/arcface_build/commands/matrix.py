"""`arcface matrix` shows drift, changed decisions and batch invariance by backend, precision and batch size."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from arcface_build import terminal
from arcface_build.commands.options.folders import local_model_option, models_dir_option, with_local
from arcface_build.commands.options.numbers import COSINE
from arcface_build.commands.options.output import hand_over, html_option, json_option, report_option

EPILOG = """\b
Examples:
  arcface matrix --model r50                                   every file of an imported model that passed its gate
  arcface matrix onnx onnx@bf16 localhost:8001/arcface --faces crops/ --identities
  arcface matrix --faces crops/ --pairs pairs.csv --html matrix.html --report matrix.json
"""


@click.command(epilog=EPILOG, context_settings={"auto_envvar_prefix": "ARCFACE_MATRIX", "show_default": True})
@click.argument("candidates", nargs=-1)
@click.option("--reference", default="insightface", help="The reference, as a side of arcface compare.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 2, 7, 32), help="Repeatable.")
@click.option("--faces", "sources", multiple=True, help="Crops: folder, files, glob, .npz; default: synthetic faces.")
@click.option("--n-samples", type=click.IntRange(1), help="Use this many faces, spread over all.")
@click.option("--pairs", "pairs_from", type=click.Path(path_type=Path, exists=True), help="CSV a,b,same.")
@click.option("--identities", is_flag=True, help="Each folder is a person; pairs are drawn from the folders.")
@click.option("--threshold", type=COSINE, help="Cosine from which a pair is one person; default: the reference's best.")
@models_dir_option
@local_model_option
@json_option
@report_option
@html_option
def command(
    candidates: tuple[str, ...],
    reference: str,
    batches: tuple[int, ...],
    sources: tuple[str, ...],
    n_samples: int | None,
    pairs_from: Path | None,
    identities: bool,
    threshold: float | None,
    models_dir: Path,
    model: str | None,
    as_json: bool,
    report: Path | None,
    html: Path | None,
) -> int:
    """Compare backends at several batch sizes with the reference: engines, HOST:PORT/MODEL, ONNX files, plans.

    Without CANDIDATES: the serving ONNX of the imported model and its variants. Exit code 1: a combination drifted
    beyond the limit of its precision, or a row depends on its batch.
    """
    from arcface_build.compare.faces import faces_of, pairs_of
    from arcface_build.compare.matrix import files_of, parity_matrix
    from arcface_build.compare.sides import beside_server, open_side
    from arcface_build.reports.matrix_page import matrix_page
    from arcface_build.reports.matrix_text import matrix_text
    from arcface_clients.extras import require
    from arcface_clients.pipeline import local_model

    if pairs_from or identities:
        require("sklearn", purpose="accuracy")
    config = beside_server(with_local(models_dir, model), reference, *candidates)
    faces = faces_of(sources, (), terminal.complaint).sample(n_samples)
    with open_side(reference, config) as right, terminal.status_line() as progress:
        result = parity_matrix(
            right,
            [partial(open_side, text, config) for text in candidates or files_of(local_model(config).path)],
            faces,
            batches,
            config.comparison.max_drift.model_dump(),
            pairs_of(pairs_from, identities, faces),
            threshold,
            progress,
        )
    hand_over(result, lambda: matrix_text(result), as_json, report, {html: lambda: matrix_page(result)})
    return 0 if result["passed"] else 1
