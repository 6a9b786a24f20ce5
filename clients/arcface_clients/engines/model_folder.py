"""Finds an imported model's folder, and the files and facts in it that in-process engines need."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcface_clients.contract import Preprocessing
from arcface_clients.engines.import_manifest import DEMO, IMPORT_MANIFEST, ImportManifest, read_import_manifest
from arcface_clients.engines.onnx_contract import contract_in
from arcface_clients.errors import ArcFaceError, ConfigError, ContractMismatch, GateFailed, Missing, ModelMissing
from arcface_clients.plans.find import newest_version
from arcface_clients.plans.manifest import file_sha256


@dataclass(frozen=True)
class ModelFolder:
    """One imported model: models/NAME/ with serving.onnx, source.onnx, manifest.json and variants/."""

    path: Path
    manifest: ImportManifest | None = None

    @property
    def contract_id(self) -> str | None:
        """Contract id that the import wrote; None if there is no manifest."""
        return self.manifest.contract_id if self.manifest else None

    @property
    def preprocessing(self) -> Preprocessing:
        """What the source network expects; InsightFace's defaults if there is no manifest."""
        return self.manifest.wants() if self.manifest else Preprocessing()

    @property
    def source_sha256(self) -> str | None:
        """Digest of the source ONNX; None if there is no manifest."""
        return str(self.manifest.source["sha256"]) if self.manifest else None

    def serving(self, precision: str = "fp32") -> Path:
        """The ONNX file of a precision; bf16 is computed from the fp32 file, fp16 has one file for all targets.

        Raises:
            ModelMissing: no such file; the message lists the variants that exist. Falls back.
        """
        name = self.path.name
        variant = {"fp16": "fp16-tensorrt", "int8": "int8-cpu"}.get(precision)
        if precision == "bf16" and self._refused("bf16-cpu"):
            raise ModelMissing(
                f"the gate refused bf16 of model {name}; see {self.path / 'variants'}"
                f"/bf16-cpu.json.refused. Judge it again: arcface quantize {name} --precision bf16"
            )
        if variant is None:
            file, command = self.path / "serving.onnx", f"arcface import SOURCE --name {name}"
        else:
            file = self.path / "variants" / f"{variant}.onnx"
            command = f"arcface quantize {name} --precision {precision}"
        if not file.is_file():
            there = sorted(found.stem for found in (self.path / "variants").glob("*.onnx"))
            state = "which its gate refused" if file.with_name(f"{file.name}.refused").exists() else "not found"
            raise ModelMissing(
                f"no {precision} ONNX of model {name}: expected {file}, {state} (variants found: "
                f"{', '.join(there) or 'none'}). Make it: {command}"
            )
        return file

    def check_proved(self, file: Path) -> None:
        """Refuse a file of this folder that is not the one that the import proved, or a variant's gate judged.

        Every door calls it: what assemble installs, and what an engine in the process loads. A file about which the
        folder records nothing is left to the caller.

        Raises:
            GateFailed: it was refused, replaced since, or made from another import's serving ONNX.
            ContractMismatch: its answers would name another contract than the manifest.
            Missing: it is gone.
        """
        name = self.path.name
        if file.suffix == ".refused":
            raise GateFailed(f"{file}: its gate refused it. Use another: arcface import, or arcface quantize {name}")
        told: dict[str, Any] = sidecar_of(file) or {} if file.parent == self.path / "variants" else self._part(file)
        expected, again = told.get("sha256"), "arcface quantize" if "serving_sha256" in told else "arcface import"
        if not file.is_file():
            raise Missing(f"{file} is gone, though its manifest names it. Make it again: {again}")
        if expected is not None and expected != (got := file_sha256(file)):
            raise GateFailed(
                f"{file} is not the file that was proved: expected sha256 {str(expected)[:12]}…, got {got[:12]}…. "
                f"Make it again: {again}"
            )
        made_from = told.get("serving_sha256")
        serving = self.manifest.serving.get("sha256") if self.manifest else None
        if None not in (made_from, serving) and made_from != serving:
            raise GateFailed(
                f"{file} was made from another serving ONNX ({str(made_from)[:12]}…) than that of {name} "
                f"({str(serving)[:12]}…). Make it again: arcface quantize {name}"
            )
        named = contract_in(file)
        if named is not None and self.contract_id is not None and named != self.contract_id[:32]:
            raise ContractMismatch(
                f"{file} names contract {named[:12]}… in its answers, the manifest of {name} {self.contract_id[:12]}…: "
                "expected the same. Import the model again: arcface import SOURCE"
            )

    def _part(self, file: Path) -> dict[str, Any]:
        """What the manifest records of one of its own files."""
        known = self.manifest
        if known is None or file.parent != self.path:
            return {}
        parts = (known.serving, known.cpu, known.winograd, known.source.get("copy"))
        return next((part for part in parts if part and part.get("file") == file.name), {})

    def _refused(self, variant: str) -> bool:
        """Whether the latest verdict on a variant without its own file was a refusal."""
        sidecar = self.path / "variants" / f"{variant}.json"
        return not sidecar.exists() and sidecar.with_name(f"{sidecar.name}.refused").exists()

    def source(self) -> Path:
        """The imported ONNX, which the reference runs.

        Raises:
            ModelMissing: it does not exist. Falls back.
        """
        file = self.path / "source.onnx"
        if not file.is_file():
            raise ModelMissing(
                f"the reference needs the source ONNX: expected {file}, not found. "
                f"Import it again: arcface import SOURCE --name {self.path.name}"
            )
        return file

    def sidecar(self, precision: str) -> dict[str, Any] | None:
        """The sidecar of the variant for CPUs: without gates if only a refused one exists, None if there is none."""
        file = self.path / "variants" / f"{precision}-cpu.json"
        if file.is_file():
            return _read_json(file)
        return {"gates": []} if file.with_name(f"{file.name}.refused").is_file() else None


