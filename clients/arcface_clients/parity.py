"""Parity: one set of faces through every loaded backend of a server; each one's drift from the reference out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from arcface_clients.contract import check_faces
from arcface_clients.drift import DRIFT_LIMITS, compare_embeddings
from arcface_clients.errors import GateFailed, InvalidFaces, ModelNotReady
from arcface_clients.triton import TritonEmbedder

REFERENCE = "arcface_reference"
MODELS = (REFERENCE, "arcface_onnx", "arcface_trt", "arcface")


@dataclass(frozen=True)
class BackendParity:
    """One row: a served model beside the reference, on the same faces."""

    model: str
    runs: str  # the leaf model and its backend, where `model` is an ensemble
    precision: str
    faces_per_s: float  # one pass of the faces through the server; a first impression, not a benchmark
    mean_cosine: float
    min_cosine: float
    worst_face: int
    limit: float | None  # largest drift that its precision may show; None for the reference itself
    passed: bool


@dataclass(frozen=True)
class ParityReport:
    """All loaded backends of one server; `skipped` says of the others why they are not in it."""

    url: str
    faces: int
    contract_id: str | None
    rows: tuple[BackendParity, ...]
    skipped: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every row is within its gate."""
        return all(row.passed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys, and `passed`."""
        return {**asdict(self), "passed": self.passed}

    def require(self) -> None:
        """Raise GateFailed, naming each backend with its figure, unless all passed."""
        failed = [
            f"{r.model} 1 − cosine {1 - r.min_cosine:.2e} > {r.limit:g} ({r.precision})"
            for r in self.rows
            if not r.passed
        ]
        if failed:
            raise GateFailed(
                f"drift above its limit on {self.faces} faces: {'; '.join(failed)}. Look at them: arcface compare"
            )


def measure_parity(
    url: str,
    faces: np.ndarray,
    models: tuple[str, ...] = MODELS,
    *,
    timeout_s: float = 120.0,
    progress: Callable[[str], None] = lambda model: None,
) -> ParityReport:
    """Embed `faces` uint8 (N,112,112,3), N ≥ 1, with every model that is loaded, and compare with the reference.

    The gate of a row is that of its served precision (parameter `precision` of the leaf model, fp32 when absent).

    Raises:
        InvalidFaces: no faces, or not faces.
        ServerUnreachable: no server answers.
        ModelNotReady: the reference is not loaded, so there is nothing to compare with.
        ContractMismatch: a backend serves another contract than the reference.
    """
    faces = check_faces(faces)
    if not len(faces):
        raise InvalidFaces("cannot compare 0 faces: expected at least one.")
    rows: list[BackendParity] = []
    skipped: dict[str, str] = {}
    reference: np.ndarray | None = None
    contract: str | None = None
    for model in (REFERENCE, *(m for m in models if m != REFERENCE)):
        progress(model)
        with TritonEmbedder(url, model, timeout_s=timeout_s, retry_for_s=0, expected_contract=contract) as embedder:
            try:
                served = embedder.ensure_ready()
            except ModelNotReady as exc:
                if model == REFERENCE:
                    raise
                skipped[model] = str(exc)
                continue
            embedder.encode(faces[:1])  # the first request may allocate; it is not timed
            started = time.perf_counter()
            embeddings = embedder.encode(faces)
            faces_per_s = len(faces) / (time.perf_counter() - started)
        if reference is None:
            reference, contract = embeddings, served.contract_id
        drift = compare_embeddings(reference, embeddings)
        precision = served.precision or "fp32"
        limit = None if model == REFERENCE else DRIFT_LIMITS[precision]
        rows.append(
            BackendParity(
                model=model,
                runs=served.backend if served.leaf == model else f"{served.leaf} ({served.backend})",
                precision=precision,
                faces_per_s=faces_per_s,
                mean_cosine=drift.mean_cosine,
                min_cosine=drift.min_cosine,
                worst_face=drift.worst_face,
                limit=limit,
                passed=limit is None or drift.max_drift <= limit,
            )
        )
    return ParityReport(url=url, faces=len(faces), contract_id=contract, rows=tuple(rows), skipped=skipped)
