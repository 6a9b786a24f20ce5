"""The goals that a GPU is held against, each with what was measured; a goal without its figures is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("fp32", "tf32", "fp16")  # of PyTorch; its own default lies between the first two
SHARE_OF_PEAK, OF_EAGER_FP32, OF_ONNXRUNTIME, OF_THE_PLAN = 0.5, 10.0, 2.0, 0.97
BUILD_SECONDS, BUILD_BYTES = 300.0, 2 << 30


@dataclass(frozen=True)
class Goal:
    """One line: what, expected at least or at most, measured."""

    what: str
    expected: float
    measured: float
    unit: str = ""
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.measured <= self.expected if self.at_most else self.measured >= self.expected

    def row(self) -> list[str]:
        """For a table."""
        sign = "≤" if self.at_most else "≥"
        told = [f"{value:.3g}{self.unit}" for value in (self.expected, self.measured)]
        return [self.what, f"{sign} {told[0]}", told[1], "yes" if self.met else "no"]


def goals(report: Mapping[str, Any]) -> list[Goal]:
    """Every goal that the report has the figures for."""
    return list(_goals(report))


def best_ms(ways: Sequence[Mapping[str, Any]], kind: str, batch: int, key: str, eager: bool = False) -> float | None:
    """The shortest median of a kind of PyTorch at a batch size, over layouts; compiled ones too unless `eager`."""
    times = [
        row[key]
        for way in ways
        if way["kind"] == kind and not (eager and way["compiled"])
        for row in way.get("batches", ())
        if row["batch"] == batch and key in row
    ]
    return min(times, default=None)


def _goals(report: Mapping[str, Any]) -> Iterator[Goal]:
    bare = _steps(report, 2)
    plain = [(name, result) for name, result in bare.items() if "plan" in result]
    if not plain:
        return
    name, result = plain[0]
    ways = [way for step in _steps(report, 4).values() for way in step.get("ways", ())]
    for row in result.get("rows", [])[-2:]:
        batch, ms = row["batch"], row["median_ms"]
        if row["share_of_peak"]:
            yield Goal(f"{name}, batch {batch}: share of the GEMM peak", SHARE_OF_PEAK, row["share_of_peak"])
        if base := best_ms(ways, "fp32", batch, "device_ms", eager=True):
            yield Goal(f"{name}, batch {batch}: × PyTorch eager fp32 without TF32", OF_EAGER_FP32, base / ms)
        if base := _onnxruntime_ms(report, batch):
            yield Goal(f"{name}, batch {batch}: × the best ONNX Runtime CUDA", OF_ONNXRUNTIME, base / ms)
    for name, step in _steps(report, 3).items():
        if "plan" in step:
            yield Goal(f"{name}: build", BUILD_SECONDS, step["plan"]["build_seconds"], " s", at_most=True)
            if peak := step["plan"]["peak_vram_bytes"]:
                yield Goal(f"{name}: memory of the build", BUILD_BYTES / 2**30, peak / 2**30, " GiB", at_most=True)
        if "drift" in step:
            yield Goal(f"{name}: max drift", step["limit"], step["drift"]["max_drift"], at_most=True)
    shares = [
        row["of_the_plan_alone"]
        for step in _steps(report, 5).values()
        for way in step.get("ways", {}).values()
        for key in ("rows", "rows_of_gpu_faces")
        for row in way.get(key, ())
        if row["of_the_plan_alone"]
    ]
    if shares:
        yield Goal("through tritonserver, the best way: of the plan alone", OF_THE_PLAN, max(shares))


def _steps(report: Mapping[str, Any], stage: int) -> dict[str, Mapping[str, Any]]:
    steps = report["stages"].get(str(stage), {}).get("steps", {})
    return {name: step["result"] for name, step in steps.items()}


def _onnxruntime_ms(report: Mapping[str, Any], batch: int) -> float | None:
    rows = [row for step in _steps(report, 4).values() for row in step.get("rows", ()) if row["batch"] == batch]
    return min((float(row["device_ms"]) for row in rows if "device_ms" in row), default=None)
