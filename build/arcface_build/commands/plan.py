"""The group `arcface plan`; each of its commands is imported only when called."""

from __future__ import annotations

import click

from arcface_build.commands.options.settings import config_option
from arcface_build.lazy_group import LazyGroup
from arcface_build.terminal import quiet_option

COMMANDS = {  # name -> (place, one line for --help)
    "build": ("plan_build:build", "Build a plan for this host's GPU, or get it from the cache or the store."),
    "list": ("plan_look:list_", "List the plans of the cache and the store."),
    "show": ("plan_look:show", "Show everything known about one plan."),
    "fit": ("plan_fit:fit", "Say how many instances of a plan fit on a card, and with which largest batch."),
    "matrix": ("plan_look:matrix", "SM × precision × TensorRT version: which plans exist and which are missing."),
    "push": ("plan_move:push", "Publish plans from the cache or from files to the store."),
    "pull": ("plan_move:pull", "Fetch plans from the store, verified, into the cache or a folder."),
    "verify": ("plan_move:verify", "Read whole plans back and check them; exit 1 if one is refused."),
    "gc": ("plan_move:gc", "Remove leftovers, and plans of unused TensorRT versions."),
}

EPILOG = """\b
Examples:
  arcface plan build r50 --precision fp16 --push
  arcface plan list --store s3://models/plans
  arcface plan pull --sm auto
  arcface plan verify
"""


@click.group(
    cls=LazyGroup,
    package="arcface_build.commands",
    table=COMMANDS,
    common=(config_option, quiet_option),
    needs={"build": ("onnx", "onnxruntime", "polygraphy", "filelock"), "pull": ("filelock",)},
    gone={"info": "use arcface plan show.", "upload": "use arcface plan push."},
    epilog=EPILOG,
)
def command() -> None:
    """Build, verify, store, find and move TensorRT plans."""
