"""A gallery of named embeddings: search for the nearest people, save to one versioned file."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arcface_clients.arrays import DAMAGED, Array, unit_rows
from arcface_clients.atomic import new_file
from arcface_clients.errors import ContractMismatch, InvalidEmbeddings
from arcface_clients.people.neighbours import nearest_unit

FORMAT, VERSION = "arcface-gallery", 1


@dataclass(frozen=True)
class Match:
    """One result of a search."""

    identity: str
    distance: float


class Gallery:
    """People and their embeddings, all of one contract id; searched exhaustively with one matrix product.

    A search takes no lock: it works on the rows present when it started. Adding and removing are serialised.
    """

    def __init__(self, contract_id: str) -> None:
        """Create an empty gallery for embeddings of this contract (an engine's `contract_id`)."""
        if not contract_id:
            raise ContractMismatch(
                "a gallery needs the contract id of its embeddings, and this engine states none: expected a server "
                "that was started on an assembled repository. Start it with: scripts/serve"
            )
        self.contract_id = contract_id
        self._lock = threading.Lock()
        self._names: list[str] = []
        self._number: dict[str, int] = {}
        self._count = 0
        self._rows = np.empty((0, 0), np.float32)  # unit rows; the first _count are in use
        self._owner = np.empty(0, np.int32)  # index of each row's name in _names

    def __len__(self) -> int:
        """Number of embeddings."""
        return self._count

    @property
    def dim(self) -> int | None:
        """Width of the embeddings; None while the gallery is empty."""
        return self._rows.shape[1] or None

    def identities(self) -> dict[str, int]:
        """Names in order of first enrolment, with the number of embeddings of each."""
        with self._lock:
            counts = np.bincount(self._owner[: self._count], minlength=len(self._names))
            return {name: int(count) for name, count in zip(self._names, counts, strict=True) if count}

    def check_contract(self, contract_id: str | None) -> None:
        """Refuse embeddings of another model.

        Raises:
            ContractMismatch: `contract_id` is a different one, or None.
        """
        if contract_id != self.contract_id:
            raise ContractMismatch(
                f"this gallery holds {self._count} embeddings of contract {self.contract_id[:12]}, but these are of "
                f"{contract_id[:12] if contract_id else 'an unknown contract'}: expected one model for both, since "
                "distances between two models mean nothing. Re-enrol: embed everybody's faces with the model "
                "served now (arcface embed FACES -o new.npz) into a new gallery; or go back to serving this gallery's "
                "model (arcface rollback)."
            )

    def add(self, identity: str, embeddings: Array, contract_id: str) -> None:
        """Add one embedding (D,) or several (N,D) under a new or existing name; stored with unit length.

        Raises:
            ContractMismatch: `contract_id` (of the engine that made them) is not this gallery's.
            InvalidEmbeddings: wrong width, zero or NaN rows; nothing is added.
        """
        self.check_contract(contract_id)
        array = np.asarray(embeddings)
        rows = unit_rows(array[None] if array.ndim == 1 else array)
        with self._lock:
            if self.dim not in (None, rows.shape[1]):
                raise InvalidEmbeddings(f"expected embeddings of {self.dim} dimensions, got {rows.shape[1]}.")
            needed = self._count + len(rows)
            if needed > len(self._rows) or self.dim is None:
                self._grow(max(needed, 2 * len(self._rows), 16), rows.shape[1])
            if identity not in self._number:
                self._number[identity] = len(self._names)
                self._names.append(identity)
            self._rows[self._count : needed] = rows
            self._owner[self._count : needed] = self._number[identity]
            self._count = needed

    def remove(self, *identities: str) -> int:
        """Forget these people; returns the number of embeddings removed. Unknown names are ignored."""
        with self._lock:
            gone = [self._number[name] for name in identities if name in self._number]
            kept = ~np.isin(self._owner[: self._count], gone)
            removed = int(self._count - kept.sum())
            if gone:  # new arrays: a running search keeps using the old ones
                self._rows, self._owner = self._rows[: self._count][kept], self._owner[: self._count][kept]
                self._count -= removed
            return removed

    def search(
        self, queries: Array, k: int = 5, contract_id: str | None = None, per_identity: bool = True
    ) -> list[list[Match]]:
        """Find the k nearest people to each query, nearest first.

        Args:
            queries: one embedding (D,) or several (Q,D).
            k: number of results; fewer if the gallery has fewer.
            contract_id: of the engine that made the queries; None if the caller has already checked it.
            per_identity: each name once, with its nearest embedding; False: the k nearest embeddings.

        Raises:
            ContractMismatch: `contract_id` is given but is not this gallery's.
            InvalidEmbeddings: wrong width, zero or NaN rows, k < 1.
        """
        if contract_id is not None:
            self.check_contract(contract_id)
        array = np.asarray(queries)
        rows = unit_rows(array[None] if array.ndim == 1 else array, "queries")
        with self._lock:
            held, owner, names = self._rows[: self._count], self._owner[: self._count], self._names
        if not len(held):
            return [[] for _ in rows]
        if rows.shape[1] != held.shape[1]:
            raise InvalidEmbeddings(f"expected queries of {held.shape[1]} dimensions, got {rows.shape[1]}.")
        # This many nearest rows contain k different names, whoever they belong to.
        wanted = (k - 1) * int(np.bincount(owner).max()) + 1 if per_identity and k > 0 else k
        distances, found = nearest_unit(rows, held, min(wanted, len(held)))
        return [
            _matches(row, distance, names, k, per_identity)
            for row, distance in zip(owner[found].tolist(), distances.tolist(), strict=True)
        ]

    def save(self, path: Path | str) -> None:
        """Write one .npz file atomically: header (format, version, contract id), embeddings, names."""
        with self._lock:
            rows, names = self._rows[: self._count], self._names
            used, owner = np.unique(self._owner[: self._count], return_inverse=True)  # names without a row are left out
        names = [names[i] for i in used]
        header = json.dumps({"format": FORMAT, "version": VERSION, "contract_id": self.contract_id})
        with new_file(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                header=np.array(header),
                embeddings=rows,
                owner=owner.astype(np.int32),
                names=np.array(names, dtype=np.str_),
            )

    @classmethod
    def load(cls, path: Path | str, contract_id: str | None = None) -> Gallery:
        """Read a file written by `save`; with `contract_id` (of the current engine), refuse another model's gallery.

        Raises:
            InvalidEmbeddings: not a gallery, damaged, or of a newer version.
            ContractMismatch: `contract_id` is given but is not the file's.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as data:
                header = json.loads(str(data["header"]))
                if header["format"] != FORMAT or header["version"] > VERSION:
                    raise ValueError(f"it is {header['format']} version {header['version']}")
                gallery = cls(header["contract_id"])
                gallery._rows, gallery._owner = data["embeddings"], data["owner"]
                gallery._names = data["names"].tolist()
            if gallery._rows.ndim != 2 or gallery._owner.shape != gallery._rows.shape[:1]:
                raise ValueError(f"embeddings {gallery._rows.shape} and owners {gallery._owner.shape} do not fit")
            if not np.array_equal(np.unique(gallery._owner), np.arange(len(gallery._names))):
                raise ValueError("names and owners do not fit")
        except (KeyError, TypeError, *DAMAGED) as exc:
            raise InvalidEmbeddings(
                f"{path} cannot be read as a gallery ({exc}): expected a complete {FORMAT} file, "
                f"version {VERSION} or older. Save it again, or update arcface-triton."
            ) from exc
        gallery._count = len(gallery._rows)
        gallery._number = {name: i for i, name in enumerate(gallery._names)}
        if contract_id is not None:
            gallery.check_contract(contract_id)
        return gallery

    def _grow(self, capacity: int, dim: int) -> None:
        rows, owner = np.empty((capacity, dim), np.float32), np.empty(capacity, np.int32)
        if self._count:
            rows[: self._count], owner[: self._count] = self._rows[: self._count], self._owner[: self._count]
        self._rows, self._owner = rows, owner


def _matches(owners: list[int], distances: list[float], names: list[str], k: int, per_identity: bool) -> list[Match]:
    """The first k rows, or the first row of each of the first k names."""
    matches: list[Match] = []
    seen: set[int] = set()
    for owner, distance in zip(owners, distances, strict=True):
        if len(matches) == k:
            break
        if not (per_identity and owner in seen):
            matches.append(Match(names[owner], distance))
        seen.add(owner)
    return matches
