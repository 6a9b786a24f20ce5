"""What commands that ask a server share: `--url`, by default the server that the configuration names, and its keys."""

from __future__ import annotations

from typing import Any

import click

_DEFAULT = "triton.url of the configuration, ARCFACE_TRITON__URL"


def configured_url() -> str:
    """`triton.url` of config/embedding.yaml or the environment, read when it is needed.

    Raises:
        ConfigError: the configuration cannot be read.
    """
    from arcface_clients.config.sources import load_config

    return load_config().triton.url


def access_to(url: str) -> dict[str, Any]:
    """Headers, TLS files and compression of the configured server, for `TritonEmbedder`; nothing for any other server.

    Raises:
        ConfigError: the configuration cannot be read.
    """
    from arcface_clients.config.sources import load_config

    triton = load_config().triton
    if url != triton.url:
        return {}  # a key is for the server that it was given for
    return {"headers": triton.headers, "tls": triton.tls, "compression": triton.compression}


url_option = click.option("--url", default=configured_url, show_default=_DEFAULT, help="Server to ask.")
urls_option = click.option(
    "--url",
    "urls",
    multiple=True,
    default=lambda: [configured_url()],
    show_default=_DEFAULT,
    help="Server to ask; several share the work of a .parquet.",
)
