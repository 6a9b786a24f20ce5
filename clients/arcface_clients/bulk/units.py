"""Folders, files, globs and URLs of images, .npz, .npy, Parquet and .tar in; units of work, small JSON objects, out.

A unit says what to read, never holds it: {"kind": "files", "items": [[path, identity or null, reason or ""], …]},
{"kind": "array" or "parquet", "path": …, "start": …, "stop": …} or {"kind": "tar", "path": …, "offset": bytes,
"count": samples, or null for all}.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcface_clients.bulk.files import Files, is_url, plain, walk_url
from arcface_clients.bulk.read import count_rows
from arcface_clients.bulk.tars import TAR_SUFFIXES, WHOLE_BYTES, index_samples
from arcface_clients.errors import InvalidFaces
from arcface_clients.faces.images import ARRAY_SUFFIXES, IMAGE_SUFFIXES, files_below

PARQUET_SUFFIXES = (".parquet", ".pq")
CHUNK_UNITS = 64  # units that are kept in one file of the job's list: 131,072 paths, 10 MB in memory
Unit = dict[str, Any]
Entry = tuple[str, "str | None", "int | None"]  # path or URL, identity, bytes where the listing said so
Walk = Callable[[Sequence[str], Files], Iterator[Entry]]
_KIND = {
    **dict.fromkeys(ARRAY_SUFFIXES, "array"),
    **dict.fromkeys(PARQUET_SUFFIXES, "parquet"),
    **dict.fromkeys(TAR_SUFFIXES, "tar"),
}


@dataclass(frozen=True)
class Chunk:
    """Units that follow each other, and how far in the sources they reach."""

    units: list[Unit]
    entries: int  # files of the sources in this chunk and in those before it
    last: str  # the last of them


def iter_units(sources: Iterable[str | Path], rows: int, files: Files | None = None) -> Iterator[Unit]:
    """Units of up to `rows` faces, in a fixed order; memory is bounded by the largest folder's names.

    An array, Parquet or tar file whose header cannot be read becomes one item with the reason.
    """
    files = files or Files()
    for chunk in iter_chunks(walk([str(source) for source in sources], files), rows, files):
        yield from chunk.units


def iter_chunks(entries: Iterable[Entry], rows: int, files: Files, before: int = 0) -> Iterator[Chunk]:
    """The units of `entries`, in chunks that end with an entry; `before`: how many entries were passed already."""
    units: list[Unit] = []
    images: list[tuple[str, str | None, str]] = []
    count, path = before, ""
    for path, identity, size in entries:
        count += 1
        dot = path.rfind(".")
        kind = _KIND.get(path[dot:].lower(), "files") if dot >= 0 else "files"
        reason = ""
        if kind != "files":
            try:
                units.extend(_cut(kind, path, rows, size, files))
            except (InvalidFaces, OSError) as exc:
                reason = str(exc)
        if kind == "files" or reason:
            images.append((path, identity, reason))
            if len(images) == rows:
                units.append({"kind": "files", "items": images})
                images = []
        if len(units) >= CHUNK_UNITS:
            if images:
                units.append({"kind": "files", "items": images})
            yield Chunk(units, count, path)
            units, images = [], []
    if images:
        units.append({"kind": "files", "items": images})
    if units:
        yield Chunk(units, count, path)


def unit_size(unit: Unit) -> int:
    """How many items a unit names; 0 where nobody has counted them."""
    if unit["kind"] == "files":
        return len(unit["items"])
    return (unit["count"] or 0) if unit["kind"] == "tar" else unit["stop"] - unit["start"]


def unit_names(unit: Unit) -> list[str]:
    """What a unit consists of, in the words of its rows, without opening anything; of a tar the shard alone."""
    if unit["kind"] == "files":
        return [path for path, _, _ in unit["items"]]
    if unit["kind"] == "tar":
        return [unit["path"]]
    return [f"{unit['path']}[{row}]" for row in range(unit["start"], unit["stop"])]


def walk(sources: Sequence[str], files: Files) -> Iterator[Entry]:
    """(path, identity, bytes or None) of every file; the identity is the folder's name where a source holds folders.

    Raises:
        OSError, StoreUnreachable: a folder cannot be listed.
    """
    for source in map(plain, sources):
        if is_url(source):
            yield from _walk_url(source, files)
        elif Path(source).is_dir():
            for path in files_below(source, (*IMAGE_SUFFIXES, *_KIND)):
                folder = Path(path).parent
                yield path, None if folder == Path(source) else folder.name, None
        elif glob.has_magic(source) and not Path(source).exists():
            named = glob.has_magic(str(Path(source).parent))
            # Path.glob takes no absolute patterns
            for path in sorted(glob.iglob(source, recursive=True)):  # noqa: PTH207
                if Path(path).is_file():
                    yield path, Path(path).parent.name if named else None, None
        else:
            yield source, None, None


def _walk_url(source: str, files: Files) -> Iterator[Entry]:
    found = False
    top = source.rstrip("/")
    for url, size in walk_url(source, files.store):
        found = True
        folder = url.rpartition("/")[0]
        if url == source or url.lower().endswith((*IMAGE_SUFFIXES, *_KIND)):
            yield url, None if url == source or folder == top else folder.rpartition("/")[2], size
    if not found:
        yield source, None, None  # reading it says what is wrong


def _cut(kind: str, path: str, rows: int, size: int | None, files: Files) -> Iterator[Unit]:
    if kind == "tar":
        if is_url(path) and (size is None or size <= WHOLE_BYTES):
            yield {"kind": "tar", "path": path, "offset": 0, "count": None}
            return
        with files.open(path) as file:
            for offset, count in index_samples(file, rows):
                yield {"kind": "tar", "path": path, "offset": offset, "count": count}
        return
    total = count_rows(kind, path, files)
    for start in range(0, total, rows):
        yield {"kind": kind, "path": path, "start": start, "stop": min(start + rows, total)}
