"""Judges a variant on faces with known fp32 embeddings, in one runtime or in all that may serve it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arcface_build.imports.proof import OnCount
from arcface_build.variants.eval_set import FaceSet
from arcface_build.variants.gate import VariantVerdict, embed_all, judge_variant
from arcface_build.variants.sidecar import variants_folder
from arcface_clients.atomic import new_file
from arcface_clients.engines.import_manifest import ImportManifest
from arcface_clients.engines.runtimes import fast_runtime, open_session

if TYPE_CHECKING:
    import onnx

Stage = Callable[[str], OnCount]
"""Takes the title of a stage of the work and returns its progress callback."""


def silent(title: str) -> OnCount:
    """A stage that shows nothing."""
    return lambda done, total: None


@dataclass(frozen=True)
class Trial:
    """What a candidate is judged against: `reference` holds the fp32 serving ONNX's embeddings (N,D) of `faces`.

    rounded: candidates are stand-ins that round to float16 as a GPU would (`Recipe.stand_in`); the verdict says so.
    """

    precision: str
    limits: Mapping[str, float]
    faces: FaceSet
    reference: np.ndarray
    stage: Stage
    rounded: bool = False

    def judge(self, model: Path | onnx.ModelProto, runtime: str, title: str) -> VariantVerdict:
        """The verdict in one runtime."""
        embeddings = embed_all(open_session(model, runtime), self.faces.faces, self.stage(title))
        label = f"{runtime} with float16 rounding" if self.rounded else runtime
        return judge_variant(label, self.precision, self.limits, self.reference, embeddings, self.faces)

    def judge_everywhere(self, model: Path | onnx.ModelProto, runtimes: tuple[str, ...], title: str) -> VariantVerdict:
        """The first refusal, else the verdict with the most drift: a variant may be served in each runtime."""
        verdicts = []
        for runtime in runtimes:
            verdicts.append(self.judge(model, runtime, title if len(runtimes) == 1 else f"{title}: {runtime}"))
            if not verdicts[-1].passed:
                return verdicts[-1]
        return max(verdicts, key=lambda verdict: verdict.max_drift)

    def aiming_at(self, share: float) -> Trial:
        """The same trial with this share of each limit."""
        return replace(self, limits={precision: share * limit for precision, limit in self.limits.items()})


def open_trial(
    model_dir: Path,
    manifest: ImportManifest,
    precision: str,
    target: str,
    limits: Mapping[str, float],
    faces: FaceSet,
    stage: Stage,
) -> Trial:
    """A trial on these faces; the reference's embeddings are computed once, for all variants."""
    kept = variants_folder(model_dir) / f"reference-{manifest.serving['sha256'][:12]}-{faces.sha256[:12]}.npy"
    if kept.is_file():
        return Trial(precision, limits, faces, np.load(kept), stage, target == "tensorrt")
    serving = open_session(model_dir / manifest.serving["file"])
    embeddings = embed_all(serving, faces.faces, stage("reference embeddings"))
    with new_file(kept) as temporary, temporary.open("wb") as file:
        np.save(file, embeddings)
    return Trial(precision, limits, faces, embeddings, stage, target == "tensorrt")


def runtimes_for(precision: str, target: str) -> tuple[str, ...]:
    """Where a variant is judged: first its main runtime, then others that may serve it on another CPU."""
    if precision == "bf16":
        return ("openvino-bf16",)
    if target == "tensorrt":
        return ("onnxruntime",)  # computes Q/DQ as written, whatever the signedness
    fast = fast_runtime()
    return (fast, "openvino-fp32") if fast == "openvino-bf16" else (fast,)
