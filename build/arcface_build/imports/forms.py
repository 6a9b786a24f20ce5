"""Makes the forms of a network that are served, as checked files: the serving ONNX, and two beside it for CPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_build.errors import SourceRefused
from arcface_build.graph import Step
from arcface_build.graph.blocked_layout import blocked_layout
from arcface_build.graph.dynamic_batch import dynamic_batch
from arcface_build.graph.fold_batchnorm import fold_batchnorm
from arcface_build.graph.fold_constants import fold_constants
from arcface_build.graph.serving import serving_form
from arcface_build.graph.upgrade_opset import upgrade_opset
from arcface_build.graph.winograd import winograd
from arcface_build.imports.proof import Proof
from arcface_build.imports.source import file_digest
from arcface_clients.contract import Preprocessing

if TYPE_CHECKING:
    import onnx

CPU_FILE = "serving_cpu.onnx"
WINOGRAD_FILE = "serving_winograd.onnx"
CONVERSION = 6  # increase it when the steps produce a different graph: earlier imports are then redone


def to_serving(
    model: onnx.ModelProto, preprocessing: Preprocessing, dim: int, contract: str
) -> tuple[onnx.ModelProto, list[Step]]:
    """Run the graph steps in order; returns the serving model and what each step did."""
    steps = [upgrade_opset(model)]
    for step in (fold_constants, dynamic_batch, fold_batchnorm):
        steps.append(step(steps[-1].model))
    steps.append(serving_form(steps[-1].model, preprocessing, dim, contract))
    return steps[-1].model, steps


def forms_for_cpus(
    serving: onnx.ModelProto, file: Path, prove_file: Callable[[Path], Proof]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, list[Step]]:
    """Make and prove the other forms of a serving model beside its file; the model itself is used up.

    Returns:
        The manifest's entries for the blocked layout and for Winograd's method, None where there is no such form; and
        what their steps did.
    """
    import onnx

    blocked, blocked_step = _other_form("blocked_layout", blocked_layout, serving, file.with_name(CPU_FILE), prove_file)
    again = onnx.load(file)  # the steps work in place
    fewer, fewer_step = _other_form("winograd", winograd, again, file.with_name(WINOGRAD_FILE), prove_file)
    return blocked, fewer, [fewer_step, blocked_step]


def _other_form(
    name: str,
    transform: Callable[[onnx.ModelProto], Step],
    serving: onnx.ModelProto,
    file: Path,
    prove_file: Callable[[Path], Proof],
) -> tuple[dict[str, Any] | None, Step]:
    """Write and prove another form of the serving model, for CPUs; returns its entry for the manifest.

    It only makes serving faster, so if it fails the import continues without it.
    """
    step = Step(name, serving, False, "")
    try:
        step = transform(serving)
        if not step.changed:
            return None, step
        save_checked(step.model, file)
        proof = prove_file(file)
    except Exception as exc:  # any kind: from ONNX, ONNX Runtime or our own proof
        file.unlink(missing_ok=True)
        reason = (str(exc).splitlines() or [""])[0]
        return None, Step(step.name, serving, False, f"not for this network: {type(exc).__name__}: {reason}")
    proved = {"min_cosine": proof.min_cosine, "max_row_difference": proof.max_row_difference}
    return {**described(file), "why": step.why, **proved}, step


def described(path: Path) -> dict[str, str | int]:
    """The entry of a file in the manifest."""
    return {"file": path.name, "sha256": file_digest(path), "bytes": path.stat().st_size}


def save_checked(model: onnx.ModelProto, path: Path) -> None:
    """Write a model.

    Raises:
        SourceRefused: it violates the specification of ONNX.
    """
    import onnx

    path.write_bytes(model.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        line = str(exc).strip().splitlines()[0]
        raise SourceRefused(
            f"the converted graph violates the ONNX specification: {line}. Please report which exporter made the file."
        ) from exc
