"""Stage 1: what this GPU reaches at best, by the host's own torch: matrix products and copies."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from arcface_clients.errors import Missing
from arcface_tools import gpu_check
from arcface_tools.gpu_check.check import GpuCheck, Result
from arcface_tools.gpu_check.other_python import find_torch_python, told_by

TITLE = "What this GPU reaches at best"
STEP = "peaks"


def measure(check: GpuCheck) -> None:
    """Run the step."""
    check.step(STEP, 20, partial(_peaks, check))


def gemm_tflops(check: GpuCheck, precision: str) -> float | None:
    """The peak that a plan of this precision is compared with; None if it was not measured.

    int8 is compared with fp16 too: its kept layers run in fp16, and torch has no public int8 product to compare with.
    """
    kind = "fp32" if precision == "fp32" else "fp16"
    rows = [row for row in check.result(1, STEP).get("figures", []) if row["what"] == "gemm" and row["kind"] == kind]
    return float(rows[0]["tflops"]) if rows and "tflops" in rows[0] else None


def torch_python(check: GpuCheck) -> str:
    """The Python with torch; found once a run, and named in the report.

    Raises:
        Missing: there is none.
    """
    host = check.report["host"]
    if "torch_python" not in host:
        host["torch_python"] = find_torch_python(check.settings.torch_python)
        check.write()
    return str(host["torch_python"])


def _peaks(check: GpuCheck, result: Result) -> None:
    settings = check.settings
    python = torch_python(check)
    arguments = [str(settings.gemm_size), str(settings.sample_s), str(settings.warm_up_s)]
    script = Path(gpu_check.__file__).with_name("torch_peak.py")
    lines, stopped = told_by(python, script, arguments, check.logs / "torch-peak.log", max(check.left_s, 1))
    for line in lines:
        if "what" not in line:
            result |= line
            continue
        line["gpu"] = check.log.between(*line.pop("between"))
        result.setdefault("figures", []).append(line)
    if stopped or not result.get("figures"):
        raise Missing(f"torch measured no peaks, or not all: {stopped or 'it printed nothing'}")
