"""Before serving on a CPU: the fastest variant of the model that is served already, where one passed its gate here."""

from __future__ import annotations

import json
import os
from pathlib import Path

from arcface_build.repository.versions import served_manifest


def take_best_variant(repository: Path, models_dir: Path) -> str:
    """Install what `arcface_build.variants.choose.choose` chooses for the model in arcface_onnx; returns what and why.

    The model stays the same one: where models_dir has no import of this contract, nothing is touched.
    """
    from arcface_build.repository.assemble import assemble
    from arcface_build.variants.choose import choose
    from arcface_clients.config.sources import load_config

    served = served_manifest(repository) or {}
    model_dir = models_dir / served.get("name", "")
    installed = f"{served.get('precision', 'fp32')} as installed"
    if served.get("held"):
        return f"{installed}: arcface rollback went back to it (another one: arcface assemble {served['name']})"
    try:
        here = json.loads((model_dir / "manifest.json").read_text())["contract_id"]
    except (OSError, ValueError, LookupError, TypeError):  # none, or none that can be read
        here = None
    if here is None or here != served["contract_id"]:
        return f"{installed}: {model_dir} does not hold this model"
    if not os.access(repository, os.W_OK):
        return f"{installed}: {repository} may not be written"
    settings = load_config()
    limits = settings.comparison.max_drift.model_dump()
    choice = choose(model_dir, limits)
    assemble(model_dir, repository, choice, settings.versions_kept, limits)
    return choice.reason
