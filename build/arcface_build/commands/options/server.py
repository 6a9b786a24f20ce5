"""`--url`: the server to ask, by default the one that the configuration names."""

from __future__ import annotations

import click

from arcface_build.commands.options.numbers import POSITIVE
from arcface_build.commands.options.settings import settings

_DEFAULT = "triton.url of the configuration, ARCFACE_TRITON__URL"

url_option = click.option("--url", default=lambda: settings().triton.url, show_default=_DEFAULT, help="Server to ask.")
urls_option = click.option(
    "--url",
    "urls",
    multiple=True,
    default=lambda: [settings().triton.url],
    show_default=_DEFAULT,
    help="Server to ask; several share the work of a .parquet.",
)
served_model_option = click.option(
    "--model", default=lambda: settings().triton.model, show_default="triton.model", help="Served model."
)
timeout_option = click.option(
    "--timeout-s",
    type=POSITIVE,
    default=lambda: settings().triton.timeout_s,
    show_default="triton.timeout_s",
    help="Longest wait for one request.",
)
