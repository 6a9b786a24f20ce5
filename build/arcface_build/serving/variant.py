"""Before serving on a CPU: the fastest variant of the model that is served already, where one passed its gate here."""

from __future__ import annotations

import json
from pathlib import Path

from arcface_build.repository import served_manifest


def take_best_variant(repository: Path, models_dir: Path) -> str:
    """Install what `arcface_build.cpu_path.choose` chooses for the model in arcface_onnx; returns what and why.

    The model stays the same one: where models_dir has no import of this contract, nothing is touched.
    """
    from arcface_build.assemble import assemble
    from arcface_build.cpu_path import choose
    from arcface_clients.config import load_config

    served = served_manifest(repository) or {}
    model_dir = models_dir / served.get("name", "")
    path = model_dir / "manifest.json"
    if not path.is_file() or json.loads(path.read_text())["contract_id"] != served["contract_id"]:
        return f"{served.get('precision', 'fp32')} as installed: {model_dir} does not hold this model"
    choice = choose(model_dir)
    assemble(model_dir, repository, choice, load_config().versions_kept)
    return choice.reason
