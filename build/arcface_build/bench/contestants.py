"""Makes the variants for `measure_in_turns`: the bare runtime, InsightFace, and served models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from arcface_build.bench.interleaved import Variant, Work
from arcface_build.bench.perf_analyzer import Load, PerfAnalyzer
from arcface_build.bench.server import ServerUnderTest
from arcface_build.bench.triton_statistics import read_statistics, server_split
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT
from arcface_clients.engines.runtimes import open_session
from arcface_clients.errors import Missing
from arcface_clients.extras import importing


def in_process(name: str, encode: Callable[[np.ndarray], object], faces_bgr_u8: np.ndarray, batch: int) -> Variant:
    """A variant that calls `encode` in this process on batches of `batch` faces, cycling through `faces_bgr_u8`."""
    batches = _batches(faces_bgr_u8, batch)

    def sample(seconds: float) -> Work:
        latencies_s: list[float] = []
        started = time.perf_counter()
        while True:
            before = time.perf_counter()
            encode(batches[len(latencies_s) % len(batches)])
            now = time.perf_counter()
            latencies_s.append(now - before)
            if now - started >= seconds and (len(latencies_s) >= 2 or seconds == 0):
                break
        return Work(len(latencies_s) * batch, now - started, [1000 * s for s in latencies_s])

    return Variant(name, sample, about={"batch": batch})


def bare_session(onnx: Path, faces_bgr_u8: np.ndarray, batch: int, threads: int = 0, spinning: bool = True) -> Variant:
    """ONNX Runtime on a serving ONNX with default options: the baseline for serving.

    Args:
        onnx: serving ONNX (`face` uint8 → `embedding`).
        faces_bgr_u8: faces to embed, uint8 (N,112,112,3).
        batch: faces per call.
        threads: intra-op threads; 0 keeps ONNX Runtime's default (all cores).
        spinning: idle threads spin (ONNX Runtime's default); without, it keeps its speed beside other processes.
    """
    if not onnx.is_file():
        raise Missing(f"no serving ONNX at {onnx}. Next: arcface import demo, or name one: arcface bench --onnx FILE")
    import onnxruntime

    session = open_session(
        onnx, threads=threads, settings={"session.intra_op.allow_spinning": "1" if spinning else "0"}
    )
    variant = in_process(
        f"bare b{batch}", lambda faces: session.run([EMBEDDING_OUTPUT], {FACE_INPUT: faces}), faces_bgr_u8, batch
    )
    variant.about |= {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "threads": threads or "all cores",
        "spinning": spinning,
    }
    return variant


def insightface_sessions(source: Path, faces_bgr_u8: np.ndarray, batches: Sequence[int]) -> list[Variant]:
    """InsightFace's own `get_feat` on the unchanged source ONNX, one variant for each batch size the file allows.

    Called as in existing pipelines. Its preprocessing may differ from that of the weights, so only time is measured.
    """
    if not source.is_file():
        raise Missing(f"no source ONNX at {source}. Next: arcface import demo, or arcface import YOUR.onnx")
    with importing("the baseline"):
        from insightface.model_zoo.arcface_onnx import ArcFaceONNX
    session = open_session(source, threads=0, settings={})
    model = ArcFaceONNX(model_file=str(source), session=session)
    fixed = session.get_inputs()[0].shape[0]
    allowed = [batch for batch in batches if not isinstance(fixed, int) or batch == fixed]
    return [
        in_process(f"insightface b{batch}", lambda faces: model.get_feat(list(faces)), faces_bgr_u8, batch)
        for batch in allowed
    ]


def served(program: PerfAnalyzer, load: Load, target: ServerUnderTest, input_data: Path) -> Variant:
    """A variant measured with perf_analyzer through the server; each sample includes Triton's breakdown of its time.

    Args:
        program: the result of `find_perf_analyzer`.
        load: model, protocol, batch, concurrency.
        target: the server; its CPU time is reported if it runs on this host, its statistics are read over HTTP.
        input_data: file written by `write_input_data`.
    """
    url = target.url(load.protocol)
    requests_per_s = 0.0

    def sample(seconds: float) -> Work:
        nonlocal requests_per_s
        before = read_statistics(target.http_url, target.access)
        count = math.ceil(requests_per_s * seconds)
        work = program.measure(load, url, input_data, count, requests_per_s, access=target.options())
        work.details["server"] = server_split(before, read_statistics(target.http_url, target.access))
        requests_per_s = work.faces_per_s / load.batch
        return work

    pids = (target.pid,) if target.pid else ()
    return Variant(load.name, sample, "server", pids, {**asdict(load), "url": url})


def _batches(faces_bgr_u8: np.ndarray, batch: int) -> list[np.ndarray]:
    """At least one whole batch; faces are repeated if there are too few."""
    count = max(1, len(faces_bgr_u8) // batch)
    index = np.arange(count * batch) % len(faces_bgr_u8)
    return [np.ascontiguousarray(faces_bgr_u8[part]) for part in index.reshape(count, batch)]
