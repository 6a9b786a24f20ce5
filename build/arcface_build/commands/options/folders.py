"""`--models-dir` and `--model-repository`: where imported models and served models are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arcface_build import terminal
from arcface_build.commands.options.settings import settings
from arcface_build.shipped import shipped
from arcface_clients.errors import Missing

if TYPE_CHECKING:
    from arcface_clients.config.schema import EmbeddingConfig

models_dir_option = click.option(
    "--models-dir",
    type=click.Path(path_type=Path),
    default=lambda: settings().local.models_dir,
    show_default="local.models_dir",
    help="Imported models.",
)
local_model_option = click.option(
    "--model",
    default=lambda: settings().local.model,
    show_default="local.model, else the only one",
    help="Name of an imported model.",
)
model_repository_option = click.option(
    "--model-repository",
    type=click.Path(path_type=Path),
    help="Folder that Triton serves.  [default: local.model_repository, here or above]",
)


def repository_at(given: Path | None, *, make: bool = False) -> Path:
    """The model repository from --model-repository, else the configured one, here or in a parent folder.

    One that we made follows the installed version. With `make` one is laid out where there is none: in the configured
    folder, or in an empty one that was given.

    Raises:
        Missing: there is none, and none was asked for.
    """
    from arcface_build.repository.find import find_repository
    from arcface_build.repository.hand_written import follow, lay_out

    configured = settings().local.model_repository
    try:
        repository = find_repository(given, configured)
    except Missing:
        here = (given or configured).absolute()
        wanted = given is None or (given.is_dir() and not any(given.iterdir()))
        if not (make and wanted and os.access(here if here.exists() else here.parent, os.W_OK)):
            raise
        repository = lay_out(here)
        terminal.notice(f"made {repository}: the model repository, without weights yet")
    followed = follow(repository)
    if followed.updated:
        terminal.notice(f"{repository}: brought to this version: {', '.join(followed.updated)}")
    for name in followed.edited:
        terminal.complaint(
            f"kept {repository / name}, which somebody edited; this version's is {shipped('model_repository') / name}"
        )
    return repository


def with_local(models_dir: Path, model: str | None) -> EmbeddingConfig:
    """The configuration for in-process engines; a model other than the configured one implies other files."""
    config = settings()
    local = config.local
    if (models_dir, model) == (local.models_dir, local.model):
        return config
    other = {"models_dir": models_dir, "model": model, "serving_onnx": None, "plan": None}
    return config.model_copy(update={"local": local.model_copy(update=other)})
