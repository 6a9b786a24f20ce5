"""Judges an existing variant on other faces and records the verdict; one that fails is retired and no longer served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_build.errors import ProofFailed
from arcface_build.variants.eval_set import FaceSet, evaluation_faces
from arcface_build.variants.gate import VariantVerdict
from arcface_build.variants.held_back import light, take
from arcface_build.variants.make import load_named
from arcface_build.variants.recipe import load_recipe
from arcface_build.variants.sidecar import read_sidecar, set_aside, variants_folder
from arcface_build.variants.trial import Stage, open_trial, runtimes_for, silent
from arcface_clients.atomic import write_json
from arcface_clients.engines.import_manifest import ImportManifest, read_import_manifest
from arcface_clients.engines.model_folder import ModelFolder
from arcface_clients.engines.runtimes import cpu_flags, has_bf16, has_openvino
from arcface_clients.errors import Missing, WrongUse

if TYPE_CHECKING:
    import onnx


def verify_variant(
    model_dir: Path,
    precision: str,
    target: str,
    source: str,
    count: int,
    limits: Mapping[str, float],
    stage: Stage = silent,
) -> dict[str, Any]:
    """Judge a variant on all of these faces, and write the verdict into its sidecar; returns the sidecar.

    For each runtime the worst verdict counts; `verified` lists them all.

    Args:
        model_dir: models/NAME/.
        precision, target: which variant.
        source, count: the faces (`eval_set.evaluation_faces`) and at most how many.
        limits: largest drift by precision.
        stage: takes a title and returns the progress callback of that stage.

    Raises:
        ProofFailed: it fails in one of its runtimes and is renamed to .refused.
        GateFailed: the file was replaced after it was judged, or made from another import.
        Missing: no such variant, or none of its runtimes on this host.
        WrongUse: these are the faces that it was fitted to.
    """
    manifest = read_import_manifest(model_dir)
    name = f"{precision}-{target}"
    sidecar = read_sidecar(model_dir, precision, target)
    if sidecar is None:
        refused = (variants_folder(model_dir) / f"{name}.json.refused").is_file()
        raise Missing(
            f"no {name} variant of {manifest.name}{': its gate refused it' if refused else ''}. "
            f"Make it: arcface quantize {manifest.name} --precision {precision} --target {target}"
        )
    ModelFolder(model_dir, manifest).check_proved(model_dir / sidecar["file"])
    faces = _unseen(sidecar, evaluation_faces(source, count))
    verdicts = _judge(model_dir, manifest, sidecar, faces, limits, stage)
    told = [verdict.to_json() for verdict in verdicts]
    worse = {gate["runtime"]: gate for gate in told}
    sidecar["gates"] = [_worse(gate, worse.get(gate["runtime"])) for gate in sidecar["gates"]]
    sidecar.setdefault("verified", []).append(
        {
            **faces.to_json(),
            "mean_grey": light(faces),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "gates": told,
        }
    )
    failed = next((verdict for verdict in verdicts if not verdict.passed), None)
    if failed is None:
        write_json(variants_folder(model_dir) / f"{name}.json", sidecar)
        return sidecar
    path = set_aside(model_dir, sidecar, f"{len(faces.faces)} faces of {faces.origin}", failed)
    raise ProofFailed(
        f"{precision} of {manifest.name} fails in {failed.runtime} on {len(faces.faces)} faces of {faces.origin}: "
        f"{failed.why}. It is retired ({path}). If it is installed, replace it: "
        f"arcface assemble {manifest.name} --variant auto"
    )


def _judge(
    model_dir: Path,
    manifest: ImportManifest,
    sidecar: dict[str, Any],
    faces: FaceSet,
    limits: Mapping[str, float],
    stage: Stage,
) -> list[VariantVerdict]:
    precision, target = sidecar["precision"], sidecar["target"]
    runtimes = [runtime for runtime in runtimes_for(precision, target) if _is_here(runtime)]
    if not runtimes:
        raise Missing(f"{precision} of {manifest.name} runs in no runtime of this host. Next: arcface doctor")
    trial = open_trial(model_dir, manifest, precision, target, limits, faces, stage)
    judged: Path | onnx.ModelProto = model_dir / sidecar["file"]
    clipped: Mapping[str, float] = {}
    if sidecar["recipe"]:
        serving_path = model_dir / manifest.serving["file"]
        recipe = load_recipe(
            variants_folder(model_dir) / f"{precision}-{target}.json", precision, target, manifest.serving["sha256"]
        )
        serving = load_named(serving_path)
        clipped = recipe.clipped(serving, faces.faces, stage("values cut off"))
        if target == "tensorrt":
            judged = recipe.stand_in(serving)
    return [
        replace(trial.judge(judged, runtime, f"gate in {runtime}"), judged_on=faces.origin, clipped=clipped)
        for runtime in runtimes
    ]


def _is_here(runtime: str) -> bool:
    if runtime == "onnxruntime":
        return True
    return has_openvino() and (runtime != "openvino-bf16" or has_bf16(cpu_flags()))


def _unseen(sidecar: Mapping[str, Any], faces: FaceSet) -> FaceSet:
    """The faces that the variant was not fitted to; older sidecars know only whole sets of faces, in their order."""
    sets = [(sidecar["recipe"] or {}).get("calibration"), sidecar.get("searched")]
    if "searched" not in sidecar and sidecar["recipe"]:  # an older sidecar: one set was used for both
        sets.append(sidecar["eval"])
    fitted = [known for known in sets if known]
    each = {face for known in fitted for face in known.get("each", ())}
    left = [row for row, face in enumerate(faces.each) if face not in each]
    if not left or faces.sha256 in {known["sha256"] for known in fitted}:
        raise WrongUse(
            f"{faces.origin} contains the faces that the variant was fitted to: they prove nothing. "
            "Give others: --verify FACES"
        )
    return faces if len(left) == len(faces.faces) else take(faces, left)


def _worse(known: dict[str, Any], new: dict[str, Any] | None) -> dict[str, Any]:
    """The verdict to keep: the new one if it is worse, or if the known one is from faces the variant was fitted to."""
    if new is None:
        return known
    if not new["passed"] or "judged_on" not in known:
        return {**new, "searched": known.get("searched")}
    if known["passed"] and new["drift"]["max_drift"] > known["drift"]["max_drift"]:
        return {**new, "searched": known.get("searched")}
    return known
