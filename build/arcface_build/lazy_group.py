"""A click group from a table: a subcommand is imported only when called, and --help lists all without importing any."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import click

from arcface_clients.extras import require


class LazyGroup(click.Group):
    """A group that imports a subcommand's module only when that subcommand is called.

    Args:
        package: where the subcommands' modules are.
        table: name → (place, one line for --help); a place is a module under `package` with a `command`, or
            "module:attribute".
        common: factories of options that each subcommand gets.
        needs: name → modules that the subcommand cannot work without.
        gone: names of former subcommands → a sentence on what replaced them.
    """

    def __init__(
        self,
        *args: Any,
        package: str,
        table: Mapping[str, tuple[str, str]],
        common: Sequence[Callable[[], click.Option]] = (),
        needs: Mapping[str, tuple[str, ...]] | None = None,
        gone: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._package, self._table, self._common = package, table, common
        self._needs, self._gone = needs or {}, gone or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of a typical workflow."""
        return list(self._table)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The subcommand of this name with the common options, or None."""
        if name not in self._table:
            return None
        module, _, attribute = self._table[name][0].partition(":")
        command: click.Command = getattr(import_module(f"{self._package}.{module}"), attribute or "command")
        have = {option for parameter in command.params for option in parameter.opts}
        for option in (make() for make in self._common) if not isinstance(command, click.Group) else ():
            if not have.intersection(option.opts):
                command.params.append(option)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The subcommand and its arguments.

        Raises:
            UsageError: there is no such subcommand; suggests the closest one.
            DependencyMissing: a package that it needs is not installed.
        """
        name = args[0]
        if name in self._table or name.startswith("-") or ctx.resilient_parsing:  # the last: shell completion
            resolved = super().resolve_command(ctx, args)
            if resolved[1] is not None:
                _refuse_a_file_for_json(ctx, resolved[1], resolved[2])
                if not {"-h", "--help"}.intersection(args) and not ctx.resilient_parsing:
                    require(*self._needs.get(name, ()), purpose=f"arcface {name}")
            return resolved
        if name in self._gone:
            ctx.fail(f"no such command {name!r}: {self._gone[name]}")
        close = difflib.get_close_matches(name, self._table, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(self._table)}."
        ctx.fail(f"no such command {name!r}: {hint}")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self._table.items()])


def _refuse_a_file_for_json(ctx: click.Context, command: click.Command, args: Sequence[str]) -> None:
    """Reject `--json FILE`, the old name of --report: the command would read FILE as one of its arguments.

    Raises:
        UsageError: it was given.
    """
    if not any("--report" in parameter.opts for parameter in command.params):
        return
    for word, following in zip(args, [*args[1:], ""], strict=False):
        if word.startswith("--json=") or (word == "--json" and (following == "-" or following.endswith(".json"))):
            file = word.partition("=")[2] or following
            wanted = "leave out the -" if file == "-" else f"write the file with --report {file}"
            ctx.fail(f"--json takes no file: it prints the result. Next: {wanted}")
