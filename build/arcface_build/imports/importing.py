"""Converts and proves a source, and writes models/NAME/ with the source, the serving ONNX and the manifest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.graph import Step
from arcface_build.graph.repair_source import repair_source
from arcface_build.graph.upgrade_opset import opset_of
from arcface_build.imports.as_given import check_as_given
from arcface_build.imports.flavour import check_width, flavour_of
from arcface_build.imports.forms import CONVERSION, described, forms_for_cpus, save_checked, to_serving
from arcface_build.imports.front import Front
from arcface_build.imports.onnx_file import external_files, read_source
from arcface_build.imports.outputs import keep_embedding
from arcface_build.imports.preprocessing import Stated, decide_preprocessing
from arcface_build.imports.proof import Proof, Reference, prove, reference_embeddings
from arcface_build.imports.proof_faces import ProofFaces
from arcface_build.imports.second_look import second_look
from arcface_build.imports.source import Source, file_digest
from arcface_clients.arrays import Array
from arcface_clients.atomic import new_folder, write_json
from arcface_clients.contract import contract_id
from arcface_clients.engines.import_manifest import IMPORT_MANIFEST, ImportManifest, read_import_manifest
from arcface_clients.errors import Missing, WrongUse
from arcface_clients.evidence.drift import DRIFT_LIMITS
from arcface_clients.evidence.gate import limit_of
from arcface_clients.evidence.golden import golden_faces, golden_record, is_golden

SOURCE_FILE = "source.onnx"
SERVING_FILE = "serving.onnx"
TOOLS = ("arcface-triton", "onnx", "onnxruntime", "onnxruntime-openvino", "onnxruntime-gpu", "insightface", "numpy")
OnStep = Callable[[str, int, int], None]  # (what, done, total)


def import_model(
    source: Source,
    folder: Path,
    faces: ProofFaces,
    *,
    stated: Stated | None = None,
    output: str | None = None,
    variants_of: Path | None = None,
    limits: Mapping[str, float] = DRIFT_LIMITS,
    progress: OnStep = lambda what, done, total: None,
) -> ImportManifest:
    """Convert, prove and write; `folder` appears (or is replaced) as a whole, or stays untouched.

    Args:
        source: from `arcface_build.imports.source.resolve`, with its file present (`source.with_file`).
        folder: models/NAME.
        faces: for the proof.
        stated: the preprocessing stated by the user; each part takes precedence over everything else.
        output: name of the embedding, if the file has several possible outputs.
        variants_of: the folder of an earlier import whose variants may be kept; by default `folder`.
        limits: largest drift by precision; the proof applies that of fp32.
        progress: called with (phase, done, total).

    Raises:
        SourceRefused, ProofFailed, WrongUse: the import failed; nothing is left behind.
    """
    label = source.path.name
    progress("read", 0, 1)
    model = read_source(source.path)
    outputs = len(model.graph.output)
    keep_embedding(model, label, output)
    flavour = flavour_of(model, label)
    with new_folder(folder) as temporary:
        repaired = repair_source(model)
        decision = decide_preprocessing(
            Front(repaired.model),
            label,
            stated,
            known=(source.preprocessing, source.note) if source.preprocessing else None,
            says_inside=flavour.insightface_says_inside,
            whole_pixels=flavour.input_type == "uint8",
        )
        preprocessing = decision.fed
        copy = _keep_source(source, repaired, temporary / SOURCE_FILE, whole=outputs == 1 and not source.checkpoint)
        reference = Reference(temporary / SOURCE_FILE, preprocessing, label)
        expected = reference_embeddings(reference, faces.faces, partial(progress, "reference"))
        dim = check_width(expected.shape[1], label)
        as_given = None
        if not copy["exact"] and not source.checkpoint:
            as_given = check_as_given(source.path, flavour, preprocessing, faces.faces, expected)
        look = None
        if source.preprocessing is None:
            progress("look again", 0, 1)
            look = second_look(repaired.model, preprocessing, faces)
        progress("convert", 0, 1)
        contract = contract_id(source.sha256, preprocessing, dim, output if outputs > 1 else None)
        serving, steps = to_serving(repaired.model, preprocessing, dim, contract)
        save_checked(serving, temporary / SERVING_FILE)
        opset = opset_of(serving)
        prove_file = partial(
            _prove,
            faces=faces,
            expected=expected,
            reference=reference,
            limits=limits,
            contract=contract,
            progress=progress,
        )
        proof = prove_file(temporary / SERVING_FILE)
        blocked, fewer, more_steps = forms_for_cpus(serving, temporary / SERVING_FILE, prove_file)
        manifest = ImportManifest(
            name=folder.name,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            source=_source_told(source, {**copy, "min_cosine_to_file": as_given}, output),
            flavour=flavour.to_json(),
            preprocessing={**decision.to_json(), "look": look.to_json() if look else None},
            dim=dim,
            contract_id=contract,
            steps=[step.to_json() for step in (repaired, *steps, *more_steps)],
            serving={**described(temporary / SERVING_FILE), "opset": opset, "conversion": CONVERSION},
            proof=proof.to_json(),
            tools=tool_versions(),
            cpu=blocked,
            winograd=fewer,
            golden=golden_record(np.stack([reference.embed(face) for face in golden_faces()])),
        )
        write_json(temporary / IMPORT_MANIFEST, manifest.to_json())
        _keep_variants(variants_of or folder, temporary, manifest)
    return manifest


def _keep_source(source: Source, repaired: Step, target: Path, *, whole: bool) -> dict[str, Any]:
    """Write the file the reference will run: the source byte for byte, or the repaired model in one file."""
    exact = whole and not repaired.changed and not external_files(source.path)
    if exact:
        shutil.copyfile(source.path, target)
    else:
        target.write_bytes(repaired.model.SerializeToString(deterministic=True))
    return {"file": target.name, "sha256": file_digest(target), "exact": exact}


def _source_told(source: Source, copy: dict[str, Any], output: str | None) -> dict[str, Any]:
    """The manifest's entry for the source."""
    told = {
        "sha256": source.sha256,
        "file": (source.checkpoint or source.path).name,
        "kind": source.kind,
        "licence": source.licence,
    }
    told |= {"url": source.url, "note": source.note}
    told |= {"output": output} if output else {}
    return told | ({"recipe": source.recipe} if source.recipe else {}) | {"copy": copy}


