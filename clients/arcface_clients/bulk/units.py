"""Folders, files, globs, .npz, .npy and Parquet in; units of work, each a small JSON object, out.

A unit says what to read, never holds it: {"kind": "files", "items": [[path, identity or null, reason or ""], …]},
{"kind": "array", "path": …, "start": …, "stop": …} or {"kind": "parquet", "path": …, "start": …, "stop": …}.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from arcface_clients.bulk.read import count_rows
from arcface_clients.errors import InvalidFaces
from arcface_clients.faces.images import ARRAY_SUFFIXES, IMAGE_SUFFIXES, files_below

PARQUET_SUFFIXES = (".parquet", ".pq")
Unit = dict[str, Any]


def iter_units(sources: Iterable[str | Path], rows: int) -> Iterator[Unit]:
    """Units of up to `rows` faces, in a fixed order; memory is bounded by the largest folder's names.

    An array or Parquet file whose header cannot be read becomes one item with the reason.
    """
    images: list[list[str | None]] = []
    for path, identity in _walk(sources):
        suffix = Path(path).suffix.lower()
        kind = "array" if suffix in ARRAY_SUFFIXES else "parquet" if suffix in PARQUET_SUFFIXES else "files"
        count, reason = 0, ""
        if kind != "files":
            try:
                count = count_rows(kind, path)
            except (InvalidFaces, OSError) as exc:
                reason = str(exc)
            for start in range(0, count, rows):
                yield {"kind": kind, "path": path, "start": start, "stop": min(start + rows, count)}
        if kind == "files" or reason:
            images.append([path, identity, reason])
        if len(images) == rows:
            yield {"kind": "files", "items": images}
            images = []
    if images:
        yield {"kind": "files", "items": images}


def unit_size(unit: Unit) -> int:
    """How many items a unit names."""
    return len(unit["items"]) if unit["kind"] == "files" else unit["stop"] - unit["start"]


def _walk(sources: Iterable[str | Path]) -> Iterator[tuple[str, str | None]]:
    """(path, identity) of every file; the identity is the folder's name where a source holds folders of people."""
    for source in map(str, sources):
        if Path(source).is_dir():
            for path in files_below(source, (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES, *PARQUET_SUFFIXES)):
                folder = Path(path).parent
                yield path, None if folder == Path(source) else folder.name
        elif glob.has_magic(source) and not Path(source).exists():
            named = glob.has_magic(str(Path(source).parent))
            # Path.glob takes no absolute patterns
            for path in sorted(glob.iglob(source, recursive=True)):  # noqa: PTH207
                if Path(path).is_file():
                    yield path, Path(path).parent.name if named else None
        else:
            yield source, None
