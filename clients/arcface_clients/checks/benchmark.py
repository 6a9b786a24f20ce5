"""Measures throughput, latency percentiles and memory of an engine (of a server under load: arcface bench)."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from arcface_clients.engines.protocol import EmbeddingEngine
from arcface_clients.errors import ConfigError
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.gpu.cards import own_vram_bytes

_DISTINCT_FACES = 64  # synthesising a face takes longer than embedding it on a GPU, so batches repeat these


@dataclass(frozen=True)
class BenchmarkReport:
    """Result of `benchmark_embedder`; latencies are of one `encode` of `batch_size` faces."""

    faces: int
    batch_size: int
    warmup_batches: int
    seconds: float
    faces_per_s: float
    cpu_ms_per_face: float
    latency_mean_ms: float
    latency_p50_ms: float
    latency_p90_ms: float
    latency_p99_ms: float
    latency_max_ms: float
    peak_rss_bytes: int
    vram_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)


def benchmark_embedder(
    embedder: EmbeddingEngine, num_faces: int = 256, batch_size: int = 32, warmup_batches: int = 3
) -> BenchmarkReport:
    """Time `encode` on synthetic faces, one batch after another, from one thread.

    CPU time is this process's and excludes a server's. VRAM is what nvidia-smi lists for this process, None if it lists
    nothing. Peak RSS is since the start of the process.

    Raises:
        ConfigError: a count is out of range.
        BackendUnavailable, InferenceFailed: from the engine.
    """
    if num_faces < 1 or batch_size < 1 or warmup_batches < 0:
        raise ConfigError(
            f"expected num_faces ≥ 1, batch_size ≥ 1, warmup_batches ≥ 0, "
            f"got {num_faces}, {batch_size}, {warmup_batches}."
        )
    faces = synthetic_faces(min(_DISTINCT_FACES, max(num_faces, batch_size)))
    pool = np.resize(faces, (max(len(faces), batch_size), *faces.shape[1:]))
    for _ in range(warmup_batches):
        embedder.encode(pool[:batch_size])
    sizes = [min(batch_size, num_faces - done) for done in range(0, num_faces, batch_size)]
    latencies_s = []
    cpu = time.process_time()
    start = time.perf_counter()
    for size in sizes:
        before = time.perf_counter()
        embedder.encode(pool[:size])
        latencies_s.append(time.perf_counter() - before)
    seconds = time.perf_counter() - start
    cpu_s = time.process_time() - cpu
    full = [s for s, size in zip(latencies_s, sizes, strict=True) if size == batch_size] or latencies_s
    p50, p90, p99 = np.percentile(full, [50, 90, 99]) * 1e3
    return BenchmarkReport(
        faces=num_faces,
        batch_size=batch_size,
        warmup_batches=warmup_batches,
        seconds=seconds,
        faces_per_s=num_faces / seconds,
        cpu_ms_per_face=cpu_s / num_faces * 1e3,
        latency_mean_ms=float(np.mean(full) * 1e3),
        latency_p50_ms=float(p50),
        latency_p90_ms=float(p90),
        latency_p99_ms=float(p99),
        latency_max_ms=max(full) * 1e3,
        peak_rss_bytes=peak_rss_bytes(),
        vram_bytes=own_vram_bytes(),
    )


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since its start (getrusage: kilobytes on Linux, bytes on macOS)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
