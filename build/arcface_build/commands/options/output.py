"""Output options: JSON on stdout with --json, files with --report and others, else text."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


class NewFile(click.Path):
    """A file that will be written at the end; whether that is possible is checked before the work starts."""

    name = "file"

    def __init__(self) -> None:
        """A path that is not a folder."""
        super().__init__(path_type=Path, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path.

        Raises:
            BadParameter: it is a folder, or nothing can be written there.
        """
        path = Path(str(super().convert(value, param, ctx)))
        folder = path.absolute().parent
        while not folder.exists():  # missing folders are created together with the file
            folder = folder.parent
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as exc:
            self.fail(f"{path} cannot be written: {folder}: {exc.strerror}.", param, ctx)
        return path


class NewOutput(NewFile):
    """A file as `NewFile`, or a data set: a folder that ends in a slash, or a URL; as text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text, as it was given.

        Raises:
            BadParameter: nothing can be written there.
        """
        text = str(value)
        if not text.endswith("/") and "://" not in text:
            super().convert(value, param, ctx)
        return text


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
report_option = click.option("--report", type=NewFile(), help="Also write the result to this file, as JSON.")
html_option = click.option("--html", type=NewFile(), help="Also write the result as one page with plots.")


def hand_over(
    result: Any,
    text: Callable[[], str],
    as_json: bool,
    report: Path | None = None,
    files: dict[Path | None, Callable[[], str]] | None = None,
) -> None:
    """Write the requested files atomically, then print the result.

    Args:
        result: a value that JSON can represent.
        text: the result as text for people.
        as_json: print JSON instead of text.
        report: where to write JSON.
        files: other files, each with a function that makes its content; None as a file: not requested.
    """
    from arcface_clients.atomic import new_file, write_json

    if report is not None:
        write_json(report, result)
    for path, content in (files or {}).items():
        if path is not None:
            with new_file(path) as temporary:
                temporary.write_text(content())
    click.echo(json.dumps(result, indent=2) if as_json else text())
