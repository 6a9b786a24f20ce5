"""What decides the rows of a job, and the file that says so in its folder, which only the same job goes on with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from arcface_clients.bulk.folders import Folder
from arcface_clients.bulk.parts import FORMAT, VERSION
from arcface_clients.errors import ConfigError, ContractMismatch

if TYPE_CHECKING:
    from arcface_clients.faces.detect import FaceDetector

UNIT_ROWS = 2048  # what a kill may cost: four minutes of a network that gives 8 faces/s
METADATA = "_metadata.json"
ON_SERVER = "server:photo_faces"  # as a spec's detector: the server finds the faces


@dataclass(frozen=True)
class JobSpec:
    """What decides the rows of a job; a job that was begun with another spec is not gone on with."""

    sources: tuple[str, ...]
    contract_id: str | None
    dim: int
    unit_rows: int = UNIT_ROWS
    detector: str | None = None  # the detector's file, or `ON_SERVER`; None: the sources are crops
    min_score: float = 0.7

    def open_detector(self) -> FaceDetector | None:
        """The detector of this host that the spec names."""
        if self.detector in (None, ON_SERVER):
            return None
        from arcface_clients.faces.detect import FaceDetector

        return FaceDetector(self.detector, min_score=self.min_score)


def begin(folder: Folder, spec: JobSpec) -> None:
    """Make the folder one of this job."""
    folder.write(METADATA, json.dumps({"format": FORMAT, "version": VERSION, "spec": asdict(spec)}, indent=2).encode())


def begun(folder: Folder, spec: JobSpec, output: str) -> bool:
    """Whether the folder is one of this job; False where it is of none. `output`: how messages name it.

    Raises:
        ConfigError, ContractMismatch: it is of another job.
    """
    data = folder.read(METADATA)
    if data is None:
        return False
    _compare(data, folder, spec, output)
    return True


def check_still_begun(folder: Folder, spec: JobSpec, output: str) -> None:
    """Check that no other job has taken the folder.

    Raises:
        ConfigError, ContractMismatch: one has.
    """
    _compare(folder.read(METADATA) or b"", folder, spec, output)


def _compare(data: bytes, folder: Folder, spec: JobSpec, output: str) -> None:
    mine: dict[str, Any] = json.loads(json.dumps(asdict(spec)))  # tuples become lists
    try:
        theirs = json.loads(data)["spec"]
        of_contract = theirs["contract_id"]
    except (ValueError, KeyError, TypeError) as exc:
        raise ConfigError(
            f"{folder.of(METADATA)} is damaged ({exc}): expected what an unfinished run left. Start over: --force"
        ) from exc
    if of_contract != spec.contract_id:
        raise ContractMismatch(
            f"{output} was begun with contract {of_contract}, the model that is served "
            f"now has {spec.contract_id}: expected one model for all rows. Start over: --force"
        )
    different = [key for key in mine if theirs.get(key) != mine[key]]
    if different:
        raise ConfigError(
            f"{output} was begun with other {', '.join(different)}: expected "
            f"{[theirs.get(key) for key in different]}, got {[mine[key] for key in different]}. "
            "Give the same, or start over: --force"
        )
