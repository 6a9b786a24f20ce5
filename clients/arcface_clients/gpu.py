"""NVIDIA GPUs of this host as nvidia-smi tells them: SM, driver and memory; an empty list where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

_FIELDS = "name,compute_cap,driver_version,memory.total,memory.used"


@dataclass(frozen=True)
class Gpu:
    """One GPU; `sm` as in "8.6"."""

    name: str
    sm: str
    driver: str
    memory_total_bytes: int
    memory_used_bytes: int

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)


def find_gpus() -> list[Gpu]:
    """All GPUs in nvidia-smi's order; empty where there is no driver or no GPU."""
    return parse_gpus(_ask_nvidia_smi(f"--query-gpu={_FIELDS}"))


def parse_gpus(csv: str) -> list[Gpu]:
    """GPUs from `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`, memory in MiB; odd lines are left out."""
    gpus = []
    for line in csv.strip().splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 5 and all(part.isdigit() for part in parts[3:]):
            gpus.append(Gpu(*parts[:3], int(parts[3]) << 20, int(parts[4]) << 20))
    return gpus


def own_vram_bytes() -> int | None:
    """GPU memory of this process; None where nvidia-smi does not list it (no GPU, or another PID namespace)."""
    listed = _ask_nvidia_smi("--query-compute-apps=pid,used_memory")
    used = [line.split(",") for line in listed.strip().splitlines() if line.count(",") == 1]
    mine = [int(mib) << 20 for pid, mib in used if pid.strip() == str(os.getpid()) and mib.strip().isdigit()]
    return sum(mine) if mine else None


def _ask_nvidia_smi(query: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        answer = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""
