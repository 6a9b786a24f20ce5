"""A plan's path, a model repository and a plan cache in; the plan for this GPU and what its manifest says out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arcface_clients.errors import ModelMissing


@dataclass(frozen=True)
class PlanFile:
    """A plan on this host; `manifest` is {} where there is none beside it."""

    path: Path
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def contract_id(self) -> str | None:
        """Contract id, None where the manifest does not say."""
        return self.manifest.get("contract_id")

    @property
    def precision(self) -> str | None:
        """Precision that was proved when the plan was built, None where the manifest does not say."""
        return self.manifest.get("spec", {}).get("precision") or self.manifest.get("precision")

    def check(self, sm: str | None, tensorrt: str) -> None:
        """Refuse, before it is loaded, what cannot load or is damaged.

        Raises:
            ModelMissing: of another SM or TensorRT version, truncated or changed; falls back.
        """
        spec = self.manifest.get("spec", {})
        command = f"arcface plan build --precision {self.precision or 'fp16'}"
        if spec.get("tensorrt") and spec["tensorrt"].split("+")[0] != tensorrt.split("+")[0]:
            raise ModelMissing(f"{self.path} was built with TensorRT {spec['tensorrt']}, this is {tensorrt}. {command}")
        if sm and spec.get("sm") and spec["sm"] != sm and not spec.get("options", {}).get("hardware_compatible"):
            raise ModelMissing(f"{self.path} was built for SM {spec['sm']}, this GPU is SM {sm}. {command}")
        expected = self.manifest.get("sha256")
        if expected:
            got = _sha256(self.path)
            if got != expected:
                raise ModelMissing(
                    f"{self.path} is truncated or changed: expected sha256 {expected[:12]}…, got {got[:12]}…. "
                    "Delete it and get it again: arcface plan pull, or arcface plan build"
                )


def find_plan(
    sm: str,
    precision: str,
    *,
    model_repository: Path,
    cache: Path,
    model: str | None = None,
    tensorrt: str | None = None,
) -> PlanFile:
    """The plan for this SM: what `arcface assemble` put into arcface_trt, else the plan cache.

    Raises:
        ModelMissing: none there; the message lists the plans that are. Falls back.
    """
    digits = sm.replace(".", "")
    trt = model_repository / "arcface_trt"
    for folder in sorted((p for p in trt.glob("*") if p.name.isdecimal()), key=lambda p: -int(p.name)):
        served = folder / f"sm{digits}.plan"
        if served.is_file():
            return PlanFile(served, _manifest_of(served))
    found = [PlanFile(path, _manifest_of(path)) for path in sorted(cache.expanduser().rglob("*-sm*.plan"))]
    fitting = [
        plan
        for plan in found
        if plan.path.stem.endswith(f"-{precision}-sm{digits}")
        and (model is None or plan.path.name == f"{model}-{precision}-sm{digits}.plan")
        and (tensorrt is None or plan.manifest.get("spec", {}).get("tensorrt", tensorrt) == tensorrt)
    ]
    if fitting:
        return max(fitting, key=lambda plan: plan.path.stat().st_mtime)
    there = ", ".join(sorted({plan.path.stem for plan in found})) or "none"
    raise ModelMissing(
        f"no {precision} plan for SM {sm} in {trt} or {cache} (plans there: {there}). "
        f"Build one here: arcface plan build --precision {precision}, or fetch one: arcface plan pull"
    )


def read_plan(path: Path) -> PlanFile:
    """A plan that was named.

    Raises:
        ModelMissing: it is not there. Falls back.
    """
    if not path.is_file():
        raise ModelMissing(f"no plan at {path} (local.plan). Build one: arcface plan build")
    return PlanFile(path, _manifest_of(path))


def _manifest_of(plan: Path) -> dict[str, Any]:
    """NAME.plan.json or manifest.json beside it; in the cache KEY/manifest.json for KEY/SHA256/NAME.plan."""
    candidates = (
        plan.with_name(plan.name + ".json"),
        plan.with_name("manifest.json"),
        plan.parent.parent / "manifest.json",
    )
    for file in candidates:
        if file.is_file():
            try:
                data = json.loads(file.read_text())
            except (OSError, ValueError):
                return {}
            return data if isinstance(data, dict) and data.get("file", plan.name) == plan.name else {}
    return {}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
