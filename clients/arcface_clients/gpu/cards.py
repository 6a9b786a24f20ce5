"""The NVIDIA GPUs of this host as nvidia-smi reports them (SM, driver, memory); needs no Python package."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from arcface_clients.errors import DependencyMissing

_FIELDS = "index,name,compute_cap,driver_version,memory.total,memory.used"
_TIMEOUT_S = 30


@dataclass(frozen=True)
class Gpu:
    """One GPU; `sm` as in "8.6". Memory is 0 if it is shared with the host (nvidia-smi says [N/A]).

    cuda: the newest CUDA version that the driver supports, or None if nvidia-smi does not say.
    """

    index: int
    name: str
    sm: str
    driver: str
    memory_bytes: int
    memory_used_bytes: int
    cuda: str | None = None


def find_gpus() -> list[Gpu]:
    """All GPUs that this process may use (CUDA_VISIBLE_DEVICES), at least one.

    Raises:
        DependencyMissing: no nvidia-smi, no driver, or no GPU; falls back.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        raise DependencyMissing(
            "no NVIDIA GPU on this host: nvidia-smi is not installed. Run this on a GPU host, or name the SM: "
            "arcface plan pull --sm 8.6"
        )
    try:
        answer = _run(program, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
        banner = _run(program).stdout
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise DependencyMissing(f"nvidia-smi does not answer ({exc}). Check the driver: nvidia-smi") from exc
    if answer.returncode != 0:
        said = (answer.stdout + answer.stderr).strip().splitlines()
        raise DependencyMissing(
            f"no usable NVIDIA GPU: nvidia-smi says {said[0] if said else answer.returncode!r}. Check the driver."
        )
    gpus = visible(parse_gpus(answer.stdout, banner), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not gpus:
        raise DependencyMissing(
            "no NVIDIA GPU on this host: nvidia-smi lists none. Check CUDA_VISIBLE_DEVICES and the container's --gpus"
        )
    return gpus


def parse_gpus(csv: str, banner: str = "") -> list[Gpu]:
    """Parse `nvidia-smi --query-gpu=… --format=csv,noheader,nounits` (memory in MiB) and its plain banner."""
    cuda = banner.partition("CUDA Version:")[2].split()
    gpus = []
    for line in csv.strip().splitlines():
        index, name, sm, driver, total, used = (part.strip() for part in line.split(","))
        gpus.append(Gpu(int(index), name, sm, driver, _bytes(total), _bytes(used), cuda[0] if cuda else None))
    return gpus


def _bytes(mib: str) -> int:
    return int(float(mib)) << 20 if mib.replace(".", "").isdigit() else 0


def visible(gpus: list[Gpu], cuda_visible_devices: str | None) -> list[Gpu]:
    """The GPUs visible to a CUDA process, in CUDA's order, if indices are listed; UUIDs are left to CUDA itself."""
    wanted = [part.strip() for part in (cuda_visible_devices or "").split(",")]
    if cuda_visible_devices is None or not all(part.lstrip("-").isdigit() for part in wanted if part):
        return gpus
    by_index = {str(gpu.index): gpu for gpu in gpus}
    return [by_index[part] for part in wanted if part in by_index]


def own_vram_bytes() -> int | None:
    """GPU memory used by this process; None if nvidia-smi does not list it (no GPU, or another PID namespace)."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        answer = _run(program, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [[part.strip() for part in line.split(",")] for line in answer.stdout.splitlines()]
    mine = [int(row[1]) << 20 for row in rows if len(row) == 2 and row[0] == str(os.getpid()) and row[1].isdigit()]
    return sum(mine) if mine else None


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
