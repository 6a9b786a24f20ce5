"""From a model folder (models/NAME/) into the model repository: serving ONNX and the untouched source beside it."""

from __future__ import annotations

import json
from pathlib import Path

from arcface_build.errors import Missing
from arcface_build.repository import install


def assemble(model_dir: Path, repository: Path) -> dict[str, int]:
    """Install serving.onnx into arcface_onnx and source.onnx into arcface_reference.

    Returns:
        Model name → version number that now serves these weights.

    Raises:
        Missing: the folder holds no imported model.
    """
    path = model_dir / "manifest.json"
    if not path.is_file():
        raise Missing(f"no imported model in {model_dir}: expected manifest.json there. Next: arcface import SOURCE")
    manifest = json.loads(path.read_text())
    return {
        # The reference first: a version of arcface_onnx never stands there without what proves it.
        "arcface_reference": install(
            repository, "arcface_reference", {"source.onnx": model_dir / "source.onnx"}, manifest
        ),
        "arcface_onnx": install(repository, "arcface_onnx", {"model.onnx": model_dir / "serving.onnx"}, manifest),
    }
