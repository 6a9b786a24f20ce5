"""Startup validation: compares an engine with the reference on a few faces before it is used."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arcface_clients.arrays import DAMAGED, Array
from arcface_clients.atomic import new_file
from arcface_clients.engines.protocol import EmbeddingEngine
from arcface_clients.errors import (
    BackendUnavailable,
    ConfigError,
    ContractMismatch,
    GateFailed,
    InferenceFailed,
    InvalidEmbeddings,
    InvalidFaces,
)
from arcface_clients.evidence.gate import judge_embeddings
from arcface_clients.faces.check import check_faces
from arcface_clients.faces.synthetic import synthetic_faces

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationReport:
    """Verdict on one engine that may be used; `status` is passed or skipped, `why` says on what grounds."""

    status: str
    why: str
    faces: int = 0
    max_drift: float | None = None
    limit: float | None = None
    worst_face: int | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)


@dataclass(frozen=True)
class StoredReference:
    """Faces and the reference's embeddings of them: uint8 (N,112,112,3) BGR and float32 (N,D)."""

    faces: Array
    embeddings: Array
    contract_id: str | None
    origin: str

    def save(self, file: str | Path) -> None:
        """Write an .npz with faces, embeddings and contract_id, atomically."""
        with new_file(Path(file)) as temporary, temporary.open("wb") as stream:
            np.savez(stream, faces=self.faces, embeddings=self.embeddings, contract_id=self.contract_id or "")

    @classmethod
    def load(cls, file: Path, count: int) -> StoredReference:
        """The first `count` faces of such a file.

        Raises:
            ConfigError: it cannot be read, or arrays are missing or do not match.
        """
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
                faces, embeddings = check_faces(data["faces"][:count]), data["embeddings"][:count]
                contract = str(data["contract_id"]) if "contract_id" in data else ""
        except (OSError, KeyError, TypeError, *DAMAGED) as exc:
            raise ConfigError(
                f"{file} (validation.reference): expected an .npz with faces, embeddings and contract_id: {exc}"
            ) from exc
        if not len(faces) or embeddings.ndim != 2 or len(embeddings) != len(faces):
            raise ConfigError(
                f"{file} (validation.reference): expected at least one face and one embedding for each, "
                f"got {len(faces)} faces and embeddings of shape {embeddings.shape}."
            )
        return cls(faces, embeddings, contract or None, str(file))


def reference_from(engine: EmbeddingEngine, faces: Array) -> StoredReference:
    """The reference engine's embeddings of these faces."""
    return StoredReference(faces, engine.encode(faces), engine.contract_id, "InsightFace on the local model")


def validate_engine(
    engine: EmbeddingEngine, reference: StoredReference, precision: str, limits: Mapping[str, float], name: str
) -> ValidationReport:
    """Compare an engine with the reference, face by face, and let the gate decide (`evidence.gate`).

    Raises:
        GateFailed: the gate refuses it; the message says by how much and for which faces.
        ContractMismatch: engine and reference are different models, or may be: one contract is unknown and they differ.
    """
    contract = engine.contract_id
    known = contract is not None and reference.contract_id is not None
    if (known and contract != reference.contract_id) or engine.embedding_dim != reference.embeddings.shape[1]:
        raise ContractMismatch(
            f"{name} serves contract {(contract or 'unknown')[:12]} (width {engine.embedding_dim}), the reference "
            f"({reference.origin}) has {(reference.contract_id or 'unknown')[:12]} (width "
            f"{reference.embeddings.shape[1]}): they are different models. Point local.model or validation.reference "
            "at the served one, or set validation.run_on_startup: false"
        )
    try:
        embeddings = engine.encode(reference.faces)
    except (InferenceFailed, InvalidFaces, InvalidEmbeddings) as exc:  # NaN, or it cannot embed synthetic faces
        raise GateFailed(f"{name} cannot embed the {len(reference.faces)} faces of its validation: {exc}") from exc
    verdict = judge_embeddings(reference.embeddings, embeddings, precision, limits)
    if verdict.passed:
        return ValidationReport(
            status="passed",
            why=f"compared with {reference.origin}",
            faces=verdict.faces,
            max_drift=verdict.max_drift,
            limit=verdict.limit,
            worst_face=verdict.report.worst_face if verdict.report else None,
        )
    said = f"{verdict.why} (compared with {reference.origin})"
    if not known:  # a fallback could then be another model, and silently mix two contracts
        raise ContractMismatch(
            f"{name}: {said}, and its contract or the reference's is unknown, so it may be another model. "
            "Serve it with its contract (arcface serve does), or set validation.run_on_startup: false"
        )
    raise GateFailed(f"{said}. Look closer: arcface parity")


class StartupValidation:
    """Validates each engine it is called with, making the reference's embeddings once; for `FallbackEmbedder`."""

    def __init__(
        self,
        limits: Mapping[str, float],
        *,
        count: int,
        precision: str,
        stored: Path | None = None,
        make_reference: Callable[[], EmbeddingEngine] | None = None,
    ) -> None:
        """Store where the reference comes from; nothing is loaded.

        Args:
            limits: largest drift by precision.
            count: faces to compare.
            precision: assumed for an engine that does not state its own.
            stored: an .npz with faces and reference embeddings; None uses `make_reference` on synthetic faces.
            make_reference: creates the reference engine, which is closed after use.
        """
        self._limits, self._count, self._precision = limits, count, precision
        self._stored, self._make_reference = stored, make_reference
        self._lock = threading.Lock()
        self._reference: StoredReference | None = None
        self._no_reference = ""

    def __call__(self, name: str, engine: EmbeddingEngine) -> ValidationReport:
        """Validate one loaded engine; `name` is its name in logs.

        Raises:
            GateFailed, ContractMismatch: see `validate_engine`.
        """
        if getattr(engine, "name", None) == "insightface":
            return ValidationReport("skipped", "it is the reference itself")
        reference = self._get_reference()
        if reference is None:
            _log.warning("%s is used without validation: %s", name, self._no_reference)
            return ValidationReport("skipped", self._no_reference)
        report = validate_engine(engine, reference, precision_of(engine, self._precision), self._limits, name)
        _log.info("%s passed its validation: drift %.2g, limit %g", name, report.max_drift, report.limit)
        return report

    def _get_reference(self) -> StoredReference | None:
        with self._lock:
            if self._reference is None and not self._no_reference:
                if self._stored is not None:
                    self._reference = StoredReference.load(self._stored, self._count)
                elif self._make_reference is None:
                    self._no_reference = "no reference is configured (validation.reference)"
                else:
                    try:
                        with self._make_reference() as engine:
                            self._reference = reference_from(engine, synthetic_faces(self._count))
                    except (BackendUnavailable, GateFailed) as exc:  # GateFailed: its file is not what was imported
                        self._no_reference = f"there is no reference on this host: {exc}"
            return self._reference


def precision_of(engine: EmbeddingEngine, otherwise: str) -> str:
    """Precision that an engine states (for a Triton client, what the server states), else `otherwise`."""
    said = getattr(engine, "precision", None) or getattr(getattr(engine, "served", None), "precision", None)
    return said or otherwise
