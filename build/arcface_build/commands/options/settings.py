"""The configuration of a command, from --config or the usual places; read once, on first use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from arcface_clients.config.schema import EmbeddingConfig
    from arcface_clients.triton.address import Access

_FILE, _SETTINGS = "arcface_build.config_file", "arcface_build.settings"


def config_option() -> click.Option:
    """`--config FILE`, for any command."""

    def remember(context: click.Context, _: click.Parameter, value: Path | None) -> None:
        if value is not None:
            context.meta[_FILE] = value

    return click.Option(
        ["--config"],
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,  # it provides the defaults of other options
        expose_value=False,
        callback=remember,
        help="Configuration file.  [default: ARCFACE_CONFIG, else config/embedding.yaml if it exists]",
    )


def config_file() -> Path | None:
    """The file that --config names."""
    file: Path | None = click.get_current_context().meta.get(_FILE)
    return file


def settings() -> EmbeddingConfig:
    """The configuration.

    Raises:
        ConfigError: it cannot be read, or has invalid values.
    """
    from arcface_clients.config import sources

    meta = click.get_current_context().meta
    if _SETTINGS not in meta:
        meta[_SETTINGS] = sources.load_config(config_file())
    found: EmbeddingConfig = meta[_SETTINGS]
    return found


def access_to(url: str) -> Access:
    """Headers, TLS files and compression, if this is the configured server; nothing for any other."""
    return settings().triton.access_to(url)
