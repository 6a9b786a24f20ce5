"""Finds the typed ONNX to build a plan from, its reference and its contract, by a model's name or a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT
from arcface_clients.engines.model_folder import ModelFolder
from arcface_clients.engines.runtimes import open_session
from arcface_clients.errors import Missing, WrongUse


@dataclass(frozen=True)
class PlanSource:
    """name: of the model. onnx: the file to build. reference: the fp32 serving ONNX, proved against InsightFace.

    recipe: the sidecar with what makes `onnx` from `reference`; None: `onnx` is the reference itself, or a given file.
    """

    name: str
    onnx: Path
    reference: Path
    contract_id: str | None
    recipe: Path | None = None

    def embed(self, faces: np.ndarray, batch: int = 16) -> np.ndarray:
        """The reference's embeddings of uint8 (N,112,112,3) BGR faces, by ONNX Runtime on the CPU: float32 (N,D)."""
        session = open_session(self.reference)
        parts = [faces[i : i + batch] for i in range(0, len(faces), batch)]
        return np.concatenate([session.run([EMBEDDING_OUTPUT], {FACE_INPUT: part})[0] for part in parts])


def find_source(model: str, precision: str, models_dir: Path, reference: Path | None = None) -> PlanSource:
    """models/NAME/serving.onnx for fp32, else models/NAME/variants/<precision>-tensorrt.onnx; or the given ONNX file.

    Raises:
        Missing: the model is not imported, or has no variant of this precision (a refused one counts as none).
        WrongUse: an ONNX file without its reference.
        GateFailed: a file of the model was replaced after it was proved or judged.
    """
    from arcface_clients.engines.import_manifest import model_at, read_import_manifest

    path = Path(model)
    if path.suffix == ".onnx":
        if not path.is_file():
            raise Missing(f"no ONNX file at {path}. Import one first: arcface import SOURCE")
        if reference is None and precision != "fp32":
            raise WrongUse(
                f"{path} alone says nothing about its drift: add --reference SERVING.onnx (the fp32 one), "
                "or give the model's name."
            )
        return PlanSource(path.stem, path, reference or path, None)
    folder = model_at(models_dir, model)
    manifest = read_import_manifest(folder)
    serving = folder / str(manifest.serving["file"])
    typed = serving if precision == "fp32" else folder / "variants" / f"{precision}-tensorrt.onnx"
    if not typed.is_file():
        refused = typed.with_name(typed.name + ".refused")
        why = f"it failed its gate ({refused})" if refused.is_file() else f"expected {typed}"
        raise Missing(
            f"{model} has no {precision} variant for TensorRT: {why}. "
            f"Make it: arcface quantize {model} --precision {precision} --target tensorrt"
        )
    for file in dict.fromkeys((serving, typed)):
        ModelFolder(folder, manifest).check_proved(file)
    recipe = typed.with_suffix(".json") if typed != serving and typed.with_suffix(".json").is_file() else None
    return PlanSource(manifest.name, typed, reference or serving, manifest.contract_id, recipe)
