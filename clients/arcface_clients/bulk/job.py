"""Sources and an output name in; the units that are still to do, and at the end one Parquet file, out.

Beside OUTPUT.parquet lies OUTPUT.parquet.parts/ while the job is under way: units.jsonl (what to do), job.json (with
what), part-N.parquet (unit N, done). A part has its name only when it is whole and synced, so a run that was killed
at any moment is gone on with: no unit is missing, none is there twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.atomic import new_file
from arcface_clients.bulk.parts import is_whole, merge_parts, part_path, schema, write_part
from arcface_clients.bulk.read import Item, read_unit
from arcface_clients.bulk.units import Unit, iter_units, unit_size
from arcface_clients.errors import ConfigError, ContractMismatch
from arcface_clients.faces.images import Found

if TYPE_CHECKING:
    from arcface_clients.engines.protocol import EmbeddingEngine
    from arcface_clients.faces.detect import FaceDetector

UNIT_ROWS = 2048  # what a kill may cost: four minutes of a network that gives 8 faces/s
BATCH = 256


@dataclass(frozen=True)
class JobSpec:
    """What decides the rows of a job; a job that was begun with another spec is not gone on with."""

    sources: tuple[str, ...]
    contract_id: str | None
    dim: int
    unit_rows: int = UNIT_ROWS
    detector: str | None = None  # the detector's file; None: the sources are crops
    min_score: float = 0.7

    def open_detector(self) -> FaceDetector | None:
        """The detector that the spec names."""
        if self.detector is None:
            return None
        from arcface_clients.faces.detect import FaceDetector

        return FaceDetector(self.detector, min_score=self.min_score)


class Job:
    """The folder of a job; one process at a time may hold it."""

    def __init__(self, output: Path | str, spec: JobSpec, start_over: bool = False) -> None:
        """Begin the job or go on with it.

        Raises:
            ConfigError: another process is at it, or it was begun with other sources or settings.
            ContractMismatch: it was begun with another model.
        """
        self.output = Path(output).absolute()
        self.folder = self.output.with_name(f"{self.output.name}.parts")
        self.spec = spec
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
        except OSError as exc:
            self._lock.close()
            raise ConfigError(
                f"another process is writing {self.output}: expected one at a time. Wait for it, or give another name."
            ) from exc
        try:
            self._sweep()
            if start_over:
                self._empty()
            self._begin()
        except BaseException:
            self._lock.close()
            raise

    def _begin(self) -> None:
        file, former = self.folder / "job.json", self.folder / "plan.json"  # its former name
        file = former if former.exists() and not file.exists() else file
        mine = json.loads(json.dumps(asdict(self.spec)))
        if file.exists():
            try:
                begun = json.loads(file.read_text())
                self.units, self.items = begun["units"], begun["items"]
                theirs = begun["plan" if file == former else "spec"]
                of_contract = theirs["contract_id"]
            except (ValueError, KeyError, TypeError) as exc:
                raise ConfigError(
                    f"{file} is damaged ({exc}): expected what an unfinished run left. Start over: --force"
                ) from exc
            if of_contract != mine["contract_id"]:
                raise ContractMismatch(
                    f"{self.output} was begun with contract {of_contract}, the model that is served "
                    f"now has {mine['contract_id']}: expected one model for all rows. Start over: --force"
                )
            different = [key for key in mine if theirs.get(key) != mine[key]]
            if different:
                raise ConfigError(
                    f"{self.output} was begun with other {', '.join(different)}: expected "
                    f"{[theirs.get(key) for key in different]}, got {[mine[key] for key in different]}. "
                    "Give the same, or start over: --force"
                )
            return
        self._empty()
        self.units = self.items = 0
        with new_file(self.folder / "units.jsonl") as temporary, temporary.open("w") as lines:
            for unit in iter_units(self.spec.sources, self.spec.unit_rows):
                lines.write(json.dumps(unit) + "\n")
                self.units += 1
                self.items += unit_size(unit)
        with new_file(file) as temporary:
            temporary.write_text(json.dumps({"spec": mine, "units": self.units, "items": self.items}))

    def _sweep(self) -> None:
        """Remove what a kill in the middle of writing left: temporary files of `new_file` for our names."""
        output = re.compile(rf"\.{re.escape(self.output.name)}(\.bad\.jsonl)?\.[a-z0-9_]{{8}}")
        for folder, leftover in ((self.output.parent, output), (self.folder, re.compile(r"\..+\.[a-z0-9_]{8}"))):
            for path in folder.iterdir():
                if leftover.fullmatch(path.name):
                    path.unlink()

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()

    def pending(self) -> Iterator[tuple[int, Unit]]:
        """Number and unit of what is not done yet, in order; read line by line."""
        with (self.folder / "units.jsonl").open() as lines:
            for number, line in enumerate(lines):
                if not is_whole(part_path(self.folder, number)):
                    yield number, json.loads(line)

    def finish(self) -> tuple[int, int]:
        """Merge the parts into the output and remove the folder; returns rows and refusals."""
        parts = (part_path(self.folder, number) for number in range(self.units))
        counts = merge_parts(parts, self.output, schema(self.spec.dim, self.spec.contract_id, bool(self.spec.detector)))
        self.discard()
        return counts

    def discard(self) -> None:
        """Remove the folder and what was done."""
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Let another process have the job."""
        self._lock.close()

    def __enter__(self) -> Job:
        """The job itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


class Stopped(Exception):
    """A unit was given up because the run ends; its part was not written."""


def embed_unit(
    folder: Path,
    number: int,
    unit: Unit,
    engine: EmbeddingEngine,
    spec: JobSpec,
    detector: FaceDetector | None = None,
    advance: Callable[[int], object] = lambda count: None,
    stop: threading.Event | None = None,
) -> tuple[int, int]:
    """Write the part of one unit; returns rows and refusals. Memory: two requests of faces, and the unit's rows.

    Raises:
        ContractMismatch: the engine is of another contract than the spec.
        ArcFaceError: what the engine raises; nothing was written then.
        Stopped: `stop` was set.
    """
    if engine.contract_id != spec.contract_id:
        raise ContractMismatch(
            f"this job is of contract {spec.contract_id}, {engine!r} serves {engine.contract_id}: expected one model "
            "behind all URLs. Serve the same one everywhere: arcface serve"
        )
    names: list[str] = []
    identities: list[str | None] = []
    digests: list[bytes] = []
    refused: list[tuple[str, str]] = []
    found: list[Found] = []

    def faces() -> Iterator[Array]:
        for item in read_unit(unit, detector):
            if stop is not None and stop.is_set():
                raise Stopped
            if item.face is None:
                refused.append((item.name, item.refused))
                continue
            names.append(item.name)
            identities.append(item.identity)
            digests.append(_digest(item))
            if item.found is not None:
                found.append(item.found)
            yield item.face

    rows: list[Array] = []
    for row in _stream(engine, faces()):
        rows.append(row)
        advance(len(row))
    advance(unit_size(unit) - len(names))
    embeddings = np.concatenate(rows) if rows else np.empty((0, spec.dim), np.float32)
    where = found if spec.detector else None
    write_part(part_path(folder, number), names, identities, embeddings, digests, refused, spec.contract_id, where)
    return len(names), len(refused)


def run_local(
    job: Job, engines: Sequence[EmbeddingEngine], advance: Callable[[int], object] = lambda count: None
) -> None:
    """Do what is pending, a thread for each engine (one a server); Ctrl-C gives up the units under way at once.

    Raises:
        ArcFaceError: what an engine raises; the others stop too, and the job can be gone on with.
    """
    free: SimpleQueue[tuple[EmbeddingEngine, FaceDetector | None]] = SimpleQueue()
    for engine in engines:
        free.put((engine, job.spec.open_detector()))
    stop = threading.Event()

    def work(number: int, unit: Unit) -> None:
        engine, detector = free.get()
        try:
            embed_unit(job.folder, number, unit, engine, job.spec, detector, advance, stop)
        finally:
            free.put((engine, detector))

    pool = ThreadPoolExecutor(len(engines), thread_name_prefix="arcface-bulk")
    under_way: set[Future[None]] = set()
    pending = job.pending()
    try:
        while True:
            while len(under_way) <= len(engines) and (entry := next(pending, None)) is not None:
                under_way.add(pool.submit(work, *entry))
            if not under_way:
                return
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _stream(engine: Any, faces: Iterator[Array]) -> Iterator[Array]:
    """Embeddings (n,D) of a stream of faces: several requests in flight where the engine can."""
    if hasattr(engine, "encode_stream"):
        for row in engine.encode_stream(faces):
            yield row[None]
        return
    batch: list[Array] = []
    for face in faces:
        batch.append(face)
        if len(batch) == BATCH:
            yield engine.encode(np.stack(batch))
            batch = []
    if batch:
        yield engine.encode(np.stack(batch))


def _digest(item: Item) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(item.face).data).digest()
