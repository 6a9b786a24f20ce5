"""`arcface quantize` makes an fp16, bf16 or int8 variant of an imported model, if it passes its gate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from arcface_build import terminal
from arcface_build.commands.options.folders import models_dir_option
from arcface_build.commands.options.numbers import DRIFT, SHARE
from arcface_build.commands.options.output import hand_over, json_option
from arcface_build.commands.options.settings import settings

EPILOG = """\b
Examples:
  arcface quantize demo-mobile --precision bf16                 the CPU fast path: verifies the fp32 file in bf16
  arcface quantize mymodel --precision int8 --eval crops/       finds the layers to keep, if any; crops/PERSON/*.jpg
  arcface quantize mymodel --precision fp16 --eval crops/       typed ONNX for TensorRT
  arcface quantize mymodel --precision int8 --target tensorrt --recipe models/mymodel/variants/int8-cpu.json
  arcface quantize mymodel --precision int8 --verify others/    judges the existing variant, and retires it if it fails
Exit codes: 0 passed, 1 refused by the gate, 2 wrong use, 3 something needed is missing.
"""


@click.command(epilog=EPILOG, context_settings={"auto_envvar_prefix": "ARCFACE_QUANTIZE", "show_default": True})
@click.argument("name")
@click.option("--precision", required=True, type=click.Choice(["fp16", "bf16", "int8"]))
@click.option("--target", type=click.Choice(["cpu", "tensorrt"]), help="Default: tensorrt for fp16, else cpu.")
@click.option("--eval", "eval_source", default="synthetic", help="Judge on: FOLDER of crops, .npz, or synthetic.")
@click.option(
    "--eval-faces", default=400, type=click.IntRange(2), help="At most so many: half to search on, half to judge."
)
@click.option("--calibration", help="Ranges from: FOLDER, .npz or synthetic. Default: the first half of --eval.")
@click.option(
    "--max-drift",
    type=DRIFT,
    help="Limit of 1 − cosine per face; default: comparison.max_drift from the configuration.",
)
@click.option(
    "--margin",
    type=SHARE,
    help="The search aims at this share of the limit; default: comparison.margin from the configuration.",
)
@click.option("--search/--no-search", default=True, help="If the plain variant misses the limit, find layers to keep.")
@click.option("--keep", multiple=True, help="A layer (node name) to keep in higher precision; repeatable.")
@click.option(
    "--recipe", type=click.Path(path_type=Path), help="Replay a recipe or a sidecar: no calibration, no search."
)
@click.option("--verify", metavar="FACES", help="Build nothing: judge the existing variant on these faces.")
@models_dir_option
@json_option
def command(
    name: str,
    precision: str,
    target: str | None,
    eval_source: str,
    eval_faces: int,
    calibration: str | None,
    max_drift: float | None,
    margin: float | None,
    search: bool,
    keep: tuple[str, ...],
    recipe: Path | None,
    verify: str | None,
    models_dir: Path,
    as_json: bool,
) -> None:
    """Make a variant of an imported model, and accept it only if its drift passes the gate."""
    from arcface_build.variants.make import TARGETS, Wish, make_variant
    from arcface_build.variants.verify import verify_variant
    from arcface_clients.engines.import_manifest import model_at
    from arcface_clients.extras import require

    if precision == "int8" and search and verify is None:
        require("matplotlib", purpose="the search for an int8 variant")
    model_dir, comparison = model_at(models_dir, name), settings().comparison
    limits = comparison.max_drift.model_dump()
    if max_drift is not None:
        limits[precision] = max_drift
    with terminal.item_bars() as bars:

        def stage(title: str) -> Callable[[int, int], None]:
            task = bars.add_task(title, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        if verify is not None:
            where = target or TARGETS[precision][0]
            sidecar = verify_variant(model_dir, precision, where, verify, eval_faces, limits, stage)
        else:
            aim = comparison.margin if margin is None else margin
            wish = Wish(precision, target, eval_source, eval_faces, calibration, limits, aim, search, keep, recipe)
            sidecar, _ = make_variant(model_dir, wish, stage)
    hand_over(sidecar, lambda: _told(model_dir, sidecar), as_json)


def _told(model_dir: Path, sidecar: dict[str, Any]) -> str:
    lines = [f"{sidecar['precision']} of {sidecar['name']}: {model_dir / sidecar['file']}"]
    for gate in sidecar["gates"]:
        drift = gate["drift"]
        line = f"  {'passed' if gate['passed'] else 'REFUSED'} in {gate['runtime']}: worst of {drift['faces']} faces"
        line += {"all": "", "held back": " held back"}.get(gate["judged_on"], f" of {gate['judged_on']}")
        line += f" {drift['max_drift']:.3g} of {gate['limit']:g} allowed, mean {1 - drift['mean_cosine']:.3g}"
        if gate["accuracy"] is not None:
            line += f"; accuracy {gate['accuracy']:.2%}, fp32 {gate['accuracy_reference']:.2%}"
        lines.append(line)
        if searched := gate["searched"]:
            told = f"{searched['max_drift']:.3g}, aimed at {searched['limit']:g}"
            lines.append(f"    on the {searched['faces']} faces that it was fitted to: {told}")
        if clipped := gate["clipped"]:
            lines.append(f"    ranges cut off at most {clipped['worst']:.3%} of a tensor's values")
    recipe = sidecar["recipe"]
    if recipe and recipe["keep"]:
        lines.append(f"  kept in higher precision ({len(recipe['keep'])}): {', '.join(recipe['keep'])}")
    plot = model_dir / "variants" / f"{sidecar['precision']}-{sidecar['target']}.search.png"
    if recipe and recipe["search"] and plot.is_file():  # a replay has the search's record but no plot
        lines.append(f"  search: {plot}")
    lines += [f"  warning: {warning}" for warning in sidecar.get("warnings", ())]
    return "\n".join(lines)
