"""Notices and progress bars of commands, on stderr; --quiet turns them off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_QUIET = "arcface_build.terminal.quiet"


def quiet_option() -> click.Option:
    """The option `-q`, `--quiet` for any command; the functions below read it."""

    def remember(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value:  # `arcface -q serve` is `arcface serve -q`
            context.meta[_QUIET] = True

    return click.Option(
        ["-q", "--quiet"],
        is_flag=True,
        expose_value=False,
        callback=remember,
        help="No progress and no notices; errors and results stay.",
    )


def is_quiet() -> bool:
    """Whether the running command was called with --quiet."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_QUIET))


def notice(text: str) -> None:
    """Print a line for people, which scripts do not need."""
    if not is_quiet():
        click.echo(text, err=True)


def complaint(text: str) -> None:
    """Print a problem that does not stop the command; --quiet keeps it."""
    click.echo(text, err=True)


def item_bars() -> Progress:
    """Progress bars for a number of items: name, "3/10" and the time left; a context manager."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=_console(), disable=not _watched())


@contextmanager
def phase_bar() -> Iterator[Callable[[str, int, int], None]]:
    """One bar for work in phases; yields (phase, done, total); a total of 0 pulses."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console(), transient=True, disable=not _watched()) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda phase, done, total: bar.update(task, description=phase, completed=done, total=total or None)


@contextmanager
def byte_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """One bar for bytes transferred; yields (bytes moved since the last call)."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=_console(), disable=not _watched()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda moved: bar.advance(task, moved)


@contextmanager
def round_bar(total: int) -> Iterator[Callable[[str, int], None]]:
    """One bar for interleaved measurements; yields (variant, round); a round below 0 is warm-up."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=_console(), disable=not _watched()) as bar:
        task = bar.add_task("warming up", total=total)

        def advance(variant: str, round_: int) -> None:
            told = "warming up" if round_ < 0 else f"round {round_ + 1}: {variant}"
            bar.update(task, advance=1, description=told)

        yield advance


@contextmanager
def status_line(first: str = "") -> Iterator[Callable[[str], None]]:
    """One line that says what is going on; yields the function that changes it."""
    if not _watched():
        yield lambda text: None
        return
    with _console().status(first) as status:
        yield lambda text: status.update(text)


def _watched() -> bool:
    """Whether bars are visible: stderr is a terminal, and they are not turned off."""
    return not is_quiet() and _console().is_terminal


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)
