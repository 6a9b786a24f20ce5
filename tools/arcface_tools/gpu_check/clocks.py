"""Records the GPU's clocks, power, temperature and memory during a run, with a single nvidia-smi process."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time
from types import TracebackType

FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "memory.used", "utilization.gpu")
EVERY_MS = 100


class GpuLog:
    """A context manager that reads every 100 ms; empty if there is no nvidia-smi."""

    def __init__(self) -> None:
        """Set up; nothing is started yet."""
        self._readings: list[tuple[float, tuple[float, ...]]] = []
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> GpuLog:
        """Start reading."""
        if program := shutil.which("nvidia-smi"):
            query = [
                f"--query-gpu={','.join(FIELDS)}",
                "--format=csv,noheader,nounits",
                "-i",
                "0",
                "-lms",
                str(EVERY_MS),
            ]
            self._process = subprocess.Popen(
                [program, *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End nvidia-smi."""
        if self._process is not None and self._reader is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join(timeout=2)

    def between(self, started_s: float, ended_s: float | None = None) -> dict[str, float]:
        """The readings between two times of `time.monotonic` (None: now), or the last before; empty if there are none.

        Medians of clocks (MHz) and power (W), the largest temperature (°C), memory (MiB) and the mean load (percent).
        """
        readings, ended_s = list(self._readings), ended_s or time.monotonic()
        rows = [values for when, values in readings if started_s <= when <= ended_s]
        rows = rows or [values for when, values in readings if when <= ended_s][-1:]
        if not rows:
            return {}
        sm, mem, power, heat, memory, load = (list(column) for column in zip(*rows, strict=True))
        return {
            "sm_clock_mhz": statistics.median(sm),
            "sm_clock_min_mhz": min(sm),
            "memory_clock_mhz": statistics.median(mem),
            "power_w": statistics.median(power),
            "temperature_c": max(heat),
            "memory_mib": max(memory),
            "utilization_percent": statistics.fmean(load),
            "readings": len(rows),
        }

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if values := parse_reading(line):
                self._readings.append((time.monotonic(), values))


def parse_reading(line: str) -> tuple[float, ...] | None:
    """The numbers of a line, in the order of `FIELDS`; None for a line with anything else in it."""
    parts = line.split(",")
    if len(parts) != len(FIELDS):
        return None
    try:
        return tuple(float(part) for part in parts)
    except ValueError:  # [N/A] on cards that do not report it
        return None