def sidecar_of(file: Path) -> dict[str, Any] | None:
    """What `arcface quantize` wrote beside a variant (NAME.json for NAME.onnx); None if there is none."""
    sidecar = file.with_suffix(".json")
    return _read_json(sidecar) if sidecar.is_file() else None


def find_model(
    models_dir: str | Path,
    model: str | None = None,
    served: Callable[[], str | None] = lambda: None,
    model_repository: Path | None = None,
) -> ModelFolder:
    """The model of this name; else the one that the server serves, the only one, or the one that is installed.

    Demo networks do not count beside an own model, unless the server serves one.

    Args:
        models_dir: the folder of imported models.
        model: its name, if it was stated.
        served: the contract id that the server names, or its beginning; None if none answers. Asked only where there
            are several models.
        model_repository: where a model may be installed; asked only where that leaves several.

    Raises:
        ModelMissing: no models, or none of this name; the message lists what exists. Falls back.
        ConfigError: there are several, no name was given, and none is served or installed.
    """
    root = Path(models_dir).expanduser()
    there = sorted(file.parent.name for file in root.glob("*/serving.onnx"))
    if model is None:
        if not there:
            raise ModelMissing(f"no model in {root.absolute()}. Import one: arcface import SOURCE (or: import demo)")
        model = there[0] if len(there) == 1 else _meant(root, there, served, model_repository)
    elif model not in there:
        raise ModelMissing(
            f"no model {model!r} in {root} (found: {', '.join(there) or 'none'}). "
            f"Import it: arcface import SOURCE --name {model}"
        )
    known = (root / model / IMPORT_MANIFEST).is_file()
    return ModelFolder(root / model, read_import_manifest(root / model) if known else None)


@dataclass
class WantedModel:
    """Which model an engine runs: that of a file, or what `find_model` finds at the first use and keeps.

    Attributes:
        file: of the model; None: the others say which.
        models_dir, model, served, model_repository: see `find_model`.
    """

    file: Path | None
    models_dir: str | Path
    model: str | None
    served: Callable[[], str | None]
    model_repository: Path | None

    def folder(self) -> ModelFolder:
        """The model's folder.

        Raises:
            ModelMissing, ConfigError: see `find_model`.
        """
        if self.file is not None:
            return folder_of(self.file)
        folder = find_model(self.models_dir, self.model, self.served, self.model_repository)
        self.model = folder.path.name  # it stays with that, whatever is imported or served later
        return folder


def _meant(root: Path, there: list[str], served: Callable[[], str | None], model_repository: Path | None) -> str:
    """Which of several models is meant by whoever names none."""
    manifests = {model: _manifest(root / model) for model in there}
    contracts = {model: manifest.contract_id for model, manifest in manifests.items() if manifest}
    answer = served()
    if of_server := [model for model, contract in contracts.items() if answer and contract.startswith(answer)]:
        return of_server[0]
    own = [model for model in there if not ((known := manifests[model]) and known.source.get("kind") == DEMO)] or there
    here = installed_contract(model_repository) if model_repository and len(own) > 1 else None
    own = [model for model in own if here and contracts.get(model) == here][:1] or own
    if len(own) > 1:
        raise ConfigError(
            f"{root} contains {len(own)} models ({', '.join(own)}), and none of them is served: "
            "choose one with local.model (--model NAME)."
        )
    return own[0]


def installed_contract(model_repository: Path) -> str | None:
    """Contract id of the newest version of arcface_onnx, which `arcface serve` starts with; None if there is none."""
    version = newest_version(model_repository / "arcface_onnx")
    manifest = _manifest(version) if version else None
    return manifest.contract_id if manifest else None


def _manifest(folder: Path) -> ImportManifest | None:
    try:
        return read_import_manifest(folder)
    except ArcFaceError:  # reported by whoever uses that model
        return None


def folder_of(file: Path) -> ModelFolder:
    """The model folder that a serving ONNX, a variant or a source belongs to, by the manifest beside or above it."""
    for parent in (file.parent, file.parent.parent):
        if (parent / IMPORT_MANIFEST).is_file():
            return ModelFolder(parent, read_import_manifest(parent))
    return ModelFolder(file.parent)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{file}: cannot be read ({exc}). Make the variant again: arcface quantize") from exc
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {type(data).__name__}. Make it again: arcface quantize")
    return data
