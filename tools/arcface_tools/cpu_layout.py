"""Measures throughput of demo networks in the CPU layout against their serving ONNX.

Run: python -m arcface_tools.cpu_layout docs/measured/cpu_layout.json
Variants are interleaved within one run, and CPU time is compared as well as wall time, which other processes disturb.
The OpenVINO rows need the onnxruntime-openvino wheel; without it they are omitted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import onnxruntime

from arcface_build.graph.blocked_layout import blocked_layout
from arcface_build.imports.demo import build_demo
from arcface_build.imports.forms import to_serving
from arcface_clients.contract import Preprocessing
from arcface_clients.engines.runtimes import (
    OnnxSession,
    available_cores,
    cpu_flags,
    cpu_name,
    cpu_runtimes,
    has_openvino,
    open_session,
)
from arcface_clients.faces.synthetic import synthetic_faces

BATCH = 8
ROUNDS = {"mobile": 40, "r18": 15, "r50": 8, "r100": 6}


def main(target: Path) -> None:
    """Measure every architecture and write the JSON."""
    result = {
        "command": "python -m arcface_tools.cpu_layout docs/measured/cpu_layout.json",
        "measured": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "cpu": cpu_name(),
        "threads": available_cores(),
        "batch": BATCH,
        "load_before": os.getloadavg()[0],
        "onnxruntime": onnxruntime.__version__,
        "meaning": "throughput of the CPU form over that of the serving ONNX in the same runtime; median of ratios of "
        "neighbouring runs, with quartiles",
        "networks": {arch: measure(arch) for arch in ROUNDS},
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")


def measure(arch: str) -> dict:
    """Ratios of one network on each runtime, and the difference between the two layouts."""
    serving, _ = to_serving(build_demo(arch), Preprocessing(), 512, "0" * 64)
    plain = serving.SerializeToString()
    blocked = blocked_layout(serving).model.SerializeToString()
    del serving
    faces = synthetic_faces(BATCH)
    found = {}
    for runtime in cpu_runtimes(cpu_flags(), has_openvino()):
        sessions = [open_session(data, runtime) for data in (plain, blocked)]
        rows = [session.run(None, {"face": faces})[0] for session in sessions]
        times = np.array([[_times(session, faces) for session in sessions] for _ in range(ROUNDS[arch])])
        ratios = times[:, 0] / times[:, 1]  # (rounds, [cpu, wall])
        found[runtime] = {
            "ratio_cpu_time": _spread(ratios[:, 0]),
            "ratio_wall_time": _spread(ratios[:, 1]),
            "cpu_ms_per_face": round(float(np.median(times[:, 0, 0])) * 1e3 / BATCH, 2),
            "max_difference": float(np.abs(rows[0] - rows[1]).max()),
        }
        print(arch, runtime, found[runtime], file=sys.stderr)
    return found


def _times(session: OnnxSession, faces: np.ndarray) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    session.run(None, {"face": faces})
    return time.process_time() - cpu, time.perf_counter() - wall


def _spread(ratios: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return {"median": round(middle, 3), "q25": round(low, 3), "q75": round(high, 3)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
