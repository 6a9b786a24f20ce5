"""A job: sources and an output in, the units still to do, and at the end a data set or one Parquet file, out.

    OUT/_metadata.json        what decides the rows: sources, contract id, unit size
    OUT/_units/NNNNNN.*       the units, as they are listed; what a chunk of them gave, once all are done
    OUT/part-NNNNNNNN.parquet unit N, done: final, and there whole or not at all
    OUT/_refused/NNNNNNNN.jsonl  what unit N could not read, each with its reason
    OUT/_SUCCESS              written last: rows, refusals, parts, contract id

A unit is done when its part is there; so a job that was killed at any moment is gone on with, and no face is lost or
there twice. For an output NAME.parquet, OUT is NAME.parquet.parts/, whose parts become that file at the end.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from arcface_clients.bulk.files import Files, is_url, plain
from arcface_clients.bulk.parts import (
    FORMAT,
    SUCCESS,
    VERSION,
    Part,
    is_part,
    look_at_part,
    merge_parts,
    part_name,
    schema,
)
from arcface_clients.bulk.spec import METADATA, JobSpec, begin, begun, check_still_begun
from arcface_clients.bulk.unit_list import ListedChunk, UnitList
from arcface_clients.bulk.units import Unit, Walk, walk
from arcface_clients.closing import Closing
from arcface_clients.errors import ConfigError, ContractMismatch, WrongUse

LOOKERS = 16  # footers of parts that are read at a time when a job is gone on with
_FORMER = ("job.json", "plan.json")  # of unfinished runs of an earlier version


@dataclass
class Counts:
    """What units gave.

    Attributes:
        rows: faces embedded.
        refused: entries that gave no row.
        set_aside: numbers of the units that were given up; what is in them counts as refused.
    """

    rows: int = 0
    refused: int = 0
    set_aside: list[int] = field(default_factory=list)

    def add(self, number: int, part: Part) -> None:
        """Count a unit."""
        self.rows += part.rows
        self.refused += part.refused
        if part.set_aside:
            self.set_aside.append(number)

    def add_all(self, other: Counts) -> None:
        """Count what others counted."""
        self.rows += other.rows
        self.refused += other.refused
        self.set_aside += other.set_aside


@dataclass
class _Open:
    """A chunk that is not done: what is left of it, and what the rest gave."""

    number: int
    left: set[int]
    counts: Counts = field(default_factory=Counts)


def is_data_set(output: str) -> bool:
    """Whether an output is a folder of final parts: a URL, or a path that ends in a slash.

    Raises:
        WrongUse: a URL that names one file.
    """
    if is_url(output) and output.lower().endswith((".parquet", ".npz")):
        raise WrongUse(f"{output} is one file, which is written on this host only. For a data set of parts: {output}/")
    return is_url(output) or output.endswith("/")


class Job(Closing):
    """The folder of a job.

    On this host one process at a time may hold it. In an object store nothing can be held, but a job of another spec is
    noticed, and ends.
    """

    def __init__(
        self,
        output: Path | str,
        spec: JobSpec,
        start_over: bool = False,
        files: Files | None = None,
        walk: Walk = walk,
    ) -> None:
        """Begin the job or go on with it; its units are listed from `pending` on.

        Args:
            output: NAME.parquet for one file, FOLDER/ or a URL for a data set.
            spec: what decides the rows.
            start_over: forget what was done.
            files: how URLs are opened.
            walk: gives the files of the sources.

        Raises:
            ConfigError: another process is at it, or it was begun with other sources or settings.
            ContractMismatch, DetectorMismatch: it was begun with another model, or another detector.
            StoreUnreachable: the object store does not answer.
        """
        self.spec, self.files = spec, replace(files or Files(), below=spec.below or "")
        text = plain(str(output))
        self.output: Path | None = None if is_data_set(text) else Path(text).absolute()
        whole = text if is_url(text) else str(Path(text).absolute())  # wherever a worker works
        self.folder = self.files.folder(whole if self.output is None else f"{whole}.parts")
        self.counts = Counts()
        self.before = 0  # entries that were done before this run
        self._open: dict[int, _Open] = {}  # by unit
        self._lock = None if is_url(self.folder.path) else self._locked()
        try:
            if start_over:
                self._empty()
            self._begin()
            self._present = {int(name[5:-8]) for name in self.folder.names() if is_part(name)}
            self._counted = {name for name in self.folder.names("_units") if name.endswith(".done.json")}
            self.list = UnitList(self.folder, spec.sources, spec.unit_rows, self.files, walk)
        except BaseException:
            if self._lock:
                self._lock.close()
            raise

    def _locked(self) -> IO[str]:
        folder = Path(self.folder.path)
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "_lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
        except OSError as exc:
            lock.close()
            raise ConfigError(
                f"another process is writing {self}: expected one at a time. Wait for it, or give another name."
            ) from exc
        return lock

    def _begin(self) -> None:
        if any(self.folder.has(name) for name in _FORMER):
            raise ConfigError(f"{self} was begun by an earlier version, whose parts are others. Start over: --force")
        if not begun(self.folder, self.spec, str(self)):
            if any(map(is_part, self.folder.names())):
                raise ConfigError(
                    f"{self.folder.path} holds parts and no {METADATA}: expected a folder that `arcface embed` made, "
                    "or a new one. Give another name, or start over: --force"
                )
            begin(self.folder, self.spec)
        elif self.folder.has(SUCCESS):
            raise ConfigError(f"{self} is finished: {SUCCESS} is in it. Give another name, or start over: --force")

    def _empty(self) -> None:
        """Remove what a job wrote, and nothing else; the marks of a begun and of a finished one first."""
        names = [SUCCESS, METADATA, *_FORMER, "units.jsonl", *filter(is_part, self.folder.names())]
        for below in ("_units", "_refused"):
            names += [f"{below}/{name}" for name in self.folder.names(below)]
        with ThreadPoolExecutor(LOOKERS) as pool:
            list(pool.map(self.folder.delete, names))

    @property
    def units(self) -> int:
        """Units listed so far; all, once `is_listed`."""
        return self.list.units

    @property
    def items(self) -> int:
        """Entries listed so far; all, once `is_listed`. Those of tar objects are not known before they are read."""
        return self.list.items

    @property
    def is_listed(self) -> bool:
        """Whether all units are listed."""
        return self.list.complete

    def pending(self) -> Iterator[tuple[int, Unit]]:
        """Number and unit of what is not done yet, in order; what is done is counted on the way.

        Raises:
            ContractMismatch, DetectorMismatch, ConfigError: a part or the folder is of another job.
            ArcFaceError, OSError: the sources cannot be listed.
        """
        for chunk in self.list.chunks():
            if is_url(self.folder.path):
                check_still_begun(self.folder, self.spec, str(self))
            done_name = _done_name(chunk.number)
            if done_name.rpartition("/")[2] in self._counted:
                counted = Counts(**json.loads(self.folder.read(done_name) or b"{}"))
                self.counts.add_all(counted)
                self.before += counted.rows + counted.refused
                continue
            opened = self._look(chunk)
            self.before += opened.counts.rows + opened.counts.refused
            for number in sorted(opened.left):
                self._open[number] = opened
            if not opened.left:
                self._close_chunk(opened)
            for number in sorted(opened.left):
                yield number, chunk.units[number - chunk.first]

    def _look(self, chunk: ListedChunk) -> _Open:
        """Which parts of a chunk are there, whole and ours."""
        numbers = range(chunk.first, chunk.first + len(chunk.units))
        present = [number for number in numbers if number in self._present]
        opened = _Open(chunk.number, set(numbers))
        if not present:
            return opened
        with ThreadPoolExecutor(LOOKERS) as pool:
            for number, part in zip(present, pool.map(self.part, present), strict=True):
                if part is not None:
                    opened.left.discard(number)
                    opened.counts.add(number, part)
        return opened

    def part(self, number: int) -> Part | None:
        """What the part of a unit says of itself; None if there is none, or a torn one.

        Raises:
            ContractMismatch, DetectorMismatch: it is of another contract, or another detector found its faces.
        """
        with suppress(FileNotFoundError), self.files.open(self.folder.of(part_name(number))) as source:
            part = look_at_part(source)
            if part is not None and part.contract_id != self.spec.contract_id:
                raise ContractMismatch(
                    f"{self.folder.of(part_name(number))} is of contract {part.contract_id}: expected "
                    f"{self.spec.contract_id}, as all parts of this job. Start over: --force"
                )
            if part is not None and part.detector_id is not None:  # earlier versions did not say
                self.spec.check_detector(part.detector_id, f"that of {self.folder.of(part_name(number))}")
            return part
        return None

    def note(self, number: int, part: Part) -> bool:
        """Count a unit whose part was written; False if it was counted before, as a copy that came second is."""
        opened = self._open.pop(number, None)
        if opened is None:
            return False
        opened.left.discard(number)
        opened.counts.add(number, part)
        if not opened.left:
            self._close_chunk(opened)
        return True

    def _close_chunk(self, opened: _Open) -> None:
        self.folder.write(_done_name(opened.number), json.dumps(asdict(opened.counts)).encode())
        self.counts.add_all(opened.counts)

    def finish(self) -> Counts:
        """Mark the data set as finished, or merge the parts into the one file and remove the folder.

        Raises:
            ConfigError: not every unit is done.
        """
        if self._open or not self.is_listed:
            raise ConfigError(f"{self} is not done: {len(self._open)} units are missing. Run the same command again")
        if self.output is None:
            found: dict[str, Any] = {"rows": self.counts.rows, "refused": self.counts.refused, "parts": self.units}
            found |= {"set_aside": sorted(self.counts.set_aside), "contract_id": self.spec.contract_id}
            found |= {"detector_id": self.spec.detector_id} if self.spec.detector else {}
            self.folder.write(SUCCESS, json.dumps({**found, "format": FORMAT, "version": VERSION}, indent=2).encode())
        else:
            spec = self.spec
            columns = schema(spec.dim, spec.contract_id, bool(spec.detector), spec.detector_id)
            merge_parts(self.folder, self.units, self.output, columns)
            self.discard()
        return self.counts

    def discard(self) -> None:
        """Remove what was done, and the folder where nothing else is in it."""
        self._empty()
        if not is_url(self.folder.path):
            folder = Path(self.folder.path)
            if self.output is not None:
                shutil.rmtree(folder)
                return
            (folder / "_lock").unlink(missing_ok=True)
            for each in (folder / "_units", folder / "_refused", folder):
                with suppress(OSError):
                    each.rmdir()

    def close(self) -> None:
        """Let another process have the job."""
        self.list.close()
        if self._lock:
            self._lock.close()

    def __str__(self) -> str:
        """Where it writes."""
        return str(self.output or self.folder.path)


def _done_name(chunk: int) -> str:
    return f"_units/{chunk:06d}.done.json"
