"""Notices and progress of commands, on stderr: bars on a terminal, elsewhere a line now and then; none with --quiet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from rich.console import Console

FIRST_S, EVERY_S = 3.0, 10.0  # without a terminal: when the first line is due, and the next ones
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


def visible(text: str, kept: str = "") -> str:
    """Text from outside, such as a file's name, without what would steer the terminal or begin a line of its own."""
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


class Items(Protocol):
    """Work on a number of items, shown in one or several bars."""

    def add_task(self, description: str, *, total: float | None = None, completed: int = 0) -> Any:
        """Begin; returns what the calls below name it by."""

    def update(self, task_id: Any, *, completed: float, total: float | None = None) -> None:
        """So many are done, of so many."""

    def advance(self, task_id: Any, advance: float = 1) -> None:
        """So many more are done."""


@contextmanager
def item_bars() -> Iterator[Items]:
    """Progress bars for a number of items: name, "3/10" and the time left."""
    if not _watched():
        with _lines() as say:
            yield _ItemLines(say)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console()) as bars:
        yield bars


@contextmanager
def phase_bar() -> Iterator[Callable[[str, int, int], None]]:
    """One bar for work in phases; yields (phase, done, total); a total of 0 pulses."""
    if not _watched():
        with _lines() as say:
            yield lambda phase, done, total: say(f"{phase} {done}/{total}" if total else phase)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console(), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda phase, done, total: bar.update(task, description=phase, completed=done, total=total or None)


@contextmanager
def byte_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """One bar for bytes transferred; yields (bytes moved since the last call)."""
    if not _watched():
        moved_bytes = 0
        with _lines() as say:

            def move(moved: int) -> None:
                nonlocal moved_bytes
                moved_bytes += moved
                say(f"{what}: {moved_bytes / 1e6:.1f} of {total / 1e6:.1f} MB")

            yield move
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=_console()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda moved: bar.advance(task, moved)


@contextmanager
def round_bar(total: int) -> Iterator[Callable[[str, int], None]]:
    """One bar for interleaved measurements; yields (variant, round); a round below 0 is warm-up."""

    def told(variant: str, round_: int) -> str:
        return "warming up" if round_ < 0 else f"round {round_ + 1}: {variant}"

    if not _watched():
        with _lines() as say:
            yield lambda variant, round_: say(told(variant, round_))
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=_console()) as bar:
        task = bar.add_task("warming up", total=total)
        yield lambda variant, round_: bar.update(task, advance=1, description=told(variant, round_))


@contextmanager
def status_line(first: str = "") -> Iterator[Callable[[str], None]]:
    """One line that says what is going on; yields the function that changes it."""
    if not _watched():
        with _lines() as say:
            say(first)
            yield say
        return
    with _console().status(first) as status:
        yield lambda text: status.update(text)


@contextmanager
def _lines() -> Iterator[Callable[[str], None]]:
    """Without a terminal: what is going on, as a line after FIRST_S and then every EVERY_S; nothing with --quiet."""
    if is_quiet():
        yield lambda text: None
        return
    latest, done = [""], threading.Event()

    def tell() -> None:
        told, pause_s = "", FIRST_S
        while not done.wait(pause_s):
            pause_s = EVERY_S
            if latest[0] != told:
                told = latest[0]
                click.echo(told, err=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield lambda text: latest.__setitem__(0, text)
    finally:
        done.set()
        teller.join()


class _ItemLines:
    """Items as lines: the task that moved last."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._tasks: list[tuple[str, float, float | None]] = []  # description, completed, total

    def add_task(self, description: str, *, total: float | None = None, completed: int = 0) -> int:
        self._tasks.append((description, completed, total))
        return len(self._tasks) - 1

    def update(self, task_id: int, *, completed: float, total: float | None = None) -> None:
        description, _, before = self._tasks[task_id]
        total = before if total is None else total
        self._tasks[task_id] = (description, completed, total)
        self._say(f"{description} {completed:g}" + (f"/{total:g}" if total else ""))

    def advance(self, task_id: int, advance: float = 1) -> None:
        self.update(task_id, completed=self._tasks[task_id][1] + advance)


def _watched() -> bool:
    """Whether bars are visible: stderr is a terminal, and they are not turned off."""
    return not is_quiet() and _console().is_terminal


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)
