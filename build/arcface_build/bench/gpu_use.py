"""Mean load and peak memory of the GPU while a sample was measured, from nvidia-smi."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_QUERY = ("--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "200")


@contextmanager
def watch_gpu() -> Iterator[dict[str, Any]]:
    """Fill `utilization_percent` and `memory_mib` on exit; stays empty without nvidia-smi or a GPU."""
    use: dict[str, Any] = {}
    program = shutil.which("nvidia-smi")
    if program is None:
        yield use
        return
    with subprocess.Popen([program, *_QUERY], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as reader:
        try:
            yield use
        finally:
            reader.terminate()
        use.update(gpu_use(reader.stdout.read() if reader.stdout else ""))


def gpu_use(readings: str) -> dict[str, float]:
    """Mean utilisation in percent and peak memory in MiB from lines such as "37, 1024"; other lines are ignored."""
    rows = [[part.strip() for part in line.split(",")] for line in readings.splitlines()]
    numbers = [(float(a), float(b)) for a, b in (row for row in rows if len(row) == 2) if a.isdigit() and b.isdigit()]
    if not numbers:
        return {}
    return {
        "utilization_percent": sum(load for load, _ in numbers) / len(numbers),
        "memory_mib": max(memory for _, memory in numbers),
    }
