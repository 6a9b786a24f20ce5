"""The Python with torch of a GPU host, seldom the one with TensorRT: found, and run as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build import bench
from arcface_build.bench.torch_export import export_graph
from arcface_clients.errors import Missing


def find_torch_python(given: str | None) -> str:
    """A Python whose torch sees a GPU: the given one, else the first on PATH, in /usr/bin or in /opt/conda.

    Raises:
        Missing: there is none; the message has the error of each.
    """
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/bin", "/usr/local/bin", "/opt/conda/bin"]
    found = [sys.executable, *(str(Path(folder) / "python3") for folder in folders if folder)]
    said: dict[str, str] = {}
    for python in [given] if given else dict.fromkeys(found):
        if python in said or not (given or os.access(python, os.X_OK)):
            continue
        program = "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'its torch sees no GPU')"
        try:
            done = subprocess.run(
                [python, "-c", program],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                env=_clean_environment(),
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            said[python] = str(exc)
            continue
        if done.returncode == 0:
            return python
        said[python] = (done.stderr.strip().splitlines() or ["no reason"])[-1]
    tried = "; ".join(f"{python}: {why}" for python, why in said.items())
    raise Missing(f"no Python here has torch with CUDA ({tried}). Name one: --torch-python")


def told_by(
    python: str, script: Path, arguments: Sequence[str], log: Path, timeout_s: float
) -> tuple[list[dict[str, Any]], str]:
    """The JSON lines that a script of ours printed, and why it stopped early ("": it did not).

    Output from before a timeout or a crash is kept; standard error is in `log`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    said, stopped = log.with_suffix(".jsonl"), ""
    with said.open("w") as out, log.open("w") as errors:
        try:
            done = subprocess.run(
                [python, str(script), *arguments],
                stdout=out,
                stderr=errors,
                timeout=timeout_s,
                check=False,
                env=_clean_environment(),
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            stopped = f"{type(exc).__name__} after {timeout_s:.0f} s"
        else:
            if done.returncode:
                stopped = (log.read_text().strip().splitlines() or ["no reason"])[-1]
    lines = []
    for line in said.read_text().splitlines():
        with suppress(ValueError):  # the last line may be incomplete
            lines.append(json.loads(line))
    return lines, stopped


def torch_baseline(
    python: str,
    onnx: Path,
    faces: np.ndarray,
    reference: np.ndarray,
    batches: Sequence[int],
    seconds: float,
    folder: Path,
    timeout_s: float,
    device: str = "cuda",
    warm_up_s: float = 0.5,
) -> dict[str, Any]:
    """PyTorch on a network: its versions, `ways` as torch_baseline.py prints them, and why it stopped.

    Raises:
        Missing: nothing was measured, for instance because the baseline lacks an operator of the graph.
    """
    folder.mkdir(parents=True, exist_ok=True)
    export_graph(onnx, folder)
    np.save(folder / "faces.npy", faces)
    np.save(folder / "reference.npy", reference)
    script = Path(bench.__file__).with_name("torch_baseline.py")
    arguments = [str(folder), ",".join(map(str, batches)), str(seconds), device, str(warm_up_s)]
    lines, stopped = told_by(python, script, arguments, folder / "torch.log", timeout_s)
    result: dict[str, Any] = {"ways": [line for line in lines if "kind" in line]}
    for line in lines:
        result |= {} if "kind" in line else line
    if not any("batches" in way for way in result["ways"]):
        errors_said = [way["error"] for way in result["ways"] if "error" in way]
        raise Missing(f"the PyTorch baseline did not run: {stopped or (errors_said or ['no reason'])[0]}")
    return result | ({"stopped": stopped} if stopped else {})


def _clean_environment() -> dict[str, str]:
    """An environment in which the other Python does not see this one's packages."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH")}
