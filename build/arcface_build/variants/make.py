"""Make a variant: a model folder and a wish in; the gated variant with its sidecar in models/NAME/variants/, out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arcface_build.errors import ProofFailed
from arcface_build.imports.manifest import Manifest, load_manifest
from arcface_build.variants.calibrate import LEVELS, collect_histograms, conv_inputs, least_error_range
from arcface_build.variants.eval_set import FaceSet, evaluation_faces
from arcface_build.variants.gate import Progress, Verdict, embed_all, judge, refusal
from arcface_build.variants.int8 import make_coarse, quantizable_layers
from arcface_build.variants.recipe import Recipe, load_recipe
from arcface_build.variants.search import SearchResult, layer_work, smallest_passing_set
from arcface_build.variants.sensitivity import measure_sensitivities
from arcface_build.variants.sidecar import variants_folder, write_variant
from arcface_build.variants.typed import body_nodes, largest_values, overflowing, rounded_as_float16, with_followers
from arcface_clients.atomic import new_file
from arcface_clients.engines.runtimes import cpu_flags, fast_runtime, has_bf16, has_openvino, open_session
from arcface_clients.errors import Missing, WrongUse
from arcface_clients.evidence.drift import DRIFT_LIMITS

if TYPE_CHECKING:
    import onnx

TARGETS = {"fp16": ("tensorrt",), "bf16": ("cpu",), "int8": ("cpu", "tensorrt")}  # the first is the default
CALIBRATION_FACES = 64
OVERFLOW_FACES = 16
PROBE_FACES = 8
Stage = Callable[[str], Progress]


@dataclass(frozen=True)
class Wish:
    """What to make; None means the default.

    Attributes:
        precision: fp16, bf16 or int8.
        target: cpu or tensorrt.
        eval_source, eval_faces: faces to judge by (`eval_set.evaluation_faces`) and at most how many.
        calibration: faces to calibrate on; default: a draw from the eval set, or other drawn faces where that is drawn.
        limit: largest drift (1 − cosine) a face may show.
        search: look for layers to keep where the variant as asked for fails.
        keep: names of layers that stay in higher precision in any case.
        recipe: replay this file instead of calibrating and searching.
    """

    precision: str
    target: str | None = None
    eval_source: str = "synthetic"
    eval_faces: int = 400
    calibration: str | None = None
    limit: float | None = None
    search: bool = True
    keep: tuple[str, ...] = ()
    recipe: Path | None = None


def make_variant(
    model_dir: Path, wish: Wish, stage: Stage = lambda title: lambda done, total: None
) -> tuple[dict[str, Any], Path]:
    """Make, judge and write one variant; returns its sidecar and where that stands.

    Args:
        model_dir: models/NAME/ as `arcface import` writes it.
        wish: what to make.
        stage: gets a title, gives the progress callback of that stage.

    Raises:
        ProofFailed: it does not pass its gate; it is kept as .refused beside its report.
        Missing, WrongUse: no such model, no faces, a combination that does not exist.
    """
    manifest = load_manifest(model_dir)
    target = _check(wish, manifest)
    serving_path = model_dir / manifest.serving["file"]
    if not serving_path.is_file():
        raise Missing(f"{serving_path} is gone, though its manifest names it. Next: arcface import SOURCE --force")
    faces = evaluation_faces(wish.eval_source, wish.eval_faces)
    runtimes = _runtimes(wish.precision, target)
    trial = _Trial(
        name=manifest.name,
        precision=wish.precision,
        limit=DRIFT_LIMITS[wish.precision] if wish.limit is None else wish.limit,
        runtimes=tuple(runtimes),
        reference=_reference(model_dir, serving_path, manifest, faces, stage),
        faces=faces,
        stage=stage,
    )
    recipe: Recipe | None = None
    model: onnx.ModelProto | None = None
    judged: onnx.ModelProto | Path = serving_path
    if wish.precision != "bf16":
        serving = load_named(serving_path)
        if wish.recipe:
            recipe = load_recipe(wish.recipe, wish.precision, target, manifest.serving["sha256"])
        else:
            recipe = _start(wish, target, serving, manifest, faces, stage)
            if wish.search:
                picture = variants_folder(model_dir) / f"{wish.precision}-{target}.search.png"
                recipe = _search(serving, recipe, trial, picture)
        model = recipe.apply(serving)
        judged = model if recipe.precision == "int8" else recipe.stand_in(serving)
        del serving  # r100: a quarter of a gigabyte that nothing below needs
    verdicts = [trial.judge(judged, runtime, f"gate in {runtime}") for runtime in runtimes]
    sidecar, path = write_variant(model_dir, manifest, wish.precision, target, model, recipe, verdicts, faces)
    if not sidecar["passed"]:
        raise ProofFailed(
            f"{refusal(manifest.name, wish.precision, verdicts[0])} {_advice(recipe)}. "
            f"Kept beside its report, never served: {path}"
        )
    return sidecar, path


@dataclass(frozen=True)
class _Trial:
    """What every candidate is judged by."""

    name: str
    precision: str
    limit: float
    runtimes: tuple[str, ...]
    reference: np.ndarray
    faces: FaceSet
    stage: Stage

    def judge(self, model: Path | onnx.ModelProto, runtime: str, title: str) -> Verdict:
        embeddings = embed_all(open_session(model, runtime), self.faces.faces, self.stage(title))
        label = f"{runtime} with float16 rounding" if self.precision == "fp16" else runtime
        return judge(label, self.precision, self.limit, self.reference, embeddings, self.faces)

    def judge_everywhere(self, model: Path | onnx.ModelProto, title: str) -> Verdict:
        """The first verdict that is no, else the one with the most drift: a variant may be served in each runtime."""
        verdicts = []
        for runtime in self.runtimes:
            verdicts.append(self.judge(model, runtime, title if len(self.runtimes) == 1 else f"{title}: {runtime}"))
            if not verdicts[-1].passed:
                return verdicts[-1]
        return max(verdicts, key=lambda verdict: verdict.drift.max_drift)


def _start(
    wish: Wish, target: str, serving: onnx.ModelProto, manifest: Manifest, faces: FaceSet, stage: Stage
) -> Recipe:
    """The recipe before any search: calibrated, with what has to be kept in any case."""
    unknown = set(wish.keep) - {n.name for n in serving.graph.node}
    if unknown:
        names = ", ".join(quantizable_layers(serving))
        raise WrongUse(f"--keep names no node: {', '.join(sorted(unknown))}. Layers: {names}")
    if wish.calibration or wish.eval_source == "synthetic":
        calibration = evaluation_faces(wish.calibration or "synthetic", CALIBRATION_FACES, seed=1)
    else:
        calibration = faces.sample(CALIBRATION_FACES, seed=1)
    start = Recipe(wish.precision, target, manifest.serving["sha256"], wish.keep, calibration=calibration.to_json())
    if wish.precision == "fp16":
        names = body_nodes(serving)
        largest = largest_values(serving, names, calibration.faces[:OVERFLOW_FACES], stage("largest values"))
        return replace(start, keep=tuple(dict.fromkeys([*wish.keep, *overflowing(serving, largest)])))
    histograms = collect_histograms(serving, conv_inputs(serving), calibration.faces, stage("calibration"))
    ranges = {t: {name: least_error_range(h, t) for name, h in histograms.items()} for t in LEVELS}
    # The first convolution reads pixels: three channels give int8 nothing to win.
    return replace(start, keep=tuple(dict.fromkeys([*wish.keep, *quantizable_layers(serving)[:1]])), ranges=ranges)


def _search(serving: onnx.ModelProto, start: Recipe, trial: _Trial, picture: Path) -> Recipe:
    """The recipe that passes with the least kept; the start where that passes or nothing does. Draws what it tried."""
    first = trial.judge_everywhere(start.stand_in(serving), "as asked for")
    if first.passed:
        return start
    layers, int8 = quantizable_layers(serving), start.precision == "int8"
    groups = {} if int8 else with_followers(serving)

    def nodes_of(keep: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for layer in keep for name in groups.get(layer, [layer])))

    def coarsen(part: onnx.ModelProto, layer: str) -> None:
        if int8:
            make_coarse(part, layer, start.ranges[start.target], start.target)
        else:
            part.CopyFrom(rounded_as_float16(part, keep=set(body_nodes(part)) - set(groups[layer])))

    def attempt(keep: Sequence[str]) -> Verdict:
        if tuple(keep) == start.keep:
            return first
        candidate = replace(start, keep=nodes_of(keep)).stand_in(serving)
        return trial.judge_everywhere(candidate, f"{len(keep)} of {len(layers)} layers kept")

    probes = trial.faces.sample(PROBE_FACES).faces
    progress = trial.stage("sensitivity of each layer")
    sensitivity = measure_sensitivities(serving, layers, coarsen, probes, progress)
    result = smallest_passing_set(sensitivity, layer_work(serving), attempt, start.keep)
    _draw(picture, trial, start, result, sensitivity)
    record = {"sensitivity": sensitivity, **result.to_json()}
    return replace(start, keep=start.keep if result.keep is None else nodes_of(result.keep), search=record)


def _draw(path: Path, trial: _Trial, start: Recipe, result: SearchResult, sensitivity: dict[str, float]) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return  # the recipe holds the same figures
    from arcface_build.variants.plot import draw_search

    title = f"{trial.name}: {start.precision} for {start.target}, {len(trial.faces.faces)} faces"
    draw_search(path, title, result, sensitivity, trial.limit, start.keep)


def _advice(recipe: Recipe | None) -> str:
    if recipe is None:
        return "Serve fp32 instead, or try: --precision int8"
    if recipe.search is None:
        return "Try --search, which finds the layers to keep"
    return "No set of layers passes: try --calibration with crops like yours, or a precision with more bits"


def _check(wish: Wish, manifest: Manifest) -> str:
    """The target, after refusing what cannot work."""
    target = wish.target or TARGETS[wish.precision][0]
    if target not in TARGETS[wish.precision]:
        hint = "OpenVINO runs the fp32 file in bf16" if wish.precision == "bf16" else "CPUs compute fp16 as fp32: bf16"
        raise WrongUse(
            f"no {wish.precision} for {target}: expected --target {' or '.join(TARGETS[wish.precision])} ({hint})."
        )
    drawn = (wish.calibration or wish.eval_source) == "synthetic"
    if wish.precision == "int8" and drawn and not wish.recipe and manifest.source.get("kind") != "demo":
        raise WrongUse(
            f"int8 of {manifest.name} needs real crops: ranges of drawn faces do not fit. Next: arcface quantize "
            f"{manifest.name} --precision int8 --eval FOLDER (112×112 crops, a sub-folder a person)"
        )
    if wish.precision == "bf16":
        if not has_openvino():
            raise Missing("bf16 on a CPU needs OpenVINO. Next: pip install onnxruntime-openvino (not onnxruntime)")
        if not has_bf16(cpu_flags()):
            raise Missing(
                "this CPU has no bf16 instructions (avx512_bf16, amx_bf16): OpenVINO would quietly compute in fp32, "
                "and the gate would prove nothing. Run this on a CPU that has them, or try: --precision int8"
            )
    return target


def _runtimes(precision: str, target: str) -> list[str]:
    """Where a variant is judged: first the runtime that it is for, then others that may serve it on another CPU."""
    if precision == "bf16":
        return ["openvino-bf16"]
    if target == "tensorrt":
        return ["onnxruntime"]  # computes Q/DQ as written, whatever the signedness
    fast = fast_runtime()
    return [fast, "openvino-fp32"] if fast == "openvino-bf16" else [fast]


def _reference(model_dir: Path, serving: Path, manifest: Manifest, faces: FaceSet, stage: Stage) -> np.ndarray:
    """Embeddings of the fp32 serving ONNX in ONNX Runtime; kept, because every variant is judged by the same ones."""
    name = f"reference-{manifest.serving['sha256'][:12]}-{faces.sha256[:12]}.npy"
    kept = variants_folder(model_dir) / name
    if kept.is_file():
        return np.load(kept)
    embeddings = embed_all(open_session(serving), faces.faces, stage("reference embeddings"))
    with new_file(kept) as temporary, temporary.open("wb") as file:
        np.save(file, embeddings)
    return embeddings


def load_named(path: Path) -> onnx.ModelProto:
    """The model with a name for each node, for recipes to point at."""
    import onnx

    model = onnx.load(path)
    taken = {n.name for n in model.graph.node}
    for position, node in enumerate(model.graph.node):
        if not node.name:
            node.name = f"{node.op_type}.{position}"
            while node.name in taken:
                node.name += "_"
            taken.add(node.name)
    return model
