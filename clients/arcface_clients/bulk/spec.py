"""What decides the rows of a job, and the file that says so in its folder, which only the same job goes on with."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_clients.bulk.files import is_url
from arcface_clients.bulk.folders import Folder
from arcface_clients.bulk.parts import FORMAT, VERSION
from arcface_clients.errors import ConfigError, ContractMismatch, DetectorMismatch

if TYPE_CHECKING:
    from arcface_clients.engines.protocol import EmbeddingEngine
    from arcface_clients.faces.detect import FaceDetector

UNIT_ROWS = 2048  # what a kill may cost: four minutes of a network that gives 8 faces/s
METADATA = "_metadata.json"
ON_SERVER = "server:photo_faces"  # as a spec's detector: the server finds the faces
_LEFT_OPEN = ("detector_id", "contract_prefix", "below")  # earlier versions did not say it
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobSpec:
    """What decides the rows of a job; a job that was begun with another spec is not gone on with."""

    sources: tuple[str, ...]
    contract_id: str | None
    dim: int
    unit_rows: int = UNIT_ROWS
    detector: str | None = None  # the detector's file, or `ON_SERVER`; None: the sources are crops
    min_score: float = 0.7
    detector_id: str | None = None  # which detector that is, and how it is used; None: not known, and not checked
    contract_prefix: str | None = None  # what rows name of it where the server states no contract_id
    below: str | None = None  # the folder that relative sources are in, where the job was begun; None: none is relative

    def __post_init__(self) -> None:
        """Relative sources are those of the folder that this process works in now."""
        if self.below is None and not all(is_url(source) or Path(source).is_absolute() for source in self.sources):
            object.__setattr__(self, "below", str(Path.cwd()))

    def open_detector(self) -> FaceDetector | None:
        """The detector of this host that the spec names.

        Raises:
            DetectorMismatch: its file is another one than when the job began.
        """
        if self.detector is None or self.detector == ON_SERVER:
            return None
        from arcface_clients.faces.detect import open_detector

        return open_detector(self.detector, self.detector_id, self.min_score)

    def check_contract(self, engine: EmbeddingEngine) -> None:
        """Check that an engine's embeddings are of this job's contract; again after its first answer, which names it.

        Raises:
            ContractMismatch: they are of another one.
        """
        named: str | None = getattr(engine, "contract_prefix", None)
        other = self.contract_prefix is not None and named not in (None, self.contract_prefix)
        if engine.contract_id != self.contract_id or other:
            raise ContractMismatch(
                f"this job is of contract {self.contract_id or self.contract_prefix}, {engine!r} serves "
                f"{engine.contract_id or named}: expected one model behind all URLs. Serve the same one everywhere: "
                "arcface serve"
            )

    def check_detector(self, detector_id: str | None, whose: str) -> None:
        """Check that this detector finds the faces of this job. `whose`: how a message names what has it.

        Raises:
            DetectorMismatch: another one does.
        """
        if self.detector_id is not None and detector_id != self.detector_id:
            raise DetectorMismatch(
                f"the faces of this job are those that {self.detector_id} finds, and {whose} is {_named(detector_id)}: "
                f"expected one detector for all rows. {self._former_one()}"
            )

    def _former_one(self) -> str:
        if self.detector == ON_SERVER:
            return (
                "Serve the former one again (arcface rollback --model photo_faces, and start the server again), "
                "or start over: --force"
            )
        return "Give the former file: --detector FILE, or start over: --force"


def begin(folder: Folder, spec: JobSpec) -> None:
    """Make the folder one of this job."""
    folder.write(METADATA, json.dumps({"format": FORMAT, "version": VERSION, "spec": asdict(spec)}, indent=2).encode())


def begun(folder: Folder, spec: JobSpec, output: str) -> bool:
    """Whether the folder is one of this job; False where it is of none. `output`: how messages name it.

    One that does not name its detector, as earlier versions left it, is of today's from now on, with a warning.

    Raises:
        ConfigError, ContractMismatch, DetectorMismatch: it is of another job.
    """
    data = folder.read(METADATA)
    if data is None:
        return False
    theirs = _compare(data, folder, spec, output)
    if theirs.get("detector_id") != spec.detector_id:
        _log.warning(
            "%s does not say which detector found the faces that are in it; the rest will be those that %s finds. "
            "Start over if that is another one: --force",
            output,
            spec.detector_id,
        )
    if any(theirs.get(key) != getattr(spec, key) for key in _LEFT_OPEN):
        begin(folder, spec)
    return True


def check_still_begun(folder: Folder, spec: JobSpec, output: str) -> None:
    """Check that no other job has taken the folder.

    Raises:
        ConfigError, ContractMismatch, DetectorMismatch: one has.
    """
    _compare(folder.read(METADATA) or b"", folder, spec, output)


def _compare(data: bytes, folder: Folder, spec: JobSpec, output: str) -> dict[str, Any]:
    """The spec in a folder, which may leave open what earlier versions did not say, and nothing else."""
    mine: dict[str, Any] = json.loads(json.dumps(asdict(spec)))  # tuples become lists
    try:
        theirs: dict[str, Any] = json.loads(data)["spec"]
        of_contract = theirs["contract_id"]
    except (ValueError, KeyError, TypeError) as exc:
        raise ConfigError(
            f"{folder.of(METADATA)} is damaged ({exc}): expected what an unfinished run left. Start over: --force"
        ) from exc
    named = theirs.get("contract_prefix")
    if of_contract != spec.contract_id or named not in (None, spec.contract_prefix):
        raise ContractMismatch(
            f"{output} was begun with contract {of_contract or named}, the model that is served "
            f"now has {spec.contract_id or spec.contract_prefix}: expected one model for all rows. Start over: --force"
        )
    files = None not in (both := (theirs.get("detector"), spec.detector)) and ON_SERVER not in both
    same = (*_LEFT_OPEN, "detector") if files and theirs.get("detector_id") else _LEFT_OPEN  # known by its content
    different = [key for key in mine if theirs.get(key) != mine[key] and key not in same]
    if different:
        raise ConfigError(
            f"{output} was begun with other {', '.join(different)}: expected "
            f"{[theirs.get(key) for key in different]}, got {[mine[key] for key in different]}. "
            "Give the same, or start over: --force"
        )
    if theirs.get("below") not in (None, spec.below):
        raise ConfigError(
            f"{output} was begun in {theirs['below']}, where its sources are: expected the same folder, got "
            f"{spec.below}. Run the same command there, or start over: --force"
        )
    if theirs.get("detector_id") not in (None, spec.detector_id):
        raise DetectorMismatch(
            f"{output} was begun with the faces that {theirs['detector_id']} finds; now they would be found by "
            f"{_named(spec.detector_id)}: expected one detector for all rows. {spec._former_one()}"
        )
    return theirs


def _named(detector_id: str | None) -> str:
    return "a detector that the server does not name" if detector_id is None else detector_id
