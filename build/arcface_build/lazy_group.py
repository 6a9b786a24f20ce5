"""A click group from a table: subcommands are imported when called, --help lists them without importing any."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click


class LazyGroup(click.Group):
    """A group that imports a subcommand's module only when that subcommand is asked for.

    Args:
        package: where the subcommands' modules are.
        table: name → (place, one line for --help); a place is a module under `package`, whose `command` is meant, or
            "module:attribute".
    """

    def __init__(self, *args: Any, package: str, table: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._package, self._table = package, table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order in which a user meets them."""
        return list(self._table)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The subcommand of this name, or None."""
        if name not in self._table:
            return None
        module, _, attribute = self._table[name][0].partition(":")
        return getattr(import_module(f"{self._package}.{module}"), attribute or "command")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self._table.items()])
