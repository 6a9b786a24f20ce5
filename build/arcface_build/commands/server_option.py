"""What commands that ask a server share: `--url`, by default the server that the configuration names."""

from __future__ import annotations

import click

_DEFAULT = "triton.url of the configuration, ARCFACE_TRITON__URL"


def configured_url() -> str:
    """`triton.url` of config/embedding.yaml or the environment, read when it is needed.

    Raises:
        ConfigError: the configuration cannot be read.
    """
    from arcface_clients.config import load_config

    return load_config().triton.url


url_option = click.option("--url", default=configured_url, show_default=_DEFAULT, help="Server to ask.")
urls_option = click.option(
    "--url",
    "urls",
    multiple=True,
    default=lambda: [configured_url()],
    show_default=_DEFAULT,
    help="Server to ask; several share the work of a .parquet.",
)
