"""Make a variant: a model folder and a wish in; the gated variant with its sidecar in models/NAME/variants/, out.

variants/int8-cpu.onnx            what passed; `file` of the sidecar names it
variants/int8-cpu.json            sidecar: contract id, recipe, calibration, gates, sha256
variants/int8-cpu.search.png      drift against layers kept, where there was a search
variants/int8-cpu.onnx.refused    what failed its gate, with .json.refused beside it; never served
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arcface_build.atomic import new_file, write_json
from arcface_build.cpu_path import cpu_flags, fast_runtime, has_bf16, has_openvino, open_session
from arcface_build.errors import Missing, ProofFailed, WrongUse
from arcface_build.variants.calibrate import LEVELS, collect_histograms, conv_inputs, least_error_range
from arcface_build.variants.eval_set import FaceSet, load_faces
from arcface_build.variants.gate import Progress, Verdict, embed_all, judge, refusal
from arcface_build.variants.int8 import make_coarse, quantizable_layers
from arcface_build.variants.recipe import Recipe, load_recipe
from arcface_build.variants.search import SearchResult, layer_work, smallest_passing_set
from arcface_build.variants.sensitivity import measure_sensitivities
from arcface_build.variants.typed import body_nodes, largest_values, overflowing, to_float16
from arcface_clients.drift import DRIFT_LIMITS

if TYPE_CHECKING:
    import onnx

TARGETS = {"fp16": ("tensorrt",), "bf16": ("cpu",), "int8": ("cpu", "tensorrt")}  # the first is the default
CALIBRATION_FACES = 64
PROBE_FACES = 8
Stage = Callable[[str], Progress]


@dataclass(frozen=True)
class Wish:
    """What to make; None means the default.

    Attributes:
        precision: fp16, bf16 or int8.
        target: cpu or tensorrt.
        eval_source, eval_faces: faces to judge by (`eval_set.load_faces`) and at most how many.
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


def _silent(title: str) -> Progress:
    return lambda done, total: None


def make_variant(model_dir: Path, wish: Wish, stage: Stage = _silent) -> dict[str, Any]:
    """Make, judge and write one variant; returns its sidecar.

    Args:
        model_dir: models/NAME/ as `arcface import` writes it.
        wish: what to make.
        stage: gets a title, gives the progress callback of that stage.

    Raises:
        ProofFailed: it does not pass its gate; it is kept as .refused beside its report.
        Missing, WrongUse: no such model, no faces, a combination that does not exist.
    """
    manifest, serving_path = _read_manifest(model_dir)
    target = _check(wish, manifest)
    limit = DRIFT_LIMITS[wish.precision] if wish.limit is None else wish.limit
    faces = load_faces(wish.eval_source, wish.eval_faces)
    serving_sha256 = _sha256(serving_path)
    reference = _reference(model_dir, serving_path, serving_sha256, faces, stage)
    runtimes = _runtimes(wish.precision, target)
    bench = _Bench(manifest["name"], wish.precision, limit, reference, faces, stage)

    if wish.precision == "bf16":
        recipe, model, search_picture = None, None, None
    else:
        serving = _load_named(serving_path)
        if wish.recipe:
            recipe, search_picture = load_recipe(wish.recipe, wish.precision, target, serving_sha256), None
        else:
            start = _start(wish, target, serving, serving_sha256, manifest, faces, stage)
            recipe, search_picture = _search(wish, serving, start, bench, runtimes[0], stage)
        model = recipe.apply(serving)
    verdicts = [bench.judge(model or serving_path, runtime) for runtime in runtimes]
    return _write(
        model_dir, manifest, serving_sha256, wish.precision, target, model, recipe, verdicts, faces, search_picture
    )


@dataclass(frozen=True)
class _Bench:
    """What every candidate is judged by."""

    name: str
    precision: str
    limit: float
    reference: np.ndarray
    faces: FaceSet
    stage: Stage

    def judge(self, model: Path | onnx.ModelProto, runtime: str, title: str | None = None) -> Verdict:
        session = open_session(model, runtime)
        progress = self.stage(title or f"gate in {runtime}")
        embeddings = embed_all(session, self.faces.faces, progress)
        return judge(runtime, self.precision, self.limit, self.reference, embeddings, self.faces)


