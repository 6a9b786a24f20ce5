"""Proves that a serving ONNX matches the reference on real runs, and that the rows of a batch are independent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.errors import ProofFailed, SourceRefused
from arcface_clients.contract import (
    CONTRACT_OUTPUT,
    EMBEDDING_OUTPUT,
    FACE_INPUT,
    FACE_SHAPE,
    NORM_OUTPUT,
    Preprocessing,
    contract_words,
)
from arcface_clients.engines.runtimes import OnnxSession, first_line, open_session
from arcface_clients.evidence.drift import DRIFT_LIMITS
from arcface_clients.evidence.gate import judge_embeddings

MAX_NORM_ERROR = 1e-3  # relative, of `norm`; the embedding itself has its gate
MAX_ROW_DIFFERENCE = 1e-5
BATCHES = (1, 2, 7, 32)
MIN_FACES = 64
OnCount = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True)
class Proof:
    """The measurements; `max_row_difference` is the largest |batch row − single run| of unit embeddings."""

    faces: int
    faces_from: str
    min_cosine: float
    mean_cosine: float
    max_row_difference: float
    batches: list[int]
    between_faces: float  # mean cosine of different faces: near 1, the proof could hardly have noticed a difference
    reference: str
    reference_why: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)


class Reference:
    """InsightFace on the source, one face at a time; plain ONNX Runtime if InsightFace is not installed.

    `name` is insightface.get_feat if InsightFace guesses the preprocessing correctly, insightface.forward if it had to
    be given, onnxruntime if InsightFace is not installed; `why` says so in words.
    """

    def __init__(self, source: Path, preprocessing: Preprocessing, label: str | None = None) -> None:
        """Open the source with the CPU provider; `label` names it in messages.

        Raises:
            SourceRefused: ONNX Runtime cannot load it.
        """
        self._preprocessing = preprocessing
        self.label = label or source.name
        self._session = open_session(source, threads=0, settings={}, label=self.label, refused=SourceRefused)
        self._input = self._session.get_inputs()[0].name
        try:
            from insightface.model_zoo.arcface_onnx import ArcFaceONNX
        except ImportError as exc:
            if isinstance(exc.__cause__, KeyboardInterrupt):
                raise  # Ctrl-C during the import does not mean that the package is missing
            self._arcface: Any = None
            self.name, self.why = "onnxruntime", f"InsightFace cannot be imported ({exc}); preprocessing as stated"
            return
        self._arcface = ArcFaceONNX(model_file=str(source), session=self._session)
        guess = [float(self._arcface.input_mean)] * 3, [float(self._arcface.input_std)] * 3
        stated = list(preprocessing.mean), list(preprocessing.std)
        if preprocessing.color == "rgb" and guess == stated:
            self.name, self.why = "insightface.get_feat", "InsightFace guesses the preprocessing as stated"
            return
        self.name = "insightface.forward"
        self.why = f"InsightFace would take rgb, mean {guess[0][0]:g}, std {guess[1][0]:g}; given the stated ones"
        self._arcface.input_mean = np.array(stated[0], np.float32).reshape(1, 3, 1, 1)
        self._arcface.input_std = np.array(stated[1], np.float32).reshape(1, 3, 1, 1)

    def embed(self, face: np.ndarray) -> np.ndarray:
        """Raw embedding (D,) of one face uint8 (112,112,3) BGR; not normalised."""
        if self.name == "insightface.get_feat":
            return np.asarray(self._arcface.get_feat(face)).reshape(-1)
        if self.name == "insightface.forward":
            ordered = face[..., ::-1] if self._preprocessing.color == "rgb" else face
            return np.asarray(self._arcface.forward(ordered.transpose(2, 0, 1)[None].astype(np.float32))).reshape(-1)
        return np.asarray(self._session.run(None, {self._input: self._preprocessing.apply(face[None])})[0]).reshape(-1)


def reference_embeddings(reference: Reference, faces: np.ndarray, progress: OnCount | None = None) -> np.ndarray:
    """Raw embeddings (N,D) of the reference for faces uint8 (N,112,112,3) BGR.

    Raises:
        SourceRefused: the network cannot run on 112×112 crops, or returns the same embedding or NaN for all of them.
    """
    rows = []
    for face in faces:
        try:
            rows.append(reference.embed(face))
        except Exception as exc:  # pybind raises a class an error code
            raise SourceRefused(
                f"{reference.label}: ONNX Runtime cannot run it on a 112×112 crop: {first_line(exc)}. "
                "Export it for 112×112."
            ) from exc
        if progress:
            progress(len(rows), len(faces))
    raw = np.stack(rows)
    if not np.isfinite(raw).all() or not np.linalg.norm(raw, axis=1).all():
        raise SourceRefused(
            f"{reference.label} gives embeddings that are zero or contain NaN. Export it from an intact checkpoint."
        )
    if between_faces(raw) > 1 - 1e-7:
        raise SourceRefused(
            f"{reference.label} gives every face the same embedding: expected a trained recognition model. "
            "Check the export."
        )
    return raw


def prove(
    serving: Path,
    faces: np.ndarray,
    expected: np.ndarray,
    reference: Reference,
    faces_from: str,
    progress: OnCount | None = None,
    limits: Mapping[str, float] = DRIFT_LIMITS,
    contract: str | None = None,
) -> Proof:
    """Compare batch rows of the serving model with single runs, then judge it by the gate for fp32.

    With a contract id, also check the outputs `norm` and `contract`.

    Raises:
        ProofFailed: a batch row differs from the single run, the gate refuses it, or another output is wrong.
    """
    session = open_session(serving, threads=0, settings={}, label=serving.name, refused=SourceRefused)
    hostile = hostile_batches(faces)
    total = len(faces) + sum(len(batch) for batch in hostile) * 2
    done = 0

    def run(batch: np.ndarray) -> np.ndarray:
        nonlocal done
        try:
            answer = session.run([EMBEDDING_OUTPUT], {FACE_INPUT: batch})[0]
        except Exception as exc:  # pybind raises a class an error code
            raise ProofFailed(f"the serving model cannot run a batch of {len(batch)}: {first_line(exc)}.") from exc
        done += len(batch)
        if progress:
            progress(done, total)
        return answer

    difference = max([_row_difference(batch, run) for batch in hostile], default=0.0)
    got = np.concatenate([run(faces[i : i + 32]) for i in range(0, len(faces), 32)])
    verdict = judge_embeddings(expected, got, "fp32", limits)
    if verdict.report is None or not verdict.passed:
        raise ProofFailed(
            f"the serving model differs from {reference.name}: {verdict.why}. Nothing was written; please report the "
            "file's flavour."
        )
    if contract is not None:
        _prove_outputs(session, faces[:32], expected[:32], contract)
    return Proof(
        faces=len(faces),
        faces_from=faces_from,
        min_cosine=verdict.report.min_cosine,
        mean_cosine=verdict.report.mean_cosine,
        max_row_difference=difference,
        batches=list(BATCHES),
        between_faces=between_faces(expected),
        reference=reference.name,
        reference_why=reference.why,
    )


def _row_difference(batch: np.ndarray, run: Callable[[np.ndarray], np.ndarray]) -> float:
    """The largest difference between the rows of a batch and those of single runs.

    Raises:
        ProofFailed: it is too large.
    """
    rows, single = run(batch), np.concatenate([run(face[None]) for face in batch])
    # NaN in both is no difference here; the gate refuses it.
    off = np.abs(np.nan_to_num(rows, nan=2.0) - np.nan_to_num(single, nan=2.0)).max(axis=1)
    if not off.max() <= MAX_ROW_DIFFERENCE:
        raise ProofFailed(
            f"the faces of a batch affect each other: row {int(off.argmax())} of "
            f"{len(batch)} differs from its single run by {off.max():.3g}, expected ≤ {MAX_ROW_DIFFERENCE:g}. "
            "Export the model in inference mode with a dynamic batch."
        )
    return float(off.max())


def _prove_outputs(session: OnnxSession, faces: np.ndarray, expected: np.ndarray, contract: str) -> None:
    """Check that each row carries the contract's words, and the length of the reference's raw embedding."""
    try:
        norms, words = session.run([NORM_OUTPUT, CONTRACT_OUTPUT], {FACE_INPUT: faces})
    except Exception as exc:  # pybind raises a class an error code
        raise ProofFailed(f"the serving model does not return norm and contract: {first_line(exc)}.") from exc
    if not np.array_equal(words, np.tile(contract_words(contract), (len(faces), 1))):
        raise ProofFailed(f"the serving model does not return {contract[:32]} in every row of `contract`.")
    lengths = np.linalg.norm(expected, axis=1)
    off = np.abs(norms[:, 0] / lengths - 1)
    if not off.max() <= MAX_NORM_ERROR:
        raise ProofFailed(
            f"`norm` of face {int(off.argmax())} is {norms[off.argmax(), 0]:g}: expected {lengths[off.argmax()]:g}."
        )


def hostile_batches(faces: np.ndarray) -> list[np.ndarray]:
    """Batches of each size in `BATCHES`: faces, with all 0, all 255 and noise among them where they fit."""
    rng = np.random.default_rng(0)
    neighbours = [np.zeros(FACE_SHAPE), np.full(FACE_SHAPE, 255), rng.integers(0, 256, FACE_SHAPE)]
    batches = []
    for size in BATCHES:
        batch = faces[np.arange(size) % len(faces)].copy()
        for i, neighbour in enumerate(neighbours if size > len(neighbours) else neighbours[1:size]):
            batch[(2 * i + 1) % size] = neighbour.astype(np.uint8)
        batches.append(batch)
    return batches


def between_faces(embeddings: np.ndarray) -> float:
    """Mean cosine of different rows; 0 if there is only one row."""
    unit = embeddings.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    count = len(unit)
    return float((np.square(unit.sum(axis=0)).sum() - count) / (count * (count - 1))) if count > 1 else 0.0
