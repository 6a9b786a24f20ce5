"""What a worker does, a thread or a Ray actor: a unit in, its part written; busy or lost servers are waited for."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from random import uniform
from typing import TYPE_CHECKING, Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.bulk.files import Files
from arcface_clients.bulk.folders import Folder
from arcface_clients.bulk.on_server import photo_rows
from arcface_clients.bulk.parts import Part, part_bytes, put_part
from arcface_clients.bulk.read import Item, read_unit
from arcface_clients.bulk.spec import ON_SERVER, JobSpec
from arcface_clients.bulk.units import Unit, unit_names, unit_size
from arcface_clients.errors import (
    DeadlineExceeded,
    InvalidAnswer,
    ModelNotReady,
    Overloaded,
    ServerUnreachable,
)
from arcface_clients.faces.images import Found

if TYPE_CHECKING:
    from arcface_clients.engines.protocol import EmbeddingEngine
    from arcface_clients.faces.detect import FaceDetector

BATCH = 256
PATIENCE_S = 600.0  # a server that is restarted with a large model, or a queue that is emptied, needs minutes
ELSEWHERE_AFTER_S = 10.0  # how long a lost server is tried before another one, where there are several
_BUSY = (Overloaded, DeadlineExceeded)
_AWAY = (ServerUnreachable, ModelNotReady, InvalidAnswer)


class Stopped(Exception):
    """A unit was given up because the run ends; its part was not written."""


class UnitWorker:
    """Embeds one unit at a time with its engine; moves to the next one where that is lost, and waits where all are.

    Attributes:
        engines: one for each server.
        patience_s: how long a unit is tried again while servers are overloaded or away.
    """

    def __init__(
        self,
        folder: Folder,
        spec: JobSpec,
        engines: Sequence[EmbeddingEngine],
        files: Files,
        *,
        first: int = 0,
        patience_s: float = 0.0,
    ) -> None:
        """`first`: the engine to begin with."""
        self.folder, self.spec, self.engines, self.files = folder, spec, engines, files
        self.patience_s = patience_s
        self._at = first % len(engines)
        self._detector = spec.open_detector()

    def do(
        self,
        number: int,
        unit: Unit,
        advance: Callable[[int], object] = lambda count: None,
        stop: threading.Event | None = None,
    ) -> Part:
        """Write the part of a unit.

        Raises:
            BackendUnavailable: the servers were overloaded or away for `patience_s`.
            ContractMismatch, InferenceFailed, StoreUnreachable …: nothing was written.
            Stopped: `stop` was set.
        """
        stop = stop or threading.Event()
        give_up_s = time.monotonic() + self.patience_s
        attempt = 0
        while True:
            told = 0

            def advanced(count: int) -> None:
                nonlocal told
                told += count
                advance(count)

            engine = self.engines[self._at]
            try:
                return embed_unit(
                    self.folder, number, unit, engine, self.spec, self.files, self._detector, advanced, stop,
                    retry_for_s=ELSEWHERE_AFTER_S if len(self.engines) > 1 else None,
                )  # fmt: skip
            except (*_BUSY, *_AWAY) as exc:
                advance(-told)
                if isinstance(exc, _AWAY):
                    self._at = (self._at + 1) % len(self.engines)
                pause_s = uniform(0.1, min(30.0, 0.5 * 2 ** min(attempt, 8)))
                if time.monotonic() + pause_s > give_up_s:
                    raise
                attempt += 1
                if stop.wait(pause_s):
                    raise Stopped from exc


def embed_unit(
    folder: Folder,
    number: int,
    unit: Unit,
    engine: EmbeddingEngine,
    spec: JobSpec,
    files: Files | None = None,
    detector: FaceDetector | None = None,
    advance: Callable[[int], object] = lambda count: None,
    stop: threading.Event | None = None,
    retry_for_s: float | None = None,
) -> Part:
    """Write the part of one unit. Memory: two requests of faces, and the unit's rows.

    Raises:
        ContractMismatch: the engine is of another contract than the spec.
        DetectorMismatch: its server finds faces with another detector.
        ArcFaceError: what the engine raises; nothing was written then.
        StoreUnreachable: the object store does not answer.
        Stopped: `stop` was set.
    """
    spec.check_contract(engine)
    names: list[str] = []
    identities: list[str | None] = []
    digests: list[bytes] = []
    refused: list[tuple[str, str]] = []
    found: list[Found] = []

    def keep(item: Item) -> bool:
        if item.face is None:
            refused.append((item.name, item.refused))
            return False
        names.append(item.name)
        identities.append(item.identity)
        digests.append(_digest(item))
        if item.found is not None:
            found.append(item.found)
        return True

    def check() -> None:
        if stop is not None and stop.is_set():
            raise Stopped

    def faces() -> Iterator[Array]:
        for item in read_unit(unit, detector, files):
            check()
            if keep(item) and item.face is not None:
                yield item.face

    def rows_of() -> Iterator[Array]:
        if spec.detector != ON_SERVER:
            yield from _stream(engine, faces(), retry_for_s)
            return
        server: Any = engine  # a PhotoServer, as whoever made the spec connects
        spec.check_detector(server.detector_id, f"that of {engine!r}")
        for item, row in photo_rows(unit, server, files, spec.min_score, retry_for_s, check):
            if keep(item) and row is not None:
                yield row[None]

    rows: list[Array] = []
    for row in rows_of():
        rows.append(row)
        advance(len(row))
    spec.check_contract(engine)
    advance(unit_size(unit) - len(names) if unit_size(unit) else 0)
    embeddings = np.concatenate(rows) if rows else np.empty((0, spec.dim), np.float32)
    where = found if spec.detector else None
    part = Part(len(names), len(refused), spec.contract_id, detector_id=spec.detector_id)
    put_part(folder, number, part_bytes(names, identities, embeddings, digests, part, where), refused)
    return part


def set_aside(folder: Folder, number: int, unit: Unit, spec: JobSpec, reason: str) -> Part:
    """Write an empty part for a unit that is given up, and list what is in it as refused."""
    refused = [(name, reason) for name in unit_names(unit)]
    found: list[Found] | None = [] if spec.detector else None
    nothing = np.empty((0, spec.dim), np.float32)
    part = Part(0, len(refused), spec.contract_id, reason, spec.detector_id)
    put_part(folder, number, part_bytes([], [], nothing, [], part, found), refused)
    return part


def _stream(engine: Any, faces: Iterator[Array], retry_for_s: float | None) -> Iterator[Array]:
    """Embeddings (n,D) of a stream of faces: several requests in flight where the engine can."""
    if hasattr(engine, "encode_stream"):
        options = {} if retry_for_s is None else {"retry_for_s": retry_for_s}
        for row in engine.encode_stream(faces, **options):
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