def _start(
    wish: Wish,
    target: str,
    serving: onnx.ModelProto,
    serving_sha256: str,
    manifest: dict[str, Any],
    faces: FaceSet,
    stage: Stage,
) -> Recipe:
    """The recipe before any search: calibrated, with what has to be kept in any case."""
    unknown = set(wish.keep) - {n.name for n in serving.graph.node}
    if unknown:
        raise WrongUse(
            f"--keep names no node: {', '.join(sorted(unknown))}. Layers: {', '.join(quantizable_layers(serving))}"
        )
    if wish.calibration:
        calibration = load_faces(wish.calibration, CALIBRATION_FACES, seed=1)
    elif wish.eval_source == "synthetic":
        calibration = load_faces("synthetic", CALIBRATION_FACES, seed=1)
    else:
        calibration = faces.sample(CALIBRATION_FACES, seed=1)
    recipe = Recipe(wish.precision, target, serving_sha256, wish.keep, calibration=calibration.to_json())
    if wish.precision == "fp16":
        names = body_nodes(serving)
        largest = largest_values(serving, names, calibration.faces[:16], stage("largest values"))
        return replace(recipe, keep=tuple(dict.fromkeys([*wish.keep, *overflowing(serving, largest)])))
    histograms = collect_histograms(serving, conv_inputs(serving), calibration.faces, stage("calibration"))
    ranges = {t: {name: least_error_range(h, t) for name, h in histograms.items()} for t in LEVELS}
    # The first convolution reads pixels: three channels give int8 nothing to win.
    keep = tuple(dict.fromkeys([*wish.keep, quantizable_layers(serving)[0]]))
    return replace(recipe, keep=keep, ranges=ranges)


def _search(
    wish: Wish, serving: onnx.ModelProto, start: Recipe, bench: _Bench, runtime: str, stage: Stage
) -> tuple[Recipe, Callable[[Path], None] | None]:
    """The recipe that passes with the least kept, and how to draw it; the start where it passes or nothing does."""
    if not wish.search:
        return start, None
    first = bench.judge(start.apply(serving), runtime, "as asked for")
    if first.passed:
        return start, None
    layers = quantizable_layers(serving)
    ranges = start.ranges.get(start.target, {})

    def coarsen(part: onnx.ModelProto, layer: str) -> None:
        if start.precision == "int8":
            make_coarse(part, layer, ranges, start.target)
        else:
            part.CopyFrom(to_float16(part, keep=set(body_nodes(part)) - {layer}))

    probes = bench.faces.sample(PROBE_FACES).faces
    sensitivity = measure_sensitivities(serving, layers, coarsen, probes, stage("sensitivity of each layer"))
    known = [first]

    def attempt(keep: Sequence[str]) -> Verdict:
        if known:  # the start has been judged already
            return known.pop()
        candidate = replace(start, keep=tuple(keep)).apply(serving)
        return bench.judge(candidate, runtime, f"{len(keep)} of {len(layers)} layers kept")

    result = smallest_passing_set(sensitivity, layer_work(serving), attempt, start.keep)
    found = replace(
        start,
        keep=start.keep if result.keep is None else result.keep,
        search={"sensitivity": sensitivity, **result.to_json()},
    )
    return found, _picture(bench, start, result, sensitivity)


def _picture(
    bench: _Bench, start: Recipe, result: SearchResult, sensitivity: dict[str, float]
) -> Callable[[Path], None]:
    def draw(path: Path) -> None:
        from arcface_build.variants.plot import draw_search

        title = f"{bench.name}: {start.precision} for {start.target}, {len(bench.faces.faces)} faces"
        draw_search(path, title, result, sensitivity, bench.limit, start.keep)

    return draw


def _write(
    model_dir: Path,
    manifest: dict[str, Any],
    serving_sha256: str,
    precision: str,
    target: str,
    model: onnx.ModelProto | None,
    recipe: Recipe | None,
    verdicts: list[Verdict],
    faces: FaceSet,
    search_picture: Callable[[Path], None] | None,
) -> dict[str, Any]:
    """Write the variant under its name, or as .refused where the first verdict (the runtime it is for) is no."""
    folder, name = model_dir / "variants", f"{precision}-{target}"
    passed = verdicts[0].passed
    suffix = "" if passed else ".refused"
    sidecar_path = folder / f"{name}.json{suffix}"
    if search_picture:
        search_picture(folder / f"{name}.search.png")
    if model is None:
        file, digest = "serving.onnx", serving_sha256
    else:
        file = f"variants/{name}.onnx{suffix}"
        sidecar_path.unlink(missing_ok=True)  # never a sidecar beside a file that is not its own
        with new_file(model_dir / file) as temporary:
            temporary.write_bytes(model.SerializeToString(deterministic=True))
        digest = _sha256(model_dir / file)
    sidecar = {
        "format": 1,
        "name": manifest["name"],
        "precision": precision,
        "target": target,
        "file": file,
        "sha256": digest,
        "serving_sha256": serving_sha256,
        "contract_id": manifest["contract_id"],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "passed": passed,
        "gates": [verdict.to_json() for verdict in verdicts],
        "eval": faces.to_json(),
        "recipe": recipe.to_json() if recipe else None,
        "tools": {package: version(package) for package in ("onnx", "numpy")} | {"onnxruntime": _onnxruntime_version()},
    }
    write_json(sidecar_path, sidecar)
    if passed:
        for stale in (folder / f"{name}.onnx.refused", folder / f"{name}.json.refused"):
            stale.unlink(missing_ok=True)
        return sidecar
    raise ProofFailed(f"{refusal(manifest['name'], precision, verdicts[0])} {_advice(recipe, sidecar_path)}")


