"""`arcface compare` measures drift and accuracy of one source of embeddings against another, and explains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from arcface_build import terminal
from arcface_build.commands.options.folders import (
    local_model_option,
    model_repository_option,
    models_dir_option,
    repository_at,
    with_local,
)
from arcface_build.commands.options.numbers import COSINE, DRIFT, POSITIVE
from arcface_build.commands.options.output import hand_over, html_option, json_option, report_option

EPILOG = """\b
Examples:
  arcface compare insightface onnx --faces crops/                 two engines of an imported model
  arcface compare insightface localhost:8001/arcface              InsightFace against a server
  arcface compare before.npz after.npz --pairs pairs.csv          saved embeddings, with verification accuracy
  arcface compare insightface onnx --faces crops/ --pairs pairs.csv --calibrate    where photo_verify decides
  arcface compare models/a/serving.onnx models/a/variants/fp16-tensorrt.onnx --layers
  arcface compare insightface sm86.plan --html report.html        on a GPU host
"""


@click.command(epilog=EPILOG, context_settings={"auto_envvar_prefix": "ARCFACE_COMPARE", "show_default": True})
@click.argument("a")
@click.argument("b")
@click.option("--faces", "sources", multiple=True, help="Crops: folder, files, glob, .npz; default: synthetic faces.")
@click.option("--n-samples", type=click.IntRange(1), help="Compare on this many faces, evenly spaced.")
@click.option("--pairs", "pairs_from", type=click.Path(path_type=Path, exists=True), help="CSV a,b,same for accuracy.")
@click.option("--identities", is_flag=True, help="Folders are people: make the pairs for accuracy from them.")
@click.option("--threshold", type=COSINE, help="Cosine from which a pair is one person; default: A's best.")
@click.option("--max-drift", type=DRIFT, help="Largest 1 − cosine; default: the limit of the coarser precision.")
@click.option("--layers", is_flag=True, help="Two ONNX files: compare layer by layer, name the first that differs.")
@click.option(
    "--layer-tolerance", type=POSITIVE, default=1e-3, help="Relative error up to which a layer counts as equal."
)
@click.option("--tensorrt", is_flag=True, help="With --layers: build B with TensorRT.")
@click.option("--source", type=click.Path(path_type=Path, exists=True), help="Source ONNX used to explain the drift.")
@click.option("--explain/--no-explain", default=None, help="Look for the fault; default: if the gate fails.")
@click.option("--show-faces", is_flag=True, help="With --html: put the worst faces into the page; pages are passed on.")
@click.option("--across-contracts", is_flag=True, help="Compare even if A and B are known to be different models.")
@click.option("--calibrate", is_flag=True, help="Have photo_verify decide at B's measured threshold (needs pairs).")
@model_repository_option
@models_dir_option
@local_model_option
@json_option
@report_option
@html_option
def command(
    a: str,
    b: str,
    models_dir: Path,
    model: str | None,
    as_json: bool,
    report: Path | None,
    html: Path | None,
    show_faces: bool,
    calibrate: bool,
    model_repository: Path | None,
    **asked_for: Any,
) -> int:
    """Compare B with A, the ground truth; each is an engine, HOST:PORT/MODEL, ONNX file, plan, or saved embeddings.

    Exit code 1: a face drifted beyond --max-drift, or a figure is beyond its warning.
    """
    from arcface_build.compare.comparison import ACROSS_CONTRACTS
    from arcface_build.compare.run import CompareRequest, compare
    from arcface_build.reports.compare_page import compare_page
    from arcface_build.reports.compare_text import compare_text
    from arcface_build.repository.calibration import calibrate_verify, told_of
    from arcface_clients.errors import WrongUse
    from arcface_clients.extras import require

    if show_faces:
        require("cv2", purpose="--show-faces")
    asked = CompareRequest(**asked_for)
    if calibrate and not (asked.pairs_from or asked.identities):
        raise WrongUse("--calibrate needs labelled pairs: add --pairs pairs.csv, or --identities")
    repository = repository_at(model_repository) if calibrate else None
    result, faces = compare(a, b, asked, with_local(models_dir, model), terminal.complaint)
    if result.report["across_contracts"]:
        terminal.complaint(f"WARNING: {ACROSS_CONTRACTS}")
    if repository is not None:
        result.report["calibrated_max_distance"] = calibrate_verify(repository, result.report)
        terminal.notice(f"{told_of(repository, result.report['b']['contract_id'])}, from the next start of the server")
    pages = {html: lambda: compare_page(result.report, faces.pixels if show_faces else None)}
    hand_over(result.report, lambda: compare_text(result.report), as_json, report, pages)
    return 0 if result.passed else 1
