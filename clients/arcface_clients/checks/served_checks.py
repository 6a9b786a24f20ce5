"""What a running server shows whoever calls it: its drift from golden rows, its queue, and when it last answered."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from arcface_clients.checks.report import Check
from arcface_clients.errors import ArcFaceError, BackendUnavailable
from arcface_clients.evidence.golden import golden_faces, judge_golden
from arcface_clients.photos.embedder import PhotoEmbedder
from arcface_clients.triton.embedder import TritonEmbedder
from arcface_clients.triton.transports.statistics import model_statistics

if TYPE_CHECKING:
    from arcface_clients.config.schema import EmbeddingConfig
    from arcface_clients.triton.served import ServedModel

TIMEOUT_S = 3.0
PROBES = 16  # several for each process of photo_faces


def served_checks(settings: EmbeddingConfig, timeout_s: float = TIMEOUT_S) -> list[Check]:
    """Drift, queue and answers of the model at triton.url; `absent` where no server answers, which `server` reports."""
    options = {**vars(settings.triton), "timeout_s": timeout_s, "retry_for_s": 0.0, "shared_memory": False}
    try:
        with TritonEmbedder(**options) as embedder:
            served = embedder.ensure_ready()
            # Before our own faces are counted among the answers.
            before = model_statistics(settings.triton.connection(), served.leaf, timeout_s)
            started = time.perf_counter()
            drift = check_drift(embedder, served, settings)
            took_ms = 1000 * (time.perf_counter() - started)
    except BackendUnavailable as exc:
        return [Check(name, "absent", f"not asked: {exc}") for name in ("drift", "queue", "answers")]
    if before.answered:
        age_s = max(time.time() - before.last_s, 0.0)
        answers = f"{before.answered} before, the last {age_s:.0f} s ago, {before.failed} failed"
    else:
        answers = "none before"
    waited = f"; a request waited {before.mean_queue_ms:.1f} ms in the mean" if before.answered else ""
    return [
        drift,
        check_queue(served, waited),
        Check("answers", "ok", f"{len(golden_faces())} faces in {took_ms:.0f} ms; {answers}"),
    ]


def check_photos(settings: EmbeddingConfig, timeout_s: float = TIMEOUT_S) -> Check:
    """Whether every process of `photo_faces` answers: Triton calls the model ready as long as one was started.

    So many requests at a time reach each of them that is idle.
    """
    options = {**vars(settings.triton), "model": "photo_faces", "timeout_s": timeout_s, "retry_for_s": 0.0}
    with PhotoEmbedder(**options) as photos, ThreadPoolExecutor(PROBES) as askers:
        try:
            photos.ensure_ready()
        except BackendUnavailable as exc:
            return Check("photos", "absent", str(exc))
        errors = [asked.exception() for asked in [askers.submit(photos.probe) for _ in range(PROBES)]]
        failed = [error for error in errors if error is not None]
        detector_id = None if failed else photos.pin_detector()
    if failed:
        return Check(
            "photos",
            "problem",
            f"{len(failed)} of {PROBES} requests to photo_faces were not answered: {failed[0]}",
            "start the server again; arcface serve does that by itself when one of its processes is lost",
        )
    by = f"; {detector_id} finds the faces" if detector_id else ""
    return Check("photos", "ok", f"{PROBES} of {PROBES} requests to photo_faces were answered{by}")


def check_drift(embedder: TritonEmbedder, served: ServedModel, settings: EmbeddingConfig) -> Check:
    """The served model's embeddings of the golden faces beside what the reference gave for them at the import."""
    precision = served.precision or "fp32"
    limits = settings.comparison.max_drift.model_dump()
    try:
        verdict = judge_golden(served.golden, embedder.encode, precision, limits)
    except BackendUnavailable:
        raise
    except ArcFaceError as exc:
        return Check("drift", "problem", str(exc), "see the server's log; go back: arcface rollback")
    if verdict is None:
        return Check(
            "drift",
            "absent",
            f"{served.leaf} has no golden rows: it was imported by an older version, or served without the overlay",
            "arcface import SOURCE, and serve it by: arcface serve (or --model-config-name onnx)",
        )
    if not verdict.passed:
        fix = "which faces: arcface parity, arcface compare; go back: arcface rollback"
        return Check("drift", "problem", f"golden rows of the reference: {verdict.why}", fix)
    found = f"{verdict.faces} golden rows of the reference: drift {max(verdict.max_drift, 0):.1e} ≤ {verdict.limit:g}"
    return Check("drift", "ok", f"{found} ({precision})")


def check_queue(served: ServedModel, waited: str = "") -> Check:
    """How many requests may wait for the model that computes. Either is a choice with a price: docs/operations.md."""
    found = f"requests wait for {served.leaf} without a bound on their number"
    if served.max_queue_size:
        found = (
            f"at most {served.max_queue_size} requests wait for {served.leaf}; a lone call may wait 0.5 s for Triton"
        )
    return Check("queue", "ok", found + waited)
