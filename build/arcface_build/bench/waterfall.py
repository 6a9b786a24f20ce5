"""Shows where the time goes between the bare runtime and a caller, in milliseconds per face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arcface_build.bench.interleaved import Sample, Spread
from arcface_build.bench.perf_analyzer import Load

LEAF, ENSEMBLE = "arcface_onnx", "arcface"
_WAYS = (
    ("gRPC, shared memory", LEAF, "grpc-shm"),
    ("gRPC", LEAF, "grpc"),
    ("HTTP, binary", LEAF, "http"),
    ("HTTP, JSON", LEAF, "http-json"),
    ("ensemble, gRPC", ENSEMBLE, "grpc"),
)


def waterfall_loads(batch: int) -> list[Load]:
    """The loads to measure: with one caller, so that nothing overlaps and times add up."""
    return [Load(model, protocol, batch, 1) for _, model, protocol in _WAYS]


def waterfall(samples: Mapping[str, Sequence[Sample]], rounds: Sequence[int], batch: int) -> list[dict[str, Any]]:
    """Rows {step, ms_per_face, over_bare_us}: medians with spread, overheads paired within a round.

    The backend's step is the time that Triton counts as compute in the shared-memory run: the cost of the model inside
    the server, before any transport.
    """
    bare = {r: 1000 / samples[f"bare b{batch}"][r].faces_per_s for r in rounds}
    shm = samples[Load(LEAF, "grpc-shm", batch, 1).name]
    steps: dict[str, dict[int, float]] = {
        "bare ONNX Runtime": bare,
        "backend, inside Triton": {r: _compute_ms(shm[r]) / batch for r in rounds},
    }
    for step, model, protocol in _WAYS:
        measured = samples[Load(model, protocol, batch, 1).name]
        steps[step] = {r: 1000 / measured[r].faces_per_s for r in rounds}
    return [
        {
            "step": step,
            "ms_per_face": Spread.of(list(ms.values())).to_json(),
            "over_bare_us": Spread.of([1000 * (ms[r] - bare[r]) for r in rounds]).to_json(),
        }
        for step, ms in steps.items()
    ]


def _compute_ms(sample: Sample) -> float:
    row = sample.details["server"][LEAF]
    return row["compute_input_ms"] + row["compute_infer_ms"] + row["compute_output_ms"]
