"""`arcface plan`: the group; each of its commands is imported when it is called."""

from __future__ import annotations

from importlib import import_module

import click

COMMANDS = {  # name -> (module, attribute, one line for --help)
    "build": ("plan_build", "build", "Build a plan for this host's GPU, or get it from the cache or the store."),
    "list": ("plan_look", "list_", "List the plans of the cache and the store."),
    "show": ("plan_look", "show", "Show everything known about one plan."),
    "matrix": ("plan_look", "matrix", "SM × precision × TensorRT version: what there is and what is missing."),
    "push": ("plan_move", "push", "Publish plans from the cache or from files to the store."),
    "pull": ("plan_move", "pull", "Fetch plans from the store, verified, into the cache or a folder."),
    "verify": ("plan_move", "verify", "Read plans back whole and check them; exit 1 if one is refused."),
    "gc": ("plan_move", "gc", "Remove leftovers, and plans of TensorRT versions no longer used."),
}

EPILOG = """\b
Examples:
  arcface plan build r50 --precision fp16 --push
  arcface plan list --store s3://models/plans
  arcface plan pull --sm auto
  arcface plan verify
"""


class PlanCommands(click.Group):
    """The subcommands, imported one by one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order in which a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The subcommand of this name, or None."""
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        return getattr(import_module(f"arcface_build.commands.{module}"), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


@click.command(cls=PlanCommands, epilog=EPILOG)
def command() -> None:
    """TensorRT plans: build, prove, keep, find, move."""