def _advice(recipe: Recipe | None, report: Path) -> str:
    if recipe is None:
        what = "Serve fp32 instead"
    elif recipe.search is None:
        what = "Try --search, which finds the layers to keep"
    else:
        what = "No set of layers passes: try --calibration with crops like yours, or a precision with more bits"
    return f"{what}. Kept beside its report, never served: {report}"


def _check(wish: Wish, manifest: dict[str, Any]) -> str:
    """The target, after refusing what cannot work."""
    if wish.precision not in TARGETS:
        raise WrongUse(f"no precision {wish.precision!r}: expected {', '.join(TARGETS)}.")
    target = wish.target or TARGETS[wish.precision][0]
    if target not in TARGETS[wish.precision]:
        hint = (
            "bf16 on a CPU runs the fp32 file" if wish.precision == "bf16" else "a CPU computes fp16 as fp32; use bf16"
        )
        raise WrongUse(
            f"no {wish.precision} for {target}: expected --target {' or '.join(TARGETS[wish.precision])} ({hint})."
        )
    demo = manifest.get("source", {}).get("kind") == "demo"
    if (
        wish.precision == "int8"
        and not wish.recipe
        and not demo
        and (wish.calibration or wish.eval_source) == "synthetic"
    ):
        raise WrongUse(
            f"int8 of {manifest['name']} needs real crops: ranges from drawn faces do not fit real ones. "
            "Next: arcface quantize … --eval FOLDER (112×112 crops, a sub-folder a person), or --calibration FOLDER"
        )
    if wish.precision == "bf16":
        if not has_openvino():
            raise Missing(
                "bf16 on a CPU needs OpenVINO. Next: pip install onnxruntime-openvino (instead of onnxruntime)"
            )
        if not has_bf16(cpu_flags()):
            raise Missing(
                "this CPU has no bf16 instructions (avx512_bf16, amx_bf16): OpenVINO would quietly compute in fp32, "
                "and the gate would prove nothing. Run this on a CPU that has them, or try: --precision int8"
            )
    return target


def _runtimes(precision: str, target: str) -> list[str]:
    """Where a variant is judged: first the runtime that it is for, then the other one that may serve it."""
    if precision == "bf16":
        return ["openvino-bf16"]
    if target == "tensorrt":
        return ["onnxruntime"]  # computes Q/DQ as written, whatever the signedness
    fast = fast_runtime()
    return [fast, "openvino-fp32"] if fast == "openvino-bf16" else [fast]


def _reference(model_dir: Path, serving: Path, sha256: str, faces: FaceSet, stage: Stage) -> np.ndarray:
    """Embeddings of the fp32 serving ONNX in ONNX Runtime; kept, because every variant is judged by the same ones."""
    kept = model_dir / "variants" / f"reference-{sha256[:12]}-{faces.sha256[:12]}.npy"
    if kept.is_file():
        return np.load(kept)
    embeddings = embed_all(open_session(serving), faces.faces, stage("reference embeddings"))
    with new_file(kept) as temporary, temporary.open("wb") as file:
        np.save(file, embeddings)
    return embeddings


def _read_manifest(model_dir: Path) -> tuple[dict[str, Any], Path]:
    path = model_dir / "manifest.json"
    if not path.is_file():
        raise Missing(f"no imported model in {model_dir}: expected manifest.json there. Next: arcface import SOURCE")
    manifest = json.loads(path.read_text())
    serving = model_dir / manifest.get("serving", {}).get("file", "serving.onnx")
    if not serving.is_file():
        raise Missing(f"{serving} is gone, though {path} names it. Next: arcface import SOURCE again")
    return manifest, serving


def _load_named(path: Path) -> onnx.ModelProto:
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


def _onnxruntime_version() -> str:
    import onnxruntime  # one import name, three wheels

    return onnxruntime.__version__


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
