"""`python -m arcface_tools photos`: what looking again at a face buys, accuracy from photos alone, large photos."""

from __future__ import annotations

from pathlib import Path

import click

from arcface_build import terminal
from arcface_build.commands.options.output import hand_over, html_option, json_option, report_option

EPILOG = """\b
Examples:
  python -m arcface_tools photos raw250/ --model mobilefacenet --html looks.html       the curve
  python -m arcface_tools photos raw250/ --model mobilefacenet --pairs pairs.csv --url localhost:8001
  python -m arcface_tools photos raw250/ --model mobilefacenet --megapixels 48 --limit 36
"""


@click.command(epilog=EPILOG, context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--pairs", type=click.Path(path_type=Path, exists=True), help="Accuracy and recall through a server.")
@click.option("--megapixels", type=click.FloatRange(1, 79), help="Time and memory of JPEGs as large as this.")
@click.option("--url", default="localhost:8001", help="The server, for --pairs.")
@click.option("--model", help="Model under --models-dir; default: the only one.")
@click.option("--models-dir", type=click.Path(path_type=Path), default=Path("models"))
@click.option("--detector", type=click.Path(path_type=Path, dir_okay=False), help="YuNet's ONNX.")
@click.option("--limit", default=100, type=click.IntRange(1), help="Photos for the curve and the large JPEGs.")
@json_option
@report_option
@html_option
def command(
    folder: Path,
    pairs: Path | None,
    megapixels: float | None,
    url: str,
    model: str | None,
    models_dir: Path,
    detector: Path | None,
    limit: int,
    as_json: bool,
    report: Path | None,
    html: Path | None,
) -> None:
    """Measure how stable embeddings are by how a face is looked at; or accuracy; or large photos."""
    from arcface_clients import PhotoEmbedder
    from arcface_clients.engines.registry import EngineRegistry
    from arcface_clients.faces.images import find_files
    from arcface_tools.large_photos import large_photos, large_photos_text
    from arcface_tools.photos import from_photos, stability, stability_page

    with EngineRegistry.get("onnx", models_dir=models_dir, model=model) as engine:
        files = find_files([folder])
        files = files[:: max(1, len(files) // limit)][:limit]
        if megapixels is not None:
            result = large_photos([Path(name) for name in files], megapixels, engine, detector)
            hand_over(result, lambda: large_photos_text(result), as_json, report)
            return
        if pairs is None:
            result = stability(files, engine, detector, terminal.notice)
            hand_over(result, lambda: "", as_json, report, {html: lambda: stability_page(result)})
            return
        with PhotoEmbedder(url) as photos:
            result = from_photos(folder, pairs, photos, engine, detector)
    hand_over(result, lambda: _told(result), as_json, report)


def _told(result: dict) -> str:
    lines = [
        f"{result['photos']} photos, {result['faces']} faces: lowest cosine of server to client "
        f"{result['lowest_cosine']:.6f}; photos without a face or with another number of them: "
        f"{result['photos_with_other_faces_or_none']['count']}"
    ]
    for way, measured in result["accuracy"].items():
        accuracy, eer = 100 * measured["fold_accuracy"], 100 * measured["eer"]["value"]
        lines.append(f"{way}: ten-fold accuracy {accuracy:.2f} %, EER {eer:.2f} %")
    recalled = (f"{size} px {found['share']:.2f}" for size, found in result["recall"].items())
    lines.append(f"recall by height of the face: {', '.join(recalled)}")
    return "\n".join(lines)
