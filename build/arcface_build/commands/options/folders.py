"""`--models-dir` and `--model-repository`: where imported models and served models are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from arcface_build.commands.options.settings import settings

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


def repository_at(given: Path | None) -> Path:
    """The model repository from --model-repository, else the configured one, here or in a parent folder.

    Raises:
        Missing: there is none.
    """
    from arcface_build.repository.versions import find_repository

    return find_repository(given, settings().local.model_repository)


def with_local(models_dir: Path, model: str | None) -> EmbeddingConfig:
    """The configuration for in-process engines; a model other than the configured one implies other files."""
    config = settings()
    local = config.local
    if (models_dir, model) == (local.models_dir, local.model):
        return config
    other = {"models_dir": models_dir, "model": model, "serving_onnx": None, "plan": None}
    return config.model_copy(update={"local": local.model_copy(update=other)})
