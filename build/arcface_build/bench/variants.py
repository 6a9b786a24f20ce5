"""Measures speed and drift of a model's variants against ONNX Runtime fp32.

All are interleaved in one process with the same number of threads, so that the ratios hold on a shared machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arcface_build.bench.contestants import in_process, insightface_sessions
from arcface_build.bench.host import describe_host
from arcface_build.bench.interleaved import Variant, measure_in_turns
from arcface_build.bench.result import summarise
from arcface_build.variants.eval_set import FaceSet, evaluation_faces
from arcface_build.variants.gate import embed_all
from arcface_build.variants.int8 import quantizable_layers
from arcface_build.variants.make import load_named
from arcface_build.variants.recipe import Recipe, load_recipe
from arcface_build.variants.sidecar import read_sidecar
from arcface_clients.contract import FACE_INPUT
from arcface_clients.engines.import_manifest import read_import_manifest
from arcface_clients.engines.runtimes import cpu_flags, cpu_runtimes, has_openvino, open_session
from arcface_clients.evidence.drift import compare_embeddings

if TYPE_CHECKING:
    import onnx

BASE = "bare"  # the name that `result.comparisons` uses as base of a batch size


@dataclass(frozen=True)
class Contestant:
    """One file in one runtime; `gate` is its verdict from a sidecar, if any."""

    name: str
    model: Path | onnx.ModelProto
    runtime: str
    gate: dict[str, Any] | None = None
    kept: int | None = None


def run(
    model_dir: Path,
    batches: Sequence[int] = (1, 8, 32),
    *,
    threads: int = 2,
    rounds: int = 7,
    sample_s: float = 2.0,
    faces: FaceSet | None = None,
    insightface: bool = False,
    on_sample: Callable[[str, int], None] = lambda name, round_: None,
) -> dict[str, Any]:
    """Measure fp32, bf16 and int8 of one model, in each runtime of this host, against ONNX Runtime fp32.

    Args:
        model_dir: models/NAME/ with what `arcface quantize` made.
        batches: faces per call.
        threads: for every session.
        rounds: undisturbed rounds; each measures everything once.
        sample_s: approximate length of a sample in seconds.
        faces: faces to embed and to measure `drift` on; default: 64 synthetic ones.
        insightface: also InsightFace in-process, one face per call (with its own default threads).
        on_sample: progress.

    Returns:
        The benchmark's JSON (docs/reports.md) with kind "variants"; each variant has `ratio` (to ONNX Runtime fp32 of
        the same batch), `drift` on `faces`, and `gate` (its verdict on the eval set) if it has one.
    """
    faces = faces or evaluation_faces("synthetic", 64)
    entrants = contestants(model_dir)
    reference: np.ndarray | None = None
    variants: list[Variant] = []
    facts: dict[str, dict[str, Any]] = {}
    for entrant in entrants:
        session = open_session(entrant.model, entrant.runtime, threads)
        embeddings = embed_all(session, faces.faces)
        reference = embeddings if reference is None else reference
        told = {"runtime": entrant.runtime, "threads": threads, "gate": entrant.gate, "layers_kept": entrant.kept}
        told["drift"] = compare_embeddings(reference, embeddings).to_json()
        for batch in batches:
            name = f"{entrant.name} b{batch}"
            facts[name] = told
            variants.append(in_process(name, _encoder(session), faces.faces, batch))
    if insightface:
        variants += insightface_sessions(model_dir / "source.onnx", faces.faces, [1])
    samples = measure_in_turns(variants, rounds, sample_s, on_sample)
    result = summarise(variants, samples, describe_host())
    ratios = {row["variant"]: row for row in result["ratios"] if row["base"].startswith(BASE)}
    result |= {"kind": "variants", "model": model_dir.name, "contract_id": read_import_manifest(model_dir).contract_id}
    for row in result["variants"]:
        row |= facts.get(row["name"], {}) | {"ratio": ratios.get(row["name"])}
    return result


def contestants(model_dir: Path) -> list[Contestant]:
    """ONNX Runtime fp32 as imported first; then each file in each runtime of this host, gated there or not.

    Where OpenVINO is there, also int8 of every layer: as fast as int8 could be if nothing had to be kept.
    """
    imported = read_import_manifest(model_dir)
    serving, here = model_dir / imported.serving["file"], cpu_runtimes(cpu_flags(), has_openvino())
    found = [Contestant(BASE, serving, "onnxruntime")]
    if imported.cpu:
        found.append(Contestant("fp32 onnxruntime", model_dir / imported.cpu["file"], "onnxruntime"))
    found += [Contestant(f"fp32 {one}", serving, one) for one in here if one == "openvino-fp32"]
    if imported.winograd:
        file = model_dir / imported.winograd["file"]
        found += [Contestant(f"fp32 by Winograd {one}", file, one) for one in here if one != "openvino-bf16"]
    bf16, int8 = (read_sidecar(model_dir, precision, "cpu") for precision in ("bf16", "int8"))
    if bf16:
        found += [Contestant(f"bf16 {one}", serving, one, _gate(bf16, one)) for one in here if one == "openvino-bf16"]
    if int8:
        kept = len(int8["recipe"]["keep"])
        found += [Contestant(f"int8 {one}", model_dir / int8["file"], one, _gate(int8, one), kept) for one in here]
        path = model_dir / "variants" / "int8-cpu.json"
        full = every_layer(serving, load_recipe(path, "int8", "cpu", int8["serving_sha256"]))
        if here[0] != "onnxruntime":
            found.append(Contestant(f"int8 of every layer {here[0]}", full, here[0], None, 1))
    return found


def every_layer(serving: Path, recipe: Recipe) -> onnx.ModelProto:
    """The int8 model that keeps only the first convolution, to show how fast int8 would be without a gate."""
    model = load_named(serving)
    return replace(recipe, keep=tuple(quantizable_layers(model)[:1])).apply(model)


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of text, header first: variant, faces/s, ratio, drift on the faces sent, gate."""
    head = ("variant", "faces/s", "× ONNX Runtime fp32", "drift mean / worst", "layers kept", "gate on the eval set")
    rows: list[tuple[str, ...]] = [head]
    for row in result["variants"]:
        drift, gate, ratio = row.get("drift"), row.get("gate"), row.get("ratio")
        rows.append(
            (
                row["name"],
                f"{row['faces_per_s']['median']:.1f}",
                f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else "1",
                f"{1 - drift['mean_cosine']:.2g} / {drift['max_drift']:.2g}" if drift else "",
                "" if row.get("layers_kept") is None else str(row["layers_kept"]),
                f"{gate['drift']['max_drift']:.2g} of {gate['limit']:g}" if gate else "",
            )
        )
    return rows


def _gate(sidecar: dict[str, Any], runtime: str) -> dict[str, Any] | None:
    return next((gate for gate in sidecar["gates"] if gate["runtime"] == runtime), None)


def _encoder(session: Any) -> Callable[[np.ndarray], object]:
    return lambda faces: session.run(None, {FACE_INPUT: faces})
