"""Compares methods of choosing int8 ranges by the drift that each one causes.

The results justify our own `variants.calibrate`: min/max, percentile and entropy of onnxruntime.quantization with our
placement of Q/DQ (convolution inputs and weights only), and its unmodified quantize_static.

    python -m arcface_tools.calibrators models/NAME [FACES]
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.variants.calibrate import collect_histograms, conv_inputs, least_error_range
from arcface_build.variants.eval_set import evaluation_faces
from arcface_build.variants.gate import embed_all
from arcface_build.variants.int8 import Range, quantizable_layers, quantize_convolutions
from arcface_build.variants.make import CALIBRATION_FACES, load_named
from arcface_clients.contract import FACE_INPUT
from arcface_clients.engines.import_manifest import read_import_manifest
from arcface_clients.engines.runtimes import open_session
from arcface_clients.evidence.drift import compare_embeddings

METHODS = {"min/max": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}  # the library's names


class _Reader:
    """Calibration faces one at a time, as onnxruntime.quantization expects them."""

    def __init__(self, faces: np.ndarray) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = ({FACE_INPUT: face[None]} for face in faces)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next feed, None at the end."""
        return next(self._feeds, None)


def run(model_dir: Path, source: str = "synthetic", eval_faces: int = 64) -> dict[str, Any]:
    """Drift of int8 for each method, with all layers but the first quantised, on ONNX Runtime."""
    path = model_dir / read_import_manifest(model_dir).serving["file"]
    model = load_named(path)
    faces = evaluation_faces(source, eval_faces)
    calibration = evaluation_faces(source, CALIBRATION_FACES, seed=1).faces
    reference = embed_all(open_session(model), faces.faces)
    keep = quantizable_layers(model)[:1]
    rows: dict[str, dict[str, Any]] = {}

    def measure(name: str, candidate: Any) -> None:
        rows[name] = compare_embeddings(reference, embed_all(open_session(candidate), faces.faces)).to_json()

    histograms = collect_histograms(model, conv_inputs(model), calibration)
    ours = {name: least_error_range(h, "cpu") for name, h in histograms.items()}
    measure("least squared error", quantize_convolutions(model, ours, "cpu", keep))
    for name in METHODS:
        ranges = {k: v for k, v in _library_ranges(path, name, calibration).items() if k in ours}
        measure(f"{name}, our placement", quantize_convolutions(model, ranges, "cpu", keep))
    measure("quantize_static as it comes", _quantize_static(path, calibration))
    return {"model": model_dir.name, "faces": faces.to_json(), "calibration_faces": len(calibration), "drift": rows}


def _library_ranges(path: Path, method: str, faces: np.ndarray) -> dict[str, Range]:
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            path,
            ["Conv"],
            augmented_model_path=f"{folder}/augmented.onnx",
            calibrate_method=CalibrationMethod[METHODS[method]],
        )
        calibrator.collect_data(_Reader(faces))
        found = calibrator.compute_data()
    ends = {name: [float(np.ravel(end)[0]) for end in data.range_value] for name, data in found.items()}
    return {name: (low, high) for name, (low, high) in ends.items()}


def _quantize_static(path: Path, faces: np.ndarray) -> Path:
    from onnxruntime.quantization import quantize_static

    target = Path(tempfile.mkdtemp()) / "static.onnx"
    quantize_static(path, target, _Reader(faces))
    return target


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # the library prints as it goes
        found = run(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "synthetic")
    print(json.dumps(found, indent=2))
