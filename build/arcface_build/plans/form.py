"""Puts the ONNX of a plan into the form asked for, and proves on a CPU that its embeddings stay the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from arcface_build.errors import ProofFailed
from arcface_build.graph.tensorrt_form import TensorRtForm, form_of
from arcface_build.plans.source import PlanSource
from arcface_build.variants.make import load_named
from arcface_build.variants.recipe import load_recipe
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT
from arcface_clients.engines.runtimes import open_session
from arcface_clients.errors import WrongUse
from arcface_clients.evidence.drift import DRIFT_LIMITS
from arcface_clients.evidence.gate import judge_embeddings
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.plans.manifest import file_sha256

if TYPE_CHECKING:
    import onnx

PROOF_FACES = 4  # the plan itself is judged on more; here a mistake in a rewrite would show on one


def in_form(
    source: PlanSource, precision: str, folder: Path, *, fold_padded: bool | None = None, prelu: str | None = None
) -> PlanSource:
    """The source with its ONNX in the form asked for: written into `folder`, or as it is if it has that form.

    Where nothing is asked for, a variant or a given file keeps its form, and an import gets TensorRtForm().

    Raises:
        ProofFailed: the rewritten network gives other embeddings.
        WrongUse: the form of a given file cannot be undone.
    """
    model = load_named(source.onnx)
    have = form_of(model)
    imported = source.contract_id is not None and source.onnx == source.reference
    wanted = TensorRtForm() if imported else have
    wanted = TensorRtForm(wanted.fold_padded if fold_padded is None else fold_padded, prelu or wanted.prelu)
    if wanted == have:
        return source
    if source.recipe is None:
        made = _rewritten(source, model, have, wanted)
        if made is None:
            return source
        _prove(source.onnx, made, precision, wanted)
    else:
        serving = load_named(source.reference)
        recipe = load_recipe(source.recipe, precision, "tensorrt", file_sha256(source.reference))
        formed = type(serving)()
        formed.CopyFrom(serving)
        wanted.steps(formed)
        _prove(source.reference, formed, "fp32", wanted)
        del formed
        made = replace(recipe, form=wanted).apply(serving)
    path = folder / f"{precision}-{'folded' if wanted.fold_padded else 'unfolded'}-{wanted.prelu}.onnx"
    path.write_bytes(made.SerializeToString(deterministic=True))
    return replace(source, onnx=path)


def _rewritten(
    source: PlanSource, model: onnx.ModelProto, have: TensorRtForm, wanted: TensorRtForm
) -> onnx.ModelProto | None:
    """The given file in another form, labelled; None if it has nothing to rewrite."""
    if (have.fold_padded and not wanted.fold_padded) or (have.prelu == "fused" and wanted.prelu != "fused"):
        raise WrongUse(
            f"{source.onnx} is in the form {have.to_json()}, which cannot be undone in the file. Give the model's "
            "name instead: arcface plan build NAME"
        )
    changed = [step.changed for step in wanted.steps(model)]
    return wanted.label(model) if any(changed) else None


def _prove(before: Path, after: onnx.ModelProto, precision: str, form: TensorRtForm) -> None:
    faces = synthetic_faces(PROOF_FACES)
    old, new = (open_session(m).run([EMBEDDING_OUTPUT], {FACE_INPUT: faces})[0] for m in (before, after))
    verdict = judge_embeddings(old, new, precision, DRIFT_LIMITS)
    if not verdict.passed:
        raise ProofFailed(
            f"{before} in the form {form.to_json()} gives other embeddings: {verdict.why}. Build it as it is: "
            "--no-fold-padded --prelu as-is"
        )
