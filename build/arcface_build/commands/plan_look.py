"""`arcface plan list`, `show` and `matrix`: what the cache and the store contain, as tables or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arcface_build import terminal
from arcface_build.commands.options.folders import models_dir_option
from arcface_build.commands.options.output import hand_over, json_option
from arcface_build.commands.options.plans import megabytes, place_options, summary, table
from arcface_build.shipped import config_table

if TYPE_CHECKING:
    from arcface_build.plans.places import Places
    from arcface_clients.errors import ArcFaceError
    from arcface_clients.plans.manifest import PlanManifest


@click.command(
    "list", epilog="\b\nExamples:\n  arcface plan list\n  arcface plan list --store s3://models/plans --json"
)
@click.option("--model", help="Only plans of this model.")
@place_options
@json_option
def list_(places: Places, model: str | None, as_json: bool) -> None:
    """List the plans of the cache and the store."""
    found, refused = _collect(places, model)
    rows = [{**summary(manifest), "where": "+".join(sorted(where))} for manifest, where in found]
    nothing = f"no plans in {' or '.join(plans.url for _, plans in places.all())}. Build one: arcface plan build NAME"
    plans = [{"where": sorted(where), **manifest.to_json()} for manifest, where in found]
    hand_over({"plans": plans, "refused": refused}, lambda: _table_of(rows) if rows else nothing, as_json)
    for why in [] if as_json else refused:
        terminal.complaint(f"refused: {why}")


@click.command(epilog="\b\nExamples:\n  arcface plan show r50-fp16-sm86.plan\n  arcface plan show 9363ac3dd29e --json")
@click.argument("plan", metavar="FILE_OR_KEY")
@place_options
@json_option
def show(places: Places, plan: str, as_json: bool) -> None:
    """Show everything known about one plan: a file, a key (or its first digits), or a plan's name."""
    from arcface_build.plans.places import plan_by_name

    manifest, _, where = plan_by_name(places, plan)

    def told() -> str:
        return f"{manifest.spec.file_name}   in {where}\n{table(('', ''), _lines(manifest))}"

    hand_over({"where": where, **manifest.to_json()}, told, as_json)


@click.command(
    epilog="\b\nExamples:\n  arcface plan matrix\n  arcface plan matrix --model r50 --store s3://models/plans"
)
@click.option("--model", help="Only plans of this model.")
@click.option(
    "--gpus",
    type=click.Path(path_type=Path),
    default=lambda: config_table("gpus.yaml"),
    show_default="config/gpus.yaml, here or above, else the shipped one",
)
@place_options
@models_dir_option
@json_option
def matrix(places: Places, model: str | None, gpus: Path, models_dir: Path, as_json: bool) -> int:
    """SM × precision × TensorRT version: which plans of config/gpus.yaml exist and which are missing.

    Exit code 1: a plan is missing; 3: there is neither a plan of this model nor the imported model.
    """
    from arcface_build.plans.gpu import load_gpus_yaml
    from arcface_clients.engines.import_manifest import model_at
    from arcface_clients.errors import Missing
    from arcface_clients.plans.fit import misfit

    infos = load_gpus_yaml(gpus)
    found, _ = _collect(places, model)
    if model and not found and not model_at(models_dir, model).is_dir():
        planned = sorted({m.spec.model for m, _ in _collect(places, None)[0]})
        imported = sorted(path.parent.name for path in models_dir.glob("*/serving.onnx"))
        raise Missing(
            f"no model {model!r}: expected a plan of it, or {models_dir / model} (plans of: "
            f"{', '.join(planned) or 'none'}; imported: {', '.join(imported) or 'none'}). "
            f"Import it: arcface import SOURCE --name {model}"
        )

    def where_is(name: str, sm: str, precision: str, version: str) -> list[str]:
        """The places with a plan that loads on this SM, either its own or a hardware-compatible one."""
        fitting = (w for m, w in found if misfit(m, sm, version, precision=precision, model=name) is None)
        return sorted(set().union(*fitting))

    models = sorted({m.spec.model for m, _ in found} | ({model} if model else set()))
    versions = sorted({m.spec.tensorrt for m, _ in found})
    cells = []
    for name in models:
        for sm in sorted({*infos, *(m.spec.sm for m, _ in found)}, key=float):
            wanted = set(infos[sm].plans) if sm in infos else set()
            built = {m.spec.precision for m, _ in found if (m.spec.model, m.spec.sm) == (name, sm)}
            for precision in sorted(wanted | built):
                for version in versions or ["any"]:
                    where = where_is(name, sm, precision, version) if versions else []
                    cells.append(
                        {
                            "model": name,
                            "sm": sm,
                            "cards": ", ".join(infos[sm].cards[:2]) if sm in infos else "not in gpus.yaml",
                            "precision": precision,
                            "tensorrt": version,
                            "state": "+".join(where) if where else "MISSING" if precision in wanted else "-",
                        }
                    )
    nothing = "no plans anywhere. Name a model to see what it needs: arcface plan matrix --model NAME"
    missing = sum(cell["state"] == "MISSING" for cell in cells)
    told = f"\n{missing} of {len(cells)} missing. Build one on a GPU of that SM: arcface plan build NAME --precision …"
    hand_over(cells, lambda: _table_of(cells) + (told if missing else "") if cells else nothing, as_json)
    return 1 if missing else 0


