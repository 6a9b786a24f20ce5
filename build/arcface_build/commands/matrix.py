"""`arcface matrix`: backends, precisions and batch sizes in; a matrix of drift, decisions and batch invariance out."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

EPILOG = """\b
Examples:
  arcface matrix --model r50                                   every file of an imported model that passed its gate
  arcface matrix onnx onnx@bf16 localhost:8001/arcface --faces crops/ --identities
  arcface matrix --faces crops/ --pairs pairs.csv --html matrix.html --json matrix.json
"""


@click.command(epilog=EPILOG, context_settings={"auto_envvar_prefix": "ARCFACE_MATRIX", "show_default": True})
@click.argument("candidates", nargs=-1)
@click.option("--reference", default="insightface", help="What is right: as a side of arcface compare.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 2, 7, 32), help="Repeatable.")
@click.option("--faces", "sources", multiple=True, help="Crops: folder, files, glob, .npz; default: drawn faces.")
@click.option("--n-samples", type=click.IntRange(1), help="Take this many faces, spread over all.")
@click.option("--pairs", "pairs_from", type=click.Path(path_type=Path, exists=True), help="CSV a,b,same.")
@click.option("--identities", is_flag=True, help="Folders are people: pairs are drawn from them.")
@click.option("--threshold", type=float, help="Cosine from which a pair is one person; default: the reference's best.")
@click.option("--models-dir", type=click.Path(path_type=Path), default=Path("models"), help="Imported models.")
@click.option("--model", help="Which of them; default: the only one.")
@click.option("--json", "json_to", type=click.Path(path_type=Path), help="Write the report; - prints it.")
@click.option("--html", "html_to", type=click.Path(path_type=Path), help="Write the report as one page.")
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
    json_to: Path | None,
    html_to: Path | None,
) -> int:
    """Compare backends at several batch sizes with the reference: engines, HOST:PORT/MODEL, ONNX files, plans.

    Without CANDIDATES: the serving ONNX of the imported model and its variants. Exit code 1: a combination drifted
    beyond the limit of its precision, or a row depends on its batch.
    """
    from rich.console import Console

    from arcface_build.commands.compare import faces_of, pairs_of
    from arcface_build.compare.matrix import parity_matrix
    from arcface_build.compare.sides import open_side
    from arcface_clients.atomic import new_file, write_json
    from arcface_clients.config.sources import load_config

    limits = load_config().comparison.max_drift.model_dump()
    faces = faces_of(sources, ()).sample(n_samples)
    console = Console(stderr=True)
    with open_side(reference, models_dir, model) as right, console.status("") as status:
        report = parity_matrix(
            right,
            [partial(open_side, text, models_dir, model) for text in candidates or _files(models_dir, model)],
            faces,
            batches,
            limits,
            pairs_of(pairs_from, identities, faces),
            threshold,
            status.update if console.is_terminal else lambda told: None,
        )
    if json_to and str(json_to) != "-":
        write_json(json_to, report)
    if html_to:
        from arcface_build.reports.matrix_page import matrix_page

        with new_file(html_to) as temporary:
            temporary.write_text(matrix_page(report))
    click.echo(json.dumps(report, indent=2) if str(json_to) == "-" else render(report))
    return 0 if report["passed"] else 1


def render(report: dict[str, Any]) -> str:
    """The matrix as text."""
    width = max(len(row["backend"]) for row in report["rows"])
    lines = [
        f"{report['faces']} faces against {report['reference']}",
        f"{'backend':{width}}  precision  batch  mean cosine   min cosine   row alone   changed  gate",
    ]
    for row in report["rows"]:
        changed = "—" if row["changed"] is None else f"{row['changed']}/{report['pairs']}"
        verdict = "passed" if row["passed"] else f"FAILED (drift ≤ {row['max_drift']:g})"
        lines.append(
            f"{row['backend']:{width}}  {row['precision']:9}  {row['batch']:5}  {row['mean_cosine']:.9f}  "
            f"{row['min_cosine']:.9f}  {row['batch_difference']:.1e}  {changed:>9}  {verdict}"
        )
    return "\n".join(lines)


def _files(models_dir: Path, model: str | None) -> list[str]:
    """The serving ONNX and the variants that stand beside it; refused ones have another ending."""
    from arcface_clients.engines.model_folder import find_model

    folder = find_model(models_dir, model).path
    return [str(folder / "serving.onnx"), *(str(path) for path in sorted((folder / "variants").glob("*.onnx")))]
