"""Times candidates in this process, about a second each, in turns: at batch 1 and at a full batch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from arcface_build.variants.candidates import Candidate
from arcface_build.variants.speeds import Speed, SpeedTable
from arcface_clients.arrays import FaceArray
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT
from arcface_clients.engines.import_manifest import read_import_manifest
from arcface_clients.engines.runtimes import OnnxSession, first_line, open_session
from arcface_clients.errors import GateFailed
from arcface_clients.evidence.gate import judge_embeddings
from arcface_clients.evidence.golden import golden_faces, golden_rows
from arcface_clients.faces.synthetic import synthetic_faces

ROUNDS = 5
SAMPLE_S = 0.1
SMALLEST_FULL_BATCH, LARGEST_FULL_BATCH = 4, 64  # 64: max_batch_size of arcface_onnx
_DIFFERENT_FACES = 8
_ANY_DRIFT = 2.0  # whoever chooses judges it, by the limit of the day


def measure(
    model_dir: Path,
    found: Sequence[Candidate],
    missing: Sequence[Candidate] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> SpeedTable:
    """Measure each candidate in each round, in rotating order: a disturbance hits neighbours alike.

    Each of `found` embeds the golden faces: its gate, if it had one, may have been judged on another CPU. They are
    compared with the reference's rows; where an older import kept none, with those of the first candidate.

    The full batch is what the first candidate embeds in a tenth of a second, from 4 to 64 faces: on a CPU larger
    batches gain little, and a call of many seconds could not be repeated.

    Args:
        model_dir: models/NAME/.
        found: from `candidates`; fp32 in ONNX Runtime first, which the import proved.
        missing: from `untried`; nobody asked for them, so one that fails is left out without a word.
        clock: seconds; `time.perf_counter`.
    """
    faces = synthetic_faces(_DIFFERENT_FACES)
    sessions: dict[str, OnnxSession] = {}
    failed: dict[str, str] = {}
    drifts: dict[str, float] = {}
    expected = golden_rows(read_import_manifest(model_dir).golden)
    for candidate in found:
        try:
            session = _opened(model_dir, candidate)
            rows = _embed(session, golden_faces())
            if expected is None and candidate is found[0]:
                expected = rows
            drifts[candidate.name] = _drift(expected, rows)
        except Exception as exc:  # whatever it is, the others can be served
            failed[candidate.name] = first_line(exc)
            continue
        sessions[candidate.name] = session
    for candidate in missing:
        with contextlib.suppress(Exception):
            sessions[candidate.name] = _opened(model_dir, candidate)
            _embed(sessions[candidate.name], faces)
    if not sessions:
        return SpeedTable(SMALLEST_FULL_BATCH, (), failed)
    one = faces[:1]
    full = _full_batch(_rate(next(iter(sessions.values())), one, 0, clock), faces)
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    for session in sessions.values():
        _embed(session, full)  # a runtime compiles for a shape at its first call
    turn = list(sessions)
    for _ in range(ROUNDS):
        for name in turn:
            rounds[name].append(
                (_rate(sessions[name], one, SAMPLE_S, clock), _rate(sessions[name], full, SAMPLE_S, clock))
            )
        turn = [*turn[1:], turn[0]]
    speeds = [
        Speed(
            candidate.precision,
            candidate.runtime,
            candidate.sha256,
            tuple(rate for rate, _ in rounds[candidate.name]),
            tuple(rate for _, rate in rounds[candidate.name]),
            drifts.get(candidate.name),
            candidate.form,
        )
        for candidate in (*found, *missing)
        if candidate.name in sessions
    ]
    return SpeedTable(len(full), tuple(speeds), failed)


def drift_here(model_dir: Path, candidate: Candidate) -> float | None:
    """1 − cosine of the worst golden face, of what this host makes of a candidate; None if the import kept no rows.

    Raises:
        GateFailed: these are no embeddings.
        DependencyMissing, WrongUse: it cannot be opened.
    """
    expected = golden_rows(read_import_manifest(model_dir).golden)
    if expected is None:
        return None
    return _drift(expected, _embed(_opened(model_dir, candidate), golden_faces()))


def _opened(model_dir: Path, candidate: Candidate) -> OnnxSession:
    return open_session(
        candidate.made() if candidate.made else model_dir / candidate.file, candidate.runtime, label=candidate.file
    )


def _drift(expected: np.ndarray | None, embeddings: np.ndarray) -> float:
    """1 − cosine of the worst face.

    Raises:
        GateFailed: these are no embeddings, or there is nothing to compare them with.
    """
    if expected is None:
        raise GateFailed("there is nothing to compare it with: fp32 in ONNX Runtime could not be loaded")
    verdict = judge_embeddings(expected, embeddings, "fp32", {"fp32": _ANY_DRIFT})
    if not verdict.passed:
        raise GateFailed(verdict.why)
    return verdict.max_drift


def _full_batch(faces_per_s: float, faces: FaceArray) -> FaceArray:
    count = SMALLEST_FULL_BATCH
    while 2 * count <= min(LARGEST_FULL_BATCH, SAMPLE_S * faces_per_s):
        count *= 2
    return np.resize(faces, (count, *faces.shape[1:]))


def _rate(session: OnnxSession, faces: FaceArray, at_least_s: float, clock: Callable[[], float]) -> float:
    """faces/s over whole calls that take at least this long together."""
    calls, started = 0, clock()
    while True:
        _embed(session, faces)
        calls += 1
        passed_s = clock() - started
        if passed_s >= at_least_s:
            return calls * len(faces) / max(passed_s, 1e-9)


def _embed(session: OnnxSession, faces: FaceArray) -> np.ndarray:
    return session.run([EMBEDDING_OUTPUT], {FACE_INPUT: faces})[0]
