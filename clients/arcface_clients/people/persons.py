"""Runs the consensus over folders of faces, one per person, and resumes an interrupted run."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_clients.arrays import Array
from arcface_clients.closing import Closing
from arcface_clients.errors import ConfigError, ContractMismatch
from arcface_clients.faces.images import Crop, find_files, load_faces
from arcface_clients.people.consensus import MAX_DISTANCE, find_consensus

if TYPE_CHECKING:
    from arcface_clients.engines.protocol import EmbeddingEngine
    from arcface_clients.people.cache import EmbeddingCache

FORMAT, VERSION = "arcface-consensus", 2
Loader = Callable[[Sequence[str]], tuple[Array, list[str], list[Crop]]]


@dataclass(frozen=True)
class Limits:
    """Limits for agreement; see `consensus.find_consensus`."""

    max_distance: float = MAX_DISTANCE
    min_support: int = 3
    min_share: float = 0.5


def people_in(folder: Path | str) -> dict[str, list[str]]:
    """Subfolder name → its image files, both sorted.

    Raises:
        ConfigError: there are no subfolders.
    """
    people = {path.name: find_files([path]) for path in sorted(Path(folder).iterdir()) if path.is_dir()}
    if not people:
        raise ConfigError(f"{folder} has no subfolders: expected one per person, FOLDER/NAME/*.jpg.")
    return people


def consensus_of_person(
    name: str,
    files: Sequence[str],
    engine: EmbeddingEngine,
    limits: Limits,
    cache: EmbeddingCache | None = None,
    load: Loader = load_faces,
) -> dict[str, Any]:
    """One person's record, plain JSON: agreed, reason, references, outliers, groups, refused, distances, embedding.

    Raises:
        ArcFaceError: raised by the engine. A file that cannot be read is listed under `refused`.
    """
    faces, names, refused = load(files)
    embeddings = cache.embed(engine, faces, person=name) if cache is not None else engine.encode(faces)
    found = find_consensus(embeddings, **asdict(limits))
    return {
        "person": name,
        "signature": signature(files),
        "agreed": found.agreed,
        "reason": found.reason,
        "references": [names[i] for i in found.members],
        "outliers": [{"path": names[o.index], "distance": round(o.distance, 6)} for o in found.outliers],
        "groups": [[names[i] for i in group] for group in found.groups],
        "refused": [{"path": crop.name, "reason": crop.refused} for crop in refused],
        "distances": {n: round(float(d), 6) for n, d in zip(names, found.distances, strict=True)},
        "embedding": [float(f"{x:.8g}") for x in found.embedding] if found.embedding is not None else None,
    }


def record_of_failure(name: str, files: Sequence[str], reason: str) -> dict[str, Any]:
    """The record of a person who could not be processed: undecided, with all files refused for this reason."""
    return {
        "person": name,
        "signature": signature(files),
        "agreed": False,
        "reason": reason,
        "references": [],
        "outliers": [],
        "groups": [],
        "refused": [{"path": file, "reason": reason} for file in files],
        "distances": {},
        "embedding": None,
    }


def consensus_of_people(
    people: Mapping[str, Sequence[str]],
    engine: EmbeddingEngine,
    limits: Limits | None = None,
    *,
    workers: int = 4,
    cache: EmbeddingCache | None = None,
    load: Loader = load_faces,
) -> Iterator[dict[str, Any]]:
    """Records of `consensus_of_person`, in order of completion; `workers` people at a time.

    At most twice as many are queued, so memory does not grow with the number of people. Closing the iterator, or an
    exception in the loop around it, lets the running people finish and starts no more.

    Raises:
        ArcFaceError: raised by the engine; no more people are started.
    """
    limits = limits or Limits()
    waiting = iter(people.items())
    under_way: set[Future[dict[str, Any]]] = set()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="arcface-people")
    try:
        while True:
            while len(under_way) < 2 * workers and (person := next(waiting, None)) is not None:
                under_way.add(pool.submit(consensus_of_person, *person, engine, limits, cache, load))
            if not under_way:
                return
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def signature(files: Sequence[str]) -> str:
    """A sha256 over names, sizes and modification times; changes if a file is added, removed or written."""
    digest = hashlib.sha256()
    for name in files:
        path = Path(name)
        stat = path.stat() if path.exists() else None
        digest.update(repr((name, stat and (stat.st_size, stat.st_mtime_ns))).encode())
    return digest.hexdigest()


class Journal(Closing):
    """Finished records, one per line, in a file beside the output; a line cut short by a kill is dropped."""

    def __init__(
        self, path: Path, contract_id: str | None, limits: Limits, start_over: bool = False, photos: bool = False
    ) -> None:
        """Open or start the journal; `photos` means that the files are photos with faces to detect, not crops.

        Raises:
            ContractMismatch: it was started with another model.
            ConfigError: it was started with other limits, or another process is writing it.
        """
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        settings = {**asdict(limits), "photos": photos}
        head = {"format": FORMAT, "version": VERSION, "contract_id": contract_id, "settings": settings}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it ends
        except OSError as exc:
            self._file.close()
            raise ConfigError(
                f"another process is writing {path}: expected only one. Wait for it, or choose another output."
            ) from exc
        try:
            lines = [] if start_over else self._begun(head)
            self._file.truncate(sum(len(line) + 1 for line in lines))
            if not lines:
                self._write(head)
        except BaseException:
            self._file.close()
            raise

    def _begun(self, head: dict[str, Any]) -> list[bytes]:
        """The complete lines of an earlier run with this header; loads its records."""
        self._file.seek(0)
        lines = self._file.read().split(b"\n")[:-1]
        if not lines:
            return []
        try:
            begun, *records = map(json.loads, lines)
            began_with = begun["contract_id"]
            self.records = {record["person"]: record for record in records}
        except (ValueError, KeyError, TypeError) as exc:
            raise ConfigError(
                f"{self.path} is not a journal written by this program ({exc}). Start over: --force"
            ) from exc
        if began_with != head["contract_id"]:
            raise ContractMismatch(
                f"{self.path} was started with contract {began_with}, this model's is {head['contract_id']}: "
                "expected one model for all people. Start over: --force"
            )
        if begun != head:
            raise ConfigError(
                f"{self.path} was started with {begun.get('settings')}, now it is {head['settings']}: "
                "expected the same. Use the earlier settings, or start over: --force"
            )
        return lines

    def left(self, people: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
        """People who are not recorded yet, or whose files have changed since."""
        return {
            name: files
            for name, files in people.items()
            if name not in self.records or self.records[name]["signature"] != signature(files)
        }

    def add(self, record: dict[str, Any]) -> None:
        """Record a finished person; it is in the file when this returns."""
        self.records[record["person"]] = record
        self._write(record)

    def close(self, delete: bool = False) -> None:
        """Close the file; `delete` it once the output is written."""
        if delete:
            self.path.unlink(missing_ok=True)  # before another process can lock it
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
