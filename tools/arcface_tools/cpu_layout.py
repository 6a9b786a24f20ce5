"""Measure the CPU form: demo networks in, a JSON with its throughput against the serving ONNX's out.

Run: python -m arcface_tools.cpu_layout docs/measured/cpu_layout.json
Variants take turns within one run, and CPU time is compared beside wall time: other processes disturb the latter.
The OpenVINO rows need the onnxruntime-openvino wheel; without it they are left out.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import onnxruntime

from arcface_build.graph.blocked_layout import blocked_layout
from arcface_build.imports.demo import build_demo
from arcface_build.imports.importing import to_serving
from arcface_clients.contract import Preprocessing
from arcface_clients.faces.synthetic import synthetic_faces

BATCH = 8
THREADS = len(os.sched_getaffinity(0))
ROUNDS = {"mobile": 40, "r18": 15, "r50": 8, "r100": 6}


def main(target: Path) -> None:
    """Measure every architecture and write the JSON."""
    result = {
        "command": "python scripts/measure_cpu_layout.py docs/measured/cpu_layout.json",
        "measured": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "cpu": _cpu(),
        "threads": THREADS,
        "batch": BATCH,
        "load_before": os.getloadavg()[0],
        "onnxruntime": onnxruntime.__version__,
        "meaning": "throughput of the CPU form over that of the serving ONNX on the same provider; median of ratios of "
        "neighbouring runs, with quartiles",
        "networks": {arch: measure(arch) for arch in ROUNDS},
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")


def measure(arch: str) -> dict:
    """Ratios of one network on each provider, and how far the two forms are apart."""
    serving, _ = to_serving(build_demo(arch), Preprocessing(), 512, "0" * 64)
    plain = serving.SerializeToString()
    blocked = blocked_layout(serving).model.SerializeToString()
    del serving
    faces = synthetic_faces(BATCH)
    found = {}
    for provider in ("cpu", "openvino f32", "openvino bf16"):
        if provider != "cpu" and "OpenVINOExecutionProvider" not in onnxruntime.get_available_providers():
            continue
        sessions = [_session(data, provider) for data in (plain, blocked)]
        rows = [session.run(None, {"face": faces})[0] for session in sessions]
        times = np.array([[_times(session, faces) for session in sessions] for _ in range(ROUNDS[arch])])
        ratios = times[:, 0] / times[:, 1]  # (rounds, [cpu, wall])
        found[provider] = {
            "ratio_cpu_time": _spread(ratios[:, 0]),
            "ratio_wall_time": _spread(ratios[:, 1]),
            "cpu_ms_per_face": round(float(np.median(times[:, 0, 0])) * 1e3 / BATCH, 2),
            "max_difference": float(np.abs(rows[0] - rows[1]).max()),
        }
        print(arch, provider, found[provider], file=sys.stderr)
    return found


def _session(data: bytes, provider: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if provider == "cpu":
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    config = {"CPU": {"INFERENCE_PRECISION_HINT": provider.split()[1], "INFERENCE_NUM_THREADS": THREADS}}
    settings = {"device_type": "CPU", "load_config": json.dumps(config)}
    session = onnxruntime.InferenceSession(data, options, providers=[("OpenVINOExecutionProvider", settings)])
    if session.get_providers()[0] != "OpenVINOExecutionProvider":
        raise SystemExit(f"OpenVINO did not take {provider}")
    return session


def _times(session: onnxruntime.InferenceSession, faces: np.ndarray) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    session.run(None, {"face": faces})
    return time.process_time() - cpu, time.perf_counter() - wall


def _spread(ratios: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return {"median": round(middle, 3), "q25": round(low, 3), "q75": round(high, 3)}


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
