"""`arcface compare`: two sources of embeddings in; drift, accuracy and what explains the difference out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from arcface_build.compare.comparison import Faces
    from arcface_build.compare.sides import Side
    from arcface_clients.evidence.accuracy import Pairs

EPILOG = """\b
Examples:
  arcface compare insightface onnx --faces crops/                 two engines of an imported model
  arcface compare insightface localhost:8001/arcface              InsightFace against a server
  arcface compare before.npz after.npz --pairs pairs.csv          saved embeddings, with verification accuracy
  arcface compare models/a/serving.onnx models/a/variants/fp16-tensorrt.onnx --layers
  arcface compare insightface sm86.plan --html report.html        on a GPU host
"""


@click.command(epilog=EPILOG, context_settings={"auto_envvar_prefix": "ARCFACE_COMPARE", "show_default": True})
@click.argument("a")
@click.argument("b")
@click.option("--faces", "sources", multiple=True, help="Crops: folder, files, glob, .npz; default: drawn faces.")
@click.option("--n-samples", type=click.IntRange(1), help="Compare on this many faces, spread over all.")
@click.option("--pairs", "pairs_from", type=click.Path(path_type=Path, exists=True), help="CSV a,b,same: accuracy.")
@click.option("--identities", is_flag=True, help="Folders are people: pairs for accuracy are drawn from them.")
@click.option("--threshold", type=float, help="Cosine from which a pair is one person; default: A's best.")
@click.option("--max-drift", type=float, help="Largest 1 − cosine; default: that of the coarser precision of the two.")
@click.option("--layers", is_flag=True, help="Two ONNX files: layer by layer, the first that departs is named.")
@click.option("--layer-tolerance", default=1e-3, help="Relative error up to which a layer counts as equal.")
@click.option("--tensorrt", is_flag=True, help="With --layers: build B with TensorRT.")
@click.option("--source", type=click.Path(path_type=Path, exists=True), help="Source ONNX to explain the drift with.")
@click.option("--explain/--no-explain", default=None, help="Look for the fault; default: when the gate fails.")
@click.option("--across-contracts", is_flag=True, help="Compare though A and B are known to be different models.")
@click.option("--models-dir", type=click.Path(path_type=Path), default=Path("models"), help="Imported models.")
@click.option("--model", help="Which of them engines take; default: the only one.")
@click.option("--json", "json_to", type=click.Path(path_type=Path), help="Write the report; - prints it.")
@click.option("--html", "html_to", type=click.Path(path_type=Path), help="Write the report as one page.")
def command(
    a: str,
    b: str,
    sources: tuple[str, ...],
    n_samples: int | None,
    pairs_from: Path | None,
    identities: bool,
    threshold: float | None,
    max_drift: float | None,
    layers: bool,
    layer_tolerance: float,
    tensorrt: bool,
    source: Path | None,
    explain: bool | None,
    across_contracts: bool,
    models_dir: Path,
    model: str | None,
    json_to: Path | None,
    html_to: Path | None,
) -> int:
    """Compare B with A, which is right: engine name, HOST:PORT/MODEL, ONNX file, plan, or saved embeddings.

    Exit code 1: a face drifted beyond --max-drift, or a figure is beyond its warning.
    """
    from arcface_build.compare.comparison import ACROSS_CONTRACTS, compare_sides
    from arcface_build.compare.comparison import explain as explain_drift
    from arcface_build.compare.reference import find_source
    from arcface_build.compare.sides import open_side
    from arcface_clients.atomic import new_file, write_json
    from arcface_clients.config.sources import load_config
    from arcface_clients.evidence.drift import DRIFT_LIMITS, TARGETS

    targets = load_config().comparison
    with open_side(a, models_dir, model) as side_a, open_side(b, models_dir, model) as side_b:
        faces = faces_of(sources, (side_a, side_b)).sample(n_samples)
        limits = {**DRIFT_LIMITS, **targets.max_drift.model_dump()}
        limit = max(limits.get(side.precision, 0.0) for side in (side_a, side_b)) if max_drift is None else max_drift
        result = compare_sides(
            side_a,
            side_b,
            faces,
            limit,
            pairs_of(pairs_from, identities, faces),
            threshold,
            {name: (target.target, target.warn) for name in TARGETS for target in [getattr(targets, name)]},
            across_contracts,
        )
        network = source or find_source(a, b) or _source_of_engines(models_dir, model, a, b)
        if explain or (explain is None and not result.report["gate"]["passed"]):
            explain_drift(result, side_b, faces, network)
    if layers:
        result.report["layers"] = _layers(a, b, faces, layer_tolerance, tensorrt)
    if result.report["across_contracts"]:
        click.echo(f"WARNING: {ACROSS_CONTRACTS}", err=True)
    if json_to and str(json_to) != "-":
        write_json(json_to, result.report)
    if html_to:
        from arcface_build.reports.compare_page import compare_page

        with new_file(html_to) as temporary:
            temporary.write_text(compare_page(result.report, faces.pixels))
    click.echo(json.dumps(result.report, indent=2) if str(json_to) == "-" else render(result.report))
    return 0 if result.passed else 1


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    drift, gate = report["drift"], report["gate"]
    lines = [
        f"A  {report['a']['label']} ({report['a']['precision']})",
        f"B  {report['b']['label']} ({report['b']['precision']})",
        f"{report['faces']} faces: cosine mean {drift['mean_cosine']:.7f}, min {drift['min_cosine']:.7f}; "
        f"L2 mean {drift['mean_l2']:.2e}, max {drift['max_l2']:.2e}",
        f"gate        {'passed' if gate['passed'] else 'FAILED'}: drift {drift['max_drift']:.2e}, "
        f"allowed {gate['max_drift']:g}",
    ]
    lines += [
        f"{row['figure']:<12}{row['status']}: {row['value']:.6f} (target {row['target']:g}, warning {row['warn']:g})"
        for row in report["targets"]
    ]
    if drift["bad_rows"]:
        lines.append(f"bad rows    {drift['bad_rows']} of B are zero or hold NaN")
    worst = [f"{w['name'] or w['index']} ({1 - w['cosine']:.1e})" for w in drift["worst_faces"][:3]]
    lines.append(f"worst       {', '.join(worst)}")
    if report["accuracy"]:
        lines += _accuracy_lines(report["accuracy"])
    lines += [f"finding     {finding['fault']}: {finding['sentence']}" for finding in report["findings"]]
    if report["not_explained"]:
        lines.append(f"explanation {report['not_explained']}")
    if report["layers"]:
        lines.append(f"layers      {report['layers']['told']}")
    return "\n".join(lines)


def _accuracy_lines(accuracy: dict[str, Any]) -> list[str]:
    lines = []
    for side in ("a", "b"):
        row = accuracy[side]
        tars = ", ".join(f"TAR@FAR {far} {100 * tar['value']:.2f} %" for far, tar in row["tar_at_far"].items())
        rank = f", rank-1 {100 * row['rank1']:.2f} %" if row["rank1"] is not None else ""
        lines.append(
            f"accuracy {side.upper()}  EER {100 * row['eer']['value']:.2f} % "
            f"({100 * row['eer']['low']:.2f}–{100 * row['eer']['high']:.2f}), "
            f"ten-fold {100 * row['fold_accuracy']:.2f} ± {100 * row['fold_standard_error']:.2f} %, {tars}{rank}"
        )
    changed = accuracy["changed"]
    lines.append(
        f"decisions   {changed['changed']} of {changed['pairs']} pairs change at cosine {changed['threshold']:.4f} "
        f"(accuracy {100 * changed['accuracy_reference']:.2f} → {100 * changed['accuracy_candidate']:.2f} %)"
    )
    return lines


def faces_of(sources: tuple[str, ...], sides: Sequence[Side]) -> Faces:
    """Named crops; else those that saved embeddings name, where they are still there; else drawn ones."""
    from arcface_build.compare.comparison import Faces, names_of
    from arcface_clients.faces.images import load_or_draw

    names = names_of(sides)
    wanted = sources or (names if names and all(Path(name).is_file() for name in names) else ())
    saved = next((side.saved for side in sides if side.saved is not None), None)
    if saved is not None and not wanted:
        return Faces(None, names or tuple(f"row {i}" for i in range(len(saved))))
    return Faces(*load_or_draw(wanted, 64, partial(click.echo, err=True)))


def pairs_of(path: Path | None, identities: bool, faces: Faces) -> Pairs | None:
    """Labelled pairs from a CSV, else from folders as people, else None."""
    from arcface_clients.errors import WrongUse
    from arcface_clients.evidence.accuracy import identities_from_paths, pairs_from_csv, pairs_from_identities

    if path is None and not identities:
        return None
    if not faces.names:
        raise WrongUse("accuracy needs named faces: add --faces FOLDER, with a folder for each person.")
    if path is not None:
        return pairs_from_csv(path, faces.names)
    return pairs_from_identities(identities_from_paths(faces.names).tolist())


def _layers(a: str, b: str, faces: Faces, tolerance: float, tensorrt: bool) -> dict[str, Any]:
    from arcface_build.compare.layers import compare_layers
    from arcface_clients.errors import WrongUse
    from arcface_clients.faces.synthetic import synthetic_faces

    if Path(a).suffix != ".onnx" or Path(b).suffix != ".onnx":
        raise WrongUse(
            f"--layers compares two ONNX files, got {a} and {b}. A plan's layers cannot be read: "
            "name the ONNX that it was built from as B and add --tensorrt"
        )
    pixels = faces.pixels if faces.pixels is not None else synthetic_faces(2)
    report = compare_layers(Path(a), Path(b), pixels, tolerance, tensorrt)
    return report.to_json() | {"told": str(report)}


def _source_of_engines(models_dir: Path, model: str | None, *texts: str) -> Path | None:
    """The source ONNX of the imported model that an engine's name stands for."""
    from arcface_clients.engines.model_folder import find_model
    from arcface_clients.errors import ArcFaceError

    if all(Path(text).suffix or ":" in text for text in texts):
        return None
    try:
        return find_model(models_dir, model).source()
    except ArcFaceError:
        return None
