"""Caches embeddings, so that only faces not yet embedded under this contract reach the engine."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.closing import Closing
from arcface_clients.errors import ConfigError, ContractMismatch
from arcface_clients.faces.check import check_faces

if TYPE_CHECKING:
    from arcface_clients.engines.protocol import EmbeddingEngine

Key = tuple[str, bytes]  # contract id, sha256 of the face's pixels

# Memory of an entry besides its vector: key, two digest objects, array header, table slot (sys.getsizeof).
ENTRY_OVERHEAD_BYTES = 400

SCHEMA = """
CREATE TABLE IF NOT EXISTS embeddings
    (contract TEXT NOT NULL, digest BLOB NOT NULL, vector BLOB NOT NULL, PRIMARY KEY (contract, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS people
    (person TEXT NOT NULL, contract TEXT NOT NULL, digest BLOB NOT NULL, PRIMARY KEY (person, contract, digest))
    WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS people_of ON people (contract, digest);
"""


@dataclass
class CacheStats:
    """Counts since the cache was opened; a hit is a face that was not sent to the engine."""

    hits: int = 0
    disk_hits: int = 0  # hits that came from the file
    misses: int = 0
    evictions: int = 0


def face_digest(face_bgr_u8: Array) -> bytes:
    """Sha256 of a face's pixels, uint8 (112,112,3) in C order: equal for equal faces, whatever file they came from."""
    return hashlib.sha256(np.ascontiguousarray(face_bgr_u8).data).digest()


class EmbeddingCache(Closing):
    """Embeddings by face content and contract id: the least recently used leave memory first; a file keeps all.

    The file is SQLite in write-ahead mode: commits survive a kill, and several processes may share it. Thread-safe;
    the engine runs outside the lock.
    """

    def __init__(self, max_bytes: int = 256 << 20, path: Path | str | None = None) -> None:
        """Keep up to `max_bytes` in memory and, with `path`, everything in a file, created if missing.

        Raises:
            ConfigError: a limit below 0, or `path` is not a cache file.
        """
        if max_bytes < 0:
            raise ConfigError(f"expected max_bytes of at least 0, got {max_bytes}.")
        self.max_bytes = max_bytes
        self.bytes_used = 0
        self.stats = CacheStats()
        self._lock = threading.Lock()
        self._vectors: OrderedDict[Key, Array] = OrderedDict()
        self._people: dict[str, set[Key]] = {}  # only what is in memory
        self._owners: dict[Key, set[str]] = {}  # the inverse
        self._path = Path(path) if path is not None else None
        self._file = _open(self._path) if self._path is not None else None

    def embed(self, engine: EmbeddingEngine, faces: Array, person: str | None = None) -> Array:
        """Embeddings float32 (N,D) of faces uint8 (N,112,112,3) BGR, in order; a face given twice is embedded once.

        Args:
            engine: embeds the missing faces, in one call.
            faces: as for the engine.
            person: stored with these faces, so that `clear` can forget them.

        Raises:
            ContractMismatch: the engine states no contract id, so nothing can be cached.
            ConfigError: the file cannot be read or written (disk full, damaged).
            ArcFaceError: raised by `engine.encode`.
        """
        faces = check_faces(faces)
        contract = engine.contract_id
        if not contract:
            raise ContractMismatch(
                "the engine states no contract id, so its embeddings cannot be told from another model's: expected a "
                "server that was started on an assembled repository. Start it with scripts/serve, or use no cache."
            )
        keys = [(contract, face_digest(face)) for face in faces]
        with self._lock, self._file_errors():
            known = self._find(keys)
            missing = [i for i, key in enumerate(keys) if key not in known]
            first = {keys[i]: i for i in reversed(missing)}  # each distinct face once, at its first index
            self.stats.misses += len(first)
            self.stats.hits += len(keys) - len(first)
        if not keys:
            return engine.encode(faces)
        new: dict[Key, Array] = {}
        if first:
            order = sorted(first.values())
            fresh = engine.encode(faces[order])
            new = {keys[i]: np.array(row, np.float32) for i, row in zip(order, fresh, strict=True)}
            known.update(new)
        with self._lock, self._file_errors():
            self._keep(keys, known, new, person)
        return np.stack([known[key] for key in keys])

    def clear(self, person: str | None = None) -> int:
        """Forget a person's faces (unless shared with another), or everything; returns the number removed."""
        with self._lock, self._file_errors():
            own = set(self._vectors) if person is None else self._people.pop(person, set())
            for key in own:
                self._owners[key].discard(person or "")
            if self._file is not None:
                gone = _forget(self._file, person)
            else:
                gone = {key for key in own if person is None or not self._owners[key]}
            for key in gone:
                self._drop(key)
            return len(gone)

    def close(self) -> None:
        """Close the file and clear the memory; the file can be opened again."""
        with self._lock:
            for key in list(self._vectors):
                self._drop(key)
            if self._file is not None:
                self._file.close()
                self._file = None

    def __len__(self) -> int:
        """Embeddings in memory."""
        return len(self._vectors)

    def _find(self, keys: Sequence[Key]) -> dict[Key, Array]:
        known: dict[Key, Array] = {}
        for key in dict.fromkeys(keys):
            if key in self._vectors:
                self._vectors.move_to_end(key)
                known[key] = self._vectors[key]
            elif self._file is not None:
                row = self._file.execute(
                    "SELECT vector FROM embeddings WHERE contract = ? AND digest = ?", key
                ).fetchone()
                if row:
                    known[key] = np.frombuffer(row[0], "<f4")
                    self.stats.disk_hits += 1
        return known

    def _keep(self, keys: Sequence[Key], known: dict[Key, Array], new: dict[Key, Array], person: str | None) -> None:
        if self._file is not None:
            with self._file:  # one transaction: embeddings and their owners, or neither
                self._file.executemany(
                    "INSERT OR IGNORE INTO embeddings VALUES (?, ?, ?)",
                    [(*key, vector.astype("<f4").tobytes()) for key, vector in new.items()],
                )
                if person is not None:
                    self._file.executemany(
                        "INSERT OR IGNORE INTO people VALUES (?, ?, ?)", [(person, *k) for k in keys]
                    )
        for key in dict.fromkeys(keys):
            if key not in self._vectors:
                self._vectors[key] = known[key]
                self._owners[key] = set()
                self.bytes_used += known[key].nbytes + ENTRY_OVERHEAD_BYTES
            if person is not None:
                self._people.setdefault(person, set()).add(key)
                self._owners[key].add(person)
        while self.bytes_used > self.max_bytes:
            self._drop(next(iter(self._vectors)))
            self.stats.evictions += 1

    def _drop(self, key: Key) -> None:
        vector = self._vectors.pop(key, None)
        if vector is None:
            return
        self.bytes_used -= vector.nbytes + ENTRY_OVERHEAD_BYTES
        for person in self._owners.pop(key):
            own = self._people.get(person, set())
            own.discard(key)
            if not own:
                self._people.pop(person, None)

    @contextmanager
    def _file_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise ConfigError(
                f"the embedding cache {self._path} failed ({exc}): expected a writable file on a disk with free space. "
                "Free some, give another path, or delete it: a cache can be rebuilt."
            ) from exc


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection: sqlite3.Connection | None = None
    try:
        connection = sqlite3.connect(path, check_same_thread=False, timeout=30)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(SCHEMA)
    except sqlite3.OperationalError as exc:  # disk full, no permission, locked: the file may well be a cache
        if connection is not None:
            connection.close()
        raise ConfigError(
            f"the embedding cache {path} cannot be opened ({exc}): expected a writable file on a disk with free space. "
            "Free some, or give another path."
        ) from exc
    except sqlite3.DatabaseError as exc:
        if connection is not None:
            connection.close()
        raise ConfigError(
            f"{path} is not an embedding cache ({exc}): expected a file written by this program. "
            "Give another path, or delete it: a cache can be rebuilt."
        ) from exc
    return connection


def _forget(file: sqlite3.Connection, person: str | None) -> set[Key]:
    """Delete a person (None: everybody) from the file; returns the keys that nobody has any more."""
    with file:
        if person is None:
            keys = set(file.execute("SELECT contract, digest FROM embeddings"))
            file.execute("DELETE FROM embeddings")
            file.execute("DELETE FROM people")
            return keys
        own = file.execute("SELECT contract, digest FROM people WHERE person = ?", (person,)).fetchall()
        file.execute("DELETE FROM people WHERE person = ?", (person,))
        still = "SELECT 1 FROM people WHERE contract = ? AND digest = ?"
        gone = {key for key in own if not file.execute(still, key).fetchone()}
        file.executemany("DELETE FROM embeddings WHERE contract = ? AND digest = ?", list(gone))
        return gone
