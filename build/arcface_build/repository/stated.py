"""States the outputs of a leaf model in its overlay, so that Triton need not complete the configuration.

Triton's python backend completes a configuration in a process of its own, and waits a fixed second until that has
ended: with our python-based backends this is more than half of a server's start.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arcface_clients.contract import CONTRACT_OUTPUT, EMBEDDING_OUTPUT, NORM_OUTPUT
from arcface_clients.engines.onnx_contract import contract_in

NO_COMPLETION = "--disable-auto-complete-config"


def outputs_pbtxt(version: Path, manifest: Mapping[str, Any]) -> str:
    """The outputs of these weights for config.pbtxt; empty where only the file itself can tell them.

    That is so for plans, and for imports and a reference's code from before every answer named its contract.
    """
    if not _names_its_contract(version) or "dim" not in manifest:
        return ""
    outputs = ((EMBEDDING_OUTPUT, "FP32", manifest["dim"]), (NORM_OUTPUT, "FP32", 1), (CONTRACT_OUTPUT, "INT32", 4))
    entries = ", ".join(f'{{ name: "{name}" data_type: TYPE_{dtype} dims: [ {d} ] }}' for name, dtype, d in outputs)
    return f"output [ {entries} ]\n"


def _names_its_contract(version: Path) -> bool:
    code = version / "model.py"  # a repository that is not ours to bring to this version may hold that of another
    return f'"{CONTRACT_OUTPUT}"' in code.read_text() if code.is_file() else bool(contract_in(version / "model.onnx"))


def completion_options(repository: Path | str, config_name: str) -> list[str]:
    """The option that spares Triton the completion, if every model that could be loaded states its inputs and outputs.

    Args:
        repository: the model repository; one on S3 is not read.
        config_name: Triton's --model-config-name.
    """
    models = [path.parent for path in Path(repository).glob("*/config.pbtxt")]  # none in s3://…
    whole = [_is_whole(model, config_name) for model in models if _has_a_version(model)]
    return [NO_COMPLETION] if whole and all(whole) else []


def states(config: str, field: str) -> bool:
    """Whether a config.pbtxt has this field at its top level."""
    return re.search(rf"^{field}\s*[\[{{]", config, re.MULTILINE) is not None


def _is_whole(model: Path, config_name: str) -> bool:
    overlay = model / "configs" / f"{config_name}.pbtxt"
    text = (overlay if config_name and overlay.is_file() else model / "config.pbtxt").read_text()
    return states(text, "input") and states(text, "output")


def _has_a_version(model: Path) -> bool:
    return any(file for folder in model.glob("[0-9]*") for file in folder.glob("*") if file.name != ".gitkeep")
