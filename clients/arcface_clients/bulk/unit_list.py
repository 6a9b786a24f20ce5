"""The list of a job's units, written ahead of the work by a thread, in files of the job's folder.

`_units/000000.jsonl.gz` … hold the units, 64 or a few more each, with a head that says how far they reach;
`_units/end.json` says that there are no more. What is listed stays: a run that was killed goes on with the same units
under the same numbers, and lists on from there. Memory does not grow with the number of faces.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from arcface_clients.bulk.files import Files
from arcface_clients.bulk.folders import Folder
from arcface_clients.bulk.units import Chunk, Unit, Walk, iter_chunks, unit_size
from arcface_clients.closing import Closing
from arcface_clients.errors import ConfigError

_FOLDER, _END = "_units", "_units/end.json"


@dataclass(frozen=True)
class Reach:
    """What is listed up to the end of a chunk."""

    units: int = 0
    items: int = 0
    entries: int = 0  # files of the sources
    last: str = ""  # the last of them


@dataclass(frozen=True)
class ListedChunk:
    """A chunk as it was listed: its number, the number of its first unit, its units."""

    number: int
    first: int
    units: list[Unit]


class UnitList(Closing):
    """Lists units ahead of whoever takes them; one that was begun before is gone on with."""

    def __init__(self, folder: Folder, sources: Sequence[str], rows: int, files: Files, walk: Walk) -> None:
        """Look what is listed already.

        Raises:
            ConfigError: the list is damaged.
        """
        self._folder, self._sources, self._rows, self._files, self._walk = folder, sources, rows, files, walk
        self._change = threading.Condition()
        self._stop = False
        self._failed: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._chunks = sum(name.endswith(".jsonl.gz") for name in folder.names(_FOLDER))
        self._reach = Reach(**self._read(self._chunks - 1)[0]) if self._chunks else Reach()
        self.complete = folder.has(_END)

    @property
    def units(self) -> int:
        """Units listed so far."""
        return self._reach.units

    @property
    def items(self) -> int:
        """Items listed so far."""
        return self._reach.items

    def start(self) -> None:
        """Begin to list on, if that is not done."""
        if not self.complete and self._thread is None:
            self._thread = threading.Thread(target=self._list, name="arcface-units", daemon=True)
            self._thread.start()

    def chunks(self) -> Iterator[ListedChunk]:
        """Every chunk in order, waiting for those that are not listed yet.

        Raises:
            ArcFaceError, OSError: what listing the sources raised.
        """
        self.start()
        number = first = 0
        while True:
            with self._change:
                self._change.wait_for(lambda: self._chunks > number or self.complete or self._failed)  # noqa: B023
                if self._chunks <= number:
                    if self._failed is not None:
                        raise self._failed
                    return
            _, units = self._read(number)
            yield ListedChunk(number, first, units)
            number, first = number + 1, first + len(units)

    def close(self) -> None:
        """Stop listing."""
        self._stop = True
        if self._thread is not None:
            self._thread.join()

    def _list(self) -> None:
        try:
            entries = self._walk(self._sources, self._files)
            reach = self._reach
            last, passed = "", 0
            for passed, (last, _, _) in enumerate(islice(entries, reach.entries), start=1):  # noqa: B007
                if self._stop:
                    return
            if (passed, last) != (reach.entries, reach.last):
                raise ConfigError(
                    f"the sources changed since this job was begun: expected {reach.last} as file {reach.entries} of "
                    f"them, got {last or 'none'} as file {passed}. Start over: --force"
                )
            for chunk in iter_chunks(entries, self._rows, self._files, reach.entries):
                if self._stop:
                    return
                self._write(chunk)
            self._folder.write(_END, json.dumps(asdict(self._reach)).encode())
            with self._change:
                self.complete = True
                self._change.notify_all()
        except BaseException as exc:  # handed to whoever takes the chunks
            with self._change:
                self._failed = exc
                self._change.notify_all()

    def _write(self, chunk: Chunk) -> None:
        before = self._reach
        items = before.items + sum(map(unit_size, chunk.units))
        reach = Reach(before.units + len(chunk.units), items, chunk.entries, chunk.last)
        lines = [json.dumps(asdict(reach)), *map(json.dumps, chunk.units)]
        self._folder.write(_name(self._chunks), gzip.compress("\n".join(lines).encode(), 1))
        with self._change:
            self._reach, self._chunks = reach, self._chunks + 1
            self._change.notify_all()

    def _read(self, number: int) -> tuple[dict[str, Any], list[Unit]]:
        name = _name(number)
        try:
            head, *lines = gzip.decompress(self._folder.read(name) or b"").decode().split("\n")
            return json.loads(head), [json.loads(line) for line in lines]
        except (ValueError, OSError, EOFError) as exc:
            raise ConfigError(
                f"{self._folder.of(name)} is damaged ({exc}): expected what an unfinished run left. Start over: --force"
            ) from exc


def _name(chunk: int) -> str:
    return f"{_FOLDER}/{chunk:06d}.jsonl.gz"
