"""Makes a variant of an imported model and judges it; the result goes to models/NAME/variants/ with a sidecar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_build.errors import ProofFailed
from arcface_build.graph.tensorrt_form import TensorRtForm
from arcface_build.variants.calibrate import LEVELS, collect_histograms, conv_inputs, least_error_range
from arcface_build.variants.eval_set import FaceSet, evaluation_faces
from arcface_build.variants.gate import HELD_BACK, VariantVerdict
from arcface_build.variants.held_back import Parts, light, likeness, part, without
from arcface_build.variants.int8 import make_coarse, quantizable_layers
from arcface_build.variants.recipe import Recipe, load_recipe
from arcface_build.variants.search import SearchResult, layer_work, smallest_passing_set
from arcface_build.variants.sensitivity import measure_sensitivities
from arcface_build.variants.sidecar import variants_folder, write_variant
from arcface_build.variants.trial import Stage, Trial, open_trial, runtimes_for, silent
from arcface_build.variants.typed import body_nodes, largest_values, overflowing, rounded_as_float16, with_followers
from arcface_clients.engines.import_manifest import ImportManifest, read_import_manifest
from arcface_clients.engines.model_folder import ModelFolder
from arcface_clients.engines.runtimes import cpu_flags, has_bf16, has_openvino
from arcface_clients.errors import Missing, WrongUse
from arcface_clients.evidence.drift import DRIFT_LIMITS
from arcface_clients.extras import how_to_get

if TYPE_CHECKING:
    import onnx

TARGETS = {"fp16": ("tensorrt",), "bf16": ("cpu",), "int8": ("cpu", "tensorrt")}  # the first is the default
CALIBRATION_FACES = 64
MARGIN = 0.5
OVERFLOW_FACES = 16
PROBE_FACES = 8
_ALL_FACES = 1_000_000


@dataclass(frozen=True)
class Wish:
    """What to make; None means the default.

    Attributes:
        precision: fp16, bf16 or int8.
        target: cpu or tensorrt.
        eval_source, eval_faces: faces (`eval_set.evaluation_faces`) and at most how many; one half is searched on, the
            other judges.
        calibration: faces to calibrate on; default: a sample of the first half, or new ones if the faces are synthetic.
        limits: largest drift (1 − cosine) allowed for any face, by precision.
        margin: share of the limit that the search aims at, so that nothing passes only just.
        search: search for layers to keep if the variant as requested misses that aim.
        keep: names of layers that always stay in higher precision.
        recipe: replay this file instead of calibrating and searching.
    """

    precision: str
    target: str | None = None
    eval_source: str = "synthetic"
    eval_faces: int = 400
    calibration: str | None = None
    limits: Mapping[str, float] = field(default_factory=lambda: DRIFT_LIMITS)
    margin: float = MARGIN
    search: bool = True
    keep: tuple[str, ...] = ()
    recipe: Path | None = None


def make_variant(model_dir: Path, wish: Wish, stage: Stage = silent) -> tuple[dict[str, Any], Path]:
    """Make, judge and write one variant; returns its sidecar and the sidecar's path.

    Ranges and layers to keep are fitted to one part of the faces and judged on the other.

    Args:
        model_dir: models/NAME/ as `arcface import` writes it.
        wish: what to make.
        stage: takes a title and returns the progress callback of that stage.

    Raises:
        ProofFailed: it fails its gate; it is kept as .refused beside its report.
        GateFailed: the serving ONNX is not the one that the import proved.
        Missing, WrongUse: no such model, no faces, a combination that does not exist.
    """
    manifest = read_import_manifest(model_dir)
    target = _check(wish, manifest)
    serving_path = model_dir / manifest.serving["file"]
    ModelFolder(model_dir, manifest).check_proved(serving_path)
    runtimes = runtimes_for(wish.precision, target)
    if wish.precision == "bf16":  # nothing is fitted to any face: all of them judge
        faces = evaluation_faces(wish.eval_source, wish.eval_faces)
        gate = open_trial(model_dir, manifest, "bf16", target, wish.limits, faces, stage)
        verdicts = [gate.judge(serving_path, runtime, f"gate in {runtime}") for runtime in runtimes]
        return _written(model_dir, manifest, wish, target, None, None, verdicts, None, faces)
    parts, calibration = _faces(wish)
    opened = partial(open_trial, model_dir, manifest, wish.precision, target, wish.limits, stage=stage)
    search, gate = opened(faces=parts.searched).aiming_at(wish.margin), opened(faces=parts.held_back)
    serving = load_named(serving_path)
    if wish.recipe:
        recipe = load_recipe(wish.recipe, wish.precision, target, manifest.serving["sha256"])
    else:
        recipe = _start(wish, target, serving, manifest, calibration, stage)
        if wish.search:
            picture = variants_folder(model_dir) / f"{wish.precision}-{target}.search.png"
            recipe = _search(manifest.name, serving, recipe, search, runtimes, picture)
    model = recipe.apply(serving)
    judged = model if target == "cpu" else recipe.stand_in(serving)
    clipped = recipe.clipped(serving, parts.held_back.faces, stage("values cut off"))
    del serving  # r100: a quarter of a gigabyte, no longer needed
    verdicts = [
        replace(
            gate.judge(judged, runtime, f"gate in {runtime}, faces held back"),
            judged_on=HELD_BACK,
            searched=search.judge(judged, runtime, f"gate in {runtime}, faces searched on").gate,
            clipped=clipped,
        )
        for runtime in runtimes
    ]
    return _written(model_dir, manifest, wish, target, model, recipe, verdicts, parts, parts.held_back)


def _written(
    model_dir: Path,
    manifest: ImportManifest,
    wish: Wish,
    target: str,
    model: onnx.ModelProto | None,
    recipe: Recipe | None,
    verdicts: Sequence[VariantVerdict],
    parts: Parts | None,
    judged: FaceSet,
) -> tuple[dict[str, Any], Path]:
    """Sidecar and path of a variant that passed; one that failed is written as .refused and raises ProofFailed."""
    told = {
        "eval": {**judged.to_json(), "mean_grey": light(judged)},
        "searched": {
            **parts.searched.to_json(),
            "each": parts.searched.each,
            "mean_grey": light(parts.searched),
            "parted": parts.how,
        }
        if parts
        else None,
        "margin": wish.margin if parts else None,
        "warnings": likeness(manifest.name, parts.searched if parts else None, judged),
    }
    sidecar, path = write_variant(model_dir, manifest, wish.precision, target, model, recipe, verdicts, told)
    if not sidecar["passed"]:
        raise ProofFailed(
            f"{wish.precision} of {manifest.name} refused in {verdicts[0].runtime}: {verdicts[0].why}. "
            f"{_advice(wish)}. Kept beside its report, never served: {path}"
        )
    return sidecar, path


def _faces(wish: Wish) -> tuple[Parts, FaceSet]:
    """The two parts, and the faces to calibrate on, none of which judge."""
    synthetic = wish.eval_source == "synthetic"
    everything = evaluation_faces(wish.eval_source, wish.eval_faces if synthetic else _ALL_FACES)
    parts = part(everything, wish.eval_faces)
    if wish.calibration in (None, wish.eval_source) and not synthetic:
        return parts, parts.searched.sample(CALIBRATION_FACES, seed=1)
    calibration = evaluation_faces(wish.calibration or "synthetic", CALIBRATION_FACES, seed=1)
    return replace(parts, held_back=without(parts.held_back, calibration)), calibration


def _start(
    wish: Wish, target: str, serving: onnx.ModelProto, manifest: ImportManifest, calibration: FaceSet, stage: Stage
) -> Recipe:
    """The recipe before any search: calibrated, with the layers that must be kept."""
    unknown = set(wish.keep) - {n.name for n in serving.graph.node}
    if unknown:
        layers = ", ".join(quantizable_layers(serving))
        raise WrongUse(f"--keep names no node: {', '.join(sorted(unknown))}. Layers: {layers}")
    start = Recipe(
        wish.precision,
        target,
        manifest.serving["sha256"],
        wish.keep,
        calibration={**calibration.to_json(), "each": calibration.each},
        form=TensorRtForm() if target == "tensorrt" else None,
    )
    hot: list[str] = []
    if target == "tensorrt":
        formed = start.formed(serving)
        names = body_nodes(formed)
        largest = largest_values(formed, names, calibration.faces[:OVERFLOW_FACES], stage("largest values"))
        hot = overflowing(formed, largest)
    if wish.precision == "fp16":
        return replace(start, keep=tuple(dict.fromkeys([*wish.keep, *hot])))
    histograms = collect_histograms(serving, conv_inputs(serving), calibration.faces, stage("calibration"))
    ranges = {t: {name: least_error_range(h, t) for name, h in histograms.items()} for t in LEVELS}
    # The first convolution reads pixels: with three channels int8 gains nothing.
    keep = tuple(dict.fromkeys([*wish.keep, *quantizable_layers(serving)[:1]]))
    return replace(start, keep=keep, keep_fp32=tuple(hot), ranges=ranges)


def _search(
    name: str, serving: onnx.ModelProto, start: Recipe, trial: Trial, runtimes: tuple[str, ...], picture: Path
) -> Recipe:
    """The recipe that reaches the aim of `trial` with the fewest layers kept, starting from `start`; plots the search.

    Raises:
        ProofFailed: no set of layers reaches it.
    """
    first = trial.judge_everywhere(start.stand_in(serving), runtimes, "as requested")
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

    def attempt(keep: Sequence[str]) -> VariantVerdict:
        if tuple(keep) == start.keep:
            return first
        candidate = replace(start, keep=nodes_of(keep)).stand_in(serving)
        return trial.judge_everywhere(candidate, runtimes, f"{len(keep)} of {len(layers)} layers kept")

    probes = trial.faces.sample(PROBE_FACES).faces
    progress = trial.stage("sensitivity of each layer")
    sensitivity = measure_sensitivities(serving, layers, coarsen, probes, progress)
    result = smallest_passing_set(sensitivity, layer_work(serving), attempt, start.keep)
    _draw(picture, name, trial, start, result, sensitivity)
    if result.keep is None:
        raise ProofFailed(_not_reached(name, start.precision, trial, result))
    record = {"sensitivity": sensitivity, **result.to_json()}
    return replace(start, keep=nodes_of(result.keep), search=record)


def _draw(
    path: Path, name: str, trial: Trial, start: Recipe, result: SearchResult, sensitivity: dict[str, float]
) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return  # the recipe has the same figures
    from arcface_build.variants.plot import draw_search

    title = f"{name}: {start.precision} for {start.target}, {len(trial.faces.faces)} faces"
    draw_search(path, title, result, sensitivity, trial.limits[start.precision], start.keep)


def _advice(wish: Wish) -> str:
    if wish.precision == "bf16":
        return "Serve fp32 instead, or try: --precision int8"
    if not wish.search:
        return "Try --search, which finds the layers to keep"
    return "Calibrate with faces like those (--calibration, --eval), or aim lower: --margin 0.25"


def _not_reached(name: str, precision: str, trial: Trial, result: SearchResult) -> str:
    best = min(result.attempts, key=lambda attempt: attempt.max_drift)
    return (
        f"no set of layers brings {precision} of {name} to drift {trial.limits[precision]:.3g} on the faces of the "
        f"search (least: {best.max_drift:.3g}, {best.kept} layers kept). Nothing was written. Try a precision "
        "with more bits, or aim closer to the limit: --margin 0.9"
    )


def _check(wish: Wish, manifest: ImportManifest) -> str:
    """The target, after rejecting impossible combinations."""
    target = wish.target or TARGETS[wish.precision][0]
    if target not in TARGETS[wish.precision]:
        hint = "OpenVINO runs the fp32 file in bf16" if wish.precision == "bf16" else "CPUs compute fp16 as fp32: bf16"
        raise WrongUse(
            f"no {wish.precision} for {target}: expected --target {' or '.join(TARGETS[wish.precision])} ({hint})."
        )
    synthetic = (wish.calibration or wish.eval_source) == "synthetic"
    if wish.precision == "int8" and synthetic and not wish.recipe and manifest.source.get("kind") != "demo":
        raise WrongUse(
            f"int8 of {manifest.name} needs real crops: ranges of synthetic faces do not fit. Next: arcface quantize "
            f"{manifest.name} --precision int8 --eval FOLDER (112×112 crops, one subfolder per person)"
        )
    if wish.precision == "bf16":
        if not has_openvino():
            raise Missing(f"bf16 on a CPU needs OpenVINO. Next: {how_to_get('onnxruntime-openvino')} (not onnxruntime)")
        if not has_bf16(cpu_flags()):
            raise Missing(
                "this CPU has no bf16 instructions (avx512_bf16, amx_bf16): OpenVINO would silently compute in fp32, "
                "and the gate would prove nothing. Run this on a CPU that has them, or try: --precision int8"
            )
    return target


def load_named(path: Path) -> onnx.ModelProto:
    """The model with a name for each node, so that recipes can refer to nodes."""
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
