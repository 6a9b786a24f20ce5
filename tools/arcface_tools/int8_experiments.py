"""Measures what could make int8 better or faster on a CPU (docs/variants.md): drift, layers to keep, speed.

    python -m arcface_tools.int8_experiments drift REPORT models/NAME [FACES]
    python -m arcface_tools.int8_experiments speed REPORT models/NAME

REPORT is a JSON file, one entry a model, to which each run adds. `drift` writes the models it made to a folder of its
own, models/NAME/int8-experiments, where `speed` finds them: run that one where nothing else runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_build.bench.contestants import in_process, insightface_sessions
from arcface_build.bench.host import describe_host
from arcface_build.bench.interleaved import measure_in_turns, ratio, undisturbed_rounds
from arcface_build.bench.result import summarise
from arcface_build.variants.calibrate import conv_inputs
from arcface_build.variants.eval_set import evaluation_faces
from arcface_build.variants.gate import VariantVerdict, embed_all
from arcface_build.variants.held_back import part
from arcface_build.variants.int8 import make_coarse, quantizable_layers, quantize_convolutions
from arcface_build.variants.make import CALIBRATION_FACES, MARGIN, PROBE_FACES, load_named
from arcface_build.variants.search import layer_work, smallest_passing_set
from arcface_build.variants.sensitivity import measure_sensitivities
from arcface_build.variants.trial import Trial, silent
from arcface_clients.atomic import write_json
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT
from arcface_clients.engines.import_manifest import read_import_manifest
from arcface_clients.engines.runtimes import fast_runtime, open_session
from arcface_clients.evidence.drift import DRIFT_LIMITS, compare_embeddings
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_tools.int8_ways import (
    bias_corrected,
    calibrated,
    convolutions_alone,
    equalized,
    sums_in_int8,
    weights_in_int8,
)

if TYPE_CHECKING:
    import onnx

    Way = Callable[[Sequence[str]], onnx.ModelProto]

FACES, BATCHES, ROUNDS, SAMPLE_S = 400, (1, 8), 5, 0.4
FOLDER, TODAY, BASE = "int8-experiments", "today", "insightface b1"
WRONG = 0.1  # drift between two runtimes on one file: 0.007 is rounding (demo r18), 0.3 and more was seen
SEARCHED = (TODAY, "bias corrected", "equalized")


def drift(model_dir: Path, source: str) -> dict[str, Any]:
    """For each way: drift with every layer but the first in int8, and how many layers the gate makes it keep."""
    model = load_named(model_dir / read_import_manifest(model_dir).serving["file"])
    parts = part(evaluation_faces(source, FACES), FACES)
    calibration = parts.searched.sample(CALIBRATION_FACES, seed=1).faces
    layers, work = quantizable_layers(model), layer_work(model)
    ways, tensors = _ways(model, calibration)
    exact = open_session(model)
    searched, held_back = (
        Trial("int8", DRIFT_LIMITS, faces, embed_all(exact, faces.faces), silent)
        for faces in (parts.searched, parts.held_back)
    )
    runtime, faithful = _runtime(ways[TODAY](layers[:1]), calibration[:PROBE_FACES])
    ranges = calibrated(model, conv_inputs(model), calibration)
    coarsen = partial(make_coarse, ranges=ranges, target="cpu")
    sensitivity = measure_sensitivities(model, layers[1:], coarsen, calibration[:PROBE_FACES])
    rows = []
    for name, way in ways.items():
        made = way(layers[:1])
        verdict = held_back.judge(made, runtime, name)
        row: dict[str, Any] = {"way": name, "all": verdict.to_json() | {"clipped": None}}
        row["all"]["mean_drift"] = verdict.mean_drift
        _save(made, model_dir, f"{name}, every layer")
        if name in SEARCHED:
            attempt = partial(_attempt, searched.aiming_at(MARGIN), way, runtime)
            found = smallest_passing_set(sensitivity, work, attempt, layers[:1])
            row["kept"] = len(found.keep) if found.keep else None
            if found.keep:
                gated = way(found.keep)
                row["gated"] = held_back.judge(gated, runtime, name).max_drift
                _save(gated, model_dir, name)
        print(json.dumps({k: v for k, v in row.items() if k != "all"} | {"worst": verdict.max_drift}), file=sys.stderr)
        rows.append(row)
    _save(convolutions_alone(model), model_dir, "convolutions alone")
    return {
        "host": describe_host(),
        "faces": parts.held_back.to_json(),
        "calibration_faces": len(calibration),
        "layers": len(layers),
        "tensors_equalized": tensors,
        "judged_in": runtime,
        "openvino_as_written": faithful,
        "limit": DRIFT_LIMITS["int8"],
        "margin": MARGIN,
        "ways": rows,
    }


def speed(model_dir: Path) -> dict[str, Any]:
    """Everything that `drift` made, in turns in OpenVINO, against InsightFace one face a call."""
    faces, folder = synthetic_faces(2 * BATCHES[-1]), model_dir / FOLDER
    serving, fast = model_dir / read_import_manifest(model_dir).serving["file"], fast_runtime()
    files = {name: (folder / f"{name}.onnx", fast) for name in _timed(folder)}
    files |= {"fp32": (serving, "openvino-fp32"), "float rest in fp32": (folder / f"{TODAY}.onnx", "openvino-fp32")}
    if fast == "openvino-bf16":
        files["bf16"] = serving, fast
    variants = insightface_sessions(model_dir / "source.onnx", faces, (1,))
    for name, (file, runtime) in files.items():
        session = open_session(file, runtime)

        def encode(batch: Any, session: Any = session) -> object:
            return session.run([EMBEDDING_OUTPUT], {FACE_INPUT: batch})

        variants += [in_process(f"{name} b{batch}", encode, faces, batch) for batch in BATCHES]
    samples = measure_in_turns(variants, ROUNDS, SAMPLE_S)
    result = summarise(variants, samples, describe_host())
    kept, _ = undisturbed_rounds(samples)
    names = [variant.name for variant in variants if variant.name != BASE]
    result["ratios"] = [{"variant": v, "base": BASE} | ratio(samples, v, BASE, kept).to_json() for v in names]
    return result


def _ways(model: onnx.ModelProto, faces: Any) -> tuple[dict[str, Way], int]:
    even, tensors = equalized(model, faces)
    ranges = {id(one): calibrated(one, conv_inputs(one), faces) for one in (model, even)}

    def plain(start: onnx.ModelProto, keep: Sequence[str]) -> onnx.ModelProto:
        return quantize_convolutions(start, ranges[id(start)], "cpu", keep)

    def corrected(start: onnx.ModelProto, keep: Sequence[str]) -> onnx.ModelProto:
        return bias_corrected(plain(start, keep), start, faces)

    ways: dict[str, Way] = {TODAY: partial(plain, model), "bias corrected": partial(corrected, model)}
    if tensors:
        ways |= {"equalized": partial(plain, even), "equalized, bias corrected": partial(corrected, even)}
    ways["weights in int8 only"] = partial(weights_in_int8, model)
    ways["sums in int8"] = lambda keep: sums_in_int8(plain(model, keep), model, faces)
    return ways, tensors


def _attempt(trial: Trial, way: Way, runtime: str, keep: Sequence[str]) -> VariantVerdict:
    return trial.judge(way(keep), runtime, "")


def _runtime(made: onnx.ModelProto, faces: Any) -> tuple[str, dict[str, float]]:
    """OpenVINO where it computes this file as ONNX Runtime's own kernels do, else those; and how far it is off."""
    written, fast = embed_all(open_session(made), faces), fast_runtime()
    off = compare_embeddings(written, embed_all(open_session(made, fast), faces)).max_drift
    return (fast if off <= WRONG else "onnxruntime"), {fast: off}


def _timed(folder: Path) -> list[str]:
    names = [TODAY, f"{TODAY}, every layer", "bias corrected", "equalized", "sums in int8, every layer"]
    return [name for name in (*names, "convolutions alone") if (folder / f"{name}.onnx").is_file()]


def _save(model: onnx.ModelProto, model_dir: Path, name: str) -> None:
    import onnx

    (model_dir / FOLDER).mkdir(exist_ok=True)
    onnx.save(model, model_dir / FOLDER / f"{name}.onnx")


def main(what: str, report: Path, model_dir: Path, source: str) -> None:
    """Add one model's measurement to the report."""
    told: dict[str, Any] = json.loads(report.read_text()) if report.is_file() else {"format": 1, "models": {}}
    told |= {"kind": "int8-experiments", "host": describe_host()}  # of the last run; each measurement names its own
    found = drift(model_dir, source) if what == "drift" else speed(model_dir)
    told["models"].setdefault(model_dir.name, {})[what] = found
    write_json(report, told)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5) or sys.argv[1] not in ("drift", "speed"):
        raise SystemExit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), (*sys.argv, "synthetic")[4])
