"""Times candidates, each in a process of its own, about a second each, in turns: at batch 1 and at a full batch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from arcface_build.host_memory import server_memory_limit
from arcface_build.variants.candidates import Candidate
from arcface_build.variants.session_process import SessionProcess
from arcface_build.variants.speeds import Speed, SpeedTable
from arcface_clients.arrays import FaceArray
from arcface_clients.engines.import_manifest import read_import_manifest
from arcface_clients.engines.runtimes import first_line
from arcface_clients.errors import GateFailed, OutOfMemory
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
    """
    with contextlib.ExitStack() as opened:
        return _measured(model_dir, found, missing, opened)


def _measured(
    model_dir: Path, found: Sequence[Candidate], missing: Sequence[Candidate], opened: contextlib.ExitStack
) -> SpeedTable:
    faces = synthetic_faces(_DIFFERENT_FACES)
    sessions: dict[str, SessionProcess] = {}
    failed: dict[str, str] = {}
    too_large: dict[str, int] = {}
    drifts: dict[str, float] = {}
    expected = golden_rows(read_import_manifest(model_dir).golden)
    for candidate in found:
        try:
            session, rows = _tried(model_dir, candidate)
            opened.callback(session.close)
            if expected is None and candidate is found[0]:
                expected = rows
            drifts[candidate.name] = _drift(expected, rows)
        except OutOfMemory:
            too_large[candidate.name] = server_memory_limit()
        except Exception as exc:  # whatever it is, the others can be served
            failed[candidate.name] = first_line(exc)
        else:
            sessions[candidate.name] = session
    for candidate in missing:
        with contextlib.suppress(Exception):
            session = opened.enter_context(closing(_opened(model_dir, candidate)))
            session.embed(faces)
            sessions[candidate.name] = session
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    turn, full = list(sessions), faces[:0]
    for number in range(ROUNDS):
        for name in [one for one in turn if one in sessions]:
            session = sessions[name]
            try:
                if not len(full):
                    full = _full_batch(session.rate(faces[:1], 0), faces)
                if number == 0:
                    session.embed(full)  # a runtime compiles for a shape at its first call
                rounds[name].append((session.rate(faces[:1], SAMPLE_S), session.rate(full, SAMPLE_S)))
            except Exception as exc:  # together they may need more memory than there is: one alone may not
                sessions.pop(name).close()
                failed[name] = first_line(exc)
        turn = turn[1:] + turn[:1]
    speeds = [
        _speed(one, rounds[one.name], drifts, sessions[one.name].memory)
        for one in (*found, *missing)
        if one.name in sessions
    ]
    speeds += [_speed(one, [], {}, too_large[one.name]) for one in found if one.name in too_large]
    asked_for = {one.name for one in found}
    return SpeedTable(
        len(full) or SMALLEST_FULL_BATCH,
        tuple(speeds),
        {name: why for name, why in failed.items() if name in asked_for},
    )


def _speed(
    candidate: Candidate, rounds: Sequence[tuple[float, float]], drifts: Mapping[str, float], memory: int
) -> Speed:
    return Speed(
        candidate.precision,
        candidate.runtime,
        candidate.sha256,
        tuple(rate for rate, _ in rounds),
        tuple(rate for _, rate in rounds),
        drifts.get(candidate.name),
        candidate.form,
        memory,
    )


def drift_here(model_dir: Path, candidate: Candidate) -> float | None:
    """1 − cosine of the worst golden face, of what this host makes of a candidate; None if the import kept no rows.

    Raises:
        GateFailed: these are no embeddings.
        OutOfMemory: a process of a server may not take what it needs.
        DependencyMissing, WrongUse: it cannot be opened.
    """
    expected = golden_rows(read_import_manifest(model_dir).golden)
    if expected is None:
        return None
    session, rows = _tried(model_dir, candidate)
    session.close()
    return _drift(expected, rows)


def _opened(model_dir: Path, candidate: Candidate) -> SessionProcess:
    return SessionProcess(candidate.made or model_dir / candidate.file, candidate.runtime, candidate.file)


def _tried(model_dir: Path, candidate: Candidate) -> tuple[SessionProcess, np.ndarray]:
    """A candidate's session, and its embeddings of the golden faces; what cannot embed them keeps no memory."""
    session = _opened(model_dir, candidate)
    try:
        return session, _warmed(session)
    except BaseException:
        session.close()
        raise


def _warmed(session: SessionProcess) -> np.ndarray:
    """Embeddings of the golden faces, after a batch as large as a server's warm-up has: most memory is for that."""
    faces = golden_faces()
    session.embed(np.resize(faces, (LARGEST_FULL_BATCH, *faces.shape[1:])))
    return session.embed(faces)


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
