"""Measures rate and memory of a bulk job with generated faces and a trivial engine.

The engine costs almost nothing, so the job itself is measured: reading, hashing, writing and merging parts. The
faces are a sparse .npy file, which takes no disk space.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from arcface_clients.contract import FACE_SHAPE
from arcface_clients.faces.check import check_faces

_CHILD = "import sys; from arcface_tools.bulk import job; job(sys.argv[1], sys.argv[2], int(sys.argv[3]))"


class CopyingEngine:
    """The first bytes of a face, scaled: distinct rows for distinct faces, at the cost of a copy."""

    name = "copy"
    contract_id = "0" * 64

    def __init__(self, dim: int) -> None:
        """An engine for rows of `dim` numbers."""
        self.embedding_dim = dim

    def encode(self, faces: np.ndarray) -> np.ndarray:
        """Rows float32 (N,dim) of unit length."""
        checked = check_faces(faces)
        rows: np.ndarray = checked.reshape(len(checked), -1)[:, : self.embedding_dim].astype(np.float32) + 1
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows

    def ensure_ready(self) -> None:
        """Always ready."""

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def __enter__(self) -> CopyingEngine:
        """The engine itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: nothing is open."""


def run(count: int = 1_000_000, dim: int = 512, folder: Path | None = None) -> dict[str, Any]:
    """Embed `count` faces to Parquet in a separate process; needs twice `count` × `dim` × 4 bytes on disk."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, output = Path(scratch) / "faces.npy", Path(scratch) / "out.parquet"
        faces = np.lib.format.open_memmap(source, mode="w+", dtype=np.uint8, shape=(count, *FACE_SHAPE))
        del faces
        command = [sys.executable, "-c", _CHILD, str(source), str(output), str(dim)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return {**json.loads(answer), "output_mb": output.stat().st_size / 2**20}


def job(source: str, output: str, dim: int) -> None:
    """The job of the separate process; prints JSON."""
    import time

    from arcface_clients.bulk.job import Job
    from arcface_clients.bulk.on_threads import run_local
    from arcface_clients.bulk.spec import JobSpec

    engine = CopyingEngine(dim)
    start = time.perf_counter()
    with Job(output, JobSpec((source,), engine.contract_id, dim)) as held:
        run_local(held, [engine])
        done = held.finish()
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    figures = {
        "rows": done.rows,
        "refused": done.refused,
        "seconds": seconds,
        "faces_per_s": done.rows / seconds,
        "peak_mb": peak,
    }
    print(json.dumps(figures))