def existing_import(
    folder: Path,
    source: Source,
    stated: Stated | None,
    output: str | None = None,
    limits: Mapping[str, float] = DRIFT_LIMITS,
) -> ImportManifest | None:
    """The manifest of an earlier import of the same source by the same version, if its files are intact.

    Its proof must be within `limits`, and the stated preprocessing the same. Demos are compared by recipe, so that they
    need not be built.
    """
    if not (folder / IMPORT_MANIFEST).is_file():
        return None
    said = (stated or Stated()).to_json()
    try:
        manifest = read_import_manifest(folder)
        same = (
            manifest.source.get("recipe", "") == source.recipe
            and (bool(source.recipe) or manifest.source["sha256"] == source.sha256)
            and manifest.source.get("output") == output
            and manifest.tools == tool_versions()
            and manifest.serving["conversion"] == CONVERSION
            and manifest.preprocessing["stated"] == said
            and is_golden(manifest.golden)
            and 1 - manifest.proof["min_cosine"] <= limit_of("fp32", limits)
            and (bool(said) or source.preprocessing in (None, manifest.wants()))
            and all(
                file_digest(folder / part["file"]) == part["sha256"]
                for part in (manifest.serving, manifest.source["copy"], manifest.cpu, manifest.winograd)
                if part
            )
        )
    except (WrongUse, KeyError, TypeError, OSError):
        return None
    return manifest if same else None


def tool_versions() -> dict[str, str]:
    """Installed versions of the packages that affect an import."""
    found = {}
    for package in TOOLS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _keep_variants(old: Path, new: Path, manifest: ImportManifest) -> None:
    """Keep variants (perhaps hours of search) if the new import gives the same serving ONNX; others are stale."""
    try:
        same = read_import_manifest(old).serving["sha256"] == manifest.serving["sha256"]
    except (Missing, WrongUse, KeyError):
        return
    if same and (old / "variants").is_dir():
        shutil.copytree(old / "variants", new / "variants")


def _prove(
    file: Path,
    faces: ProofFaces,
    expected: Array,
    reference: Reference,
    limits: Mapping[str, float],
    contract: str,
    progress: OnStep,
) -> Proof:
    on_face = partial(progress, f"prove {file.name}")
    return prove(file, faces.faces, expected, reference, faces.origin, on_face, limits, contract)
