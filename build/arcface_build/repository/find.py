"""Finds the model repository that a command works on: the one that was named, or the nearest above this folder."""

from __future__ import annotations

from pathlib import Path

from arcface_clients.errors import Missing
from arcface_clients.planted import refuse_planted


def find_repository(given: Path | None = None, configured: Path = Path("model_repository")) -> Path:
    """The model repository: the given folder, else the configured one; a relative path is also searched upwards.

    Raises:
        Missing: there is none.
        WrongUse: the nearest was put there by another user: a repository holds code.
    """
    if given is not None:
        if not (given / "arcface" / "config.pbtxt").is_file():
            raise Missing(f"{given} is not our model repository: expected arcface/config.pbtxt in it.")
        return given.resolve()
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / configured / "arcface" / "config.pbtxt").is_file():
            if not configured.is_absolute():
                refuse_planted(folder / configured, folder, f"--model-repository {folder / configured}")
            return folder / configured
    where = (
        f"model repository at {configured}"
        if configured.is_absolute()
        else f"{configured}/ in {Path.cwd()} or above it"
    )
    raise Missing(
        f"no {where}. Make one here: arcface serve, or arcface import SOURCE; or name it: --model-repository FOLDER, "
        "or local.model_repository in config/embedding.yaml"
    )