def _table_of(rows: Sequence[dict[str, Any]]) -> str:
    return table(list(rows[0]), [list(row.values()) for row in rows])


def _collect(places: Places, model: str | None) -> tuple[list[tuple[PlanManifest, set[str]]], list[str]]:
    """Plans with the places that have them, in list order, and why others were refused."""
    found: dict[str, tuple[PlanManifest, set[str]]] = {}
    refused: list[str] = []

    def on_refused(_: str, exc: ArcFaceError) -> None:
        refused.append(str(exc))

    for where, plans in places.all():
        for manifest in plans.manifests(on_refused):
            if model is None or manifest.spec.model == model:
                found.setdefault(manifest.key, (manifest, set()))[1].add(where)
    return list(found.values()), refused


def _lines(manifest: PlanManifest) -> list[tuple[str, Any]]:
    spec, options, build, gpu = manifest.spec, manifest.spec.options, manifest.build, manifest.gpu
    peak, drift, proof = build.get("peak_vram_bytes"), manifest.drift, manifest.precision_proof
    return [
        ("key", manifest.key),
        ("sha256", manifest.sha256),
        ("size", megabytes(manifest.size_bytes)),
        ("runs on", f"SM {spec.sm}{' and newer' if options.hardware_compatible else ''}, TensorRT {spec.tensorrt}"),
        ("batch", "; ".join(f"min {low}, opt {opt}, max {high}" for low, opt, high in spec.profiles)),
        ("workspace", megabytes(options.workspace_bytes)),
        ("embedding", f"{manifest.dim or '?'}-d, contract {manifest.contract_id or 'unknown'}"),
        ("typed ONNX", spec.onnx_sha256),
        ("built", f"{build.get('created', '?')} in {build.get('seconds', '?')} s"),
        ("peak VRAM", megabytes(peak) if peak else "not measured"),
        ("takes", _takes(manifest)),
        ("on", f"{gpu.get('name', '?')}, driver {gpu.get('driver', '?')}, CUDA {gpu.get('cuda', '?')}"),
        ("layers", ", ".join(f"{n} {p}" for p, n in (proof.get("compute") or {}).items()) or "not proved"),
        ("drift", f"max {drift['max_drift']:.2e} on {drift['faces']} faces" if drift else "not measured"),
        ("signed by", manifest.signature["public_key"] if manifest.signature else "nobody"),
    ]


def _takes(manifest: PlanManifest) -> str:
    """Memory of an instance on a GPU."""
    from arcface_build.plans.memory import PlanMemory
    from arcface_clients.errors import Missing

    try:
        memory = PlanMemory.of(manifest)
    except Missing:
        return "not measured"
    return f"{megabytes(memory.loaded_bytes)} loaded, {megabytes(memory.context_bytes)} of contexts"
