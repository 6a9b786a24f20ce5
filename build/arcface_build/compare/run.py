"""Runs one comparison end to end: opens both sides, embeds, judges, and explains a failed gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcface_build.compare.comparison import CompareResult, Faces, compare_sides
from arcface_build.compare.comparison import explain as explain_drift
from arcface_build.compare.faces import faces_of, pairs_of
from arcface_build.compare.layers import compare_layers
from arcface_build.compare.reference import source_beside
from arcface_build.compare.sides import beside_server, open_side
from arcface_clients.config.schema import EmbeddingConfig
from arcface_clients.errors import ArcFaceError, WrongUse
from arcface_clients.evidence.drift import TARGETS
from arcface_clients.extras import require
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.pipeline import local_model


@dataclass(frozen=True)
class CompareRequest:
    """The options of `arcface compare`."""

    sources: Sequence[str] = ()
    n_samples: int | None = None
    pairs_from: Path | None = None
    identities: bool = False
    threshold: float | None = None
    max_drift: float | None = None
    layers: bool = False
    layer_tolerance: float = 1e-3
    tensorrt: bool = False
    source: Path | None = None
    explain: bool | None = None
    across_contracts: bool = False


def compare(
    a: str, b: str, asked: CompareRequest, config: EmbeddingConfig, refused: Callable[[str], None]
) -> tuple[CompareResult, Faces]:
    """Compare B with A, the ground truth; returns the result and the faces used.

    Raises:
        WrongUse, Missing: a side or the faces cannot be compared.
    """
    if asked.pairs_from or asked.identities:
        require("sklearn", purpose="accuracy")
    if asked.layers:
        require("onnx", "polygraphy", purpose="--layers")
    targets = config.comparison
    config = beside_server(config, a, b)
    with open_side(a, config) as side_a, open_side(b, config) as side_b:
        faces = faces_of(asked.sources, (side_a, side_b), refused).sample(asked.n_samples)
        limits = targets.max_drift.model_dump()
        limit = max(limits.get(side.precision, 0.0) for side in (side_a, side_b))
        result = compare_sides(
            side_a,
            side_b,
            faces,
            limit if asked.max_drift is None else asked.max_drift,
            pairs_of(asked.pairs_from, asked.identities, faces),
            asked.threshold,
            {name: (target.target, target.warn) for name in TARGETS for target in [getattr(targets, name)]},
            asked.across_contracts,
        )
        network = asked.source or source_beside(a, b) or _source_of_engines(config, a, b)
        wanted = not result.report["gate"]["passed"] if asked.explain is None else asked.explain
        if wanted:
            explain_drift(result, side_b, faces, network)
    if asked.layers:
        result.report["layers"] = _layers(a, b, faces, asked.layer_tolerance, asked.tensorrt)
    return result, faces


def _layers(a: str, b: str, faces: Faces, tolerance: float, tensorrt: bool) -> dict[str, Any]:
    if Path(a).suffix != ".onnx" or Path(b).suffix != ".onnx":
        raise WrongUse(
            f"--layers compares two ONNX files, got {a} and {b}. A plan's layers cannot be read: "
            "give the ONNX it was built from as B and add --tensorrt"
        )
    pixels = faces.pixels if faces.pixels is not None else synthetic_faces(2)
    report = compare_layers(Path(a), Path(b), pixels, tolerance, tensorrt)
    return report.to_json() | {"told": str(report)}


def _source_of_engines(config: EmbeddingConfig, *texts: str) -> Path | None:
    """The source ONNX of the imported model that an engine's name refers to."""
    if all(Path(text).suffix or ":" in text for text in texts):
        return None
    try:
        return local_model(config).source()
    except ArcFaceError:
        return None
