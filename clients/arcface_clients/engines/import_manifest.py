"""The manifest that `arcface import` writes beside a model: what it was made from, how, and the proof.

It is defined here, in the lowest layer that reads it; the build writes the same class.
"""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from arcface_clients.contract import Preprocessing, contract_id
from arcface_clients.errors import Missing, WrongUse

FORMAT = 1
IMPORT_MANIFEST = "manifest.json"
DEMO = "demo"  # source.kind of random weights


@dataclass(frozen=True)
class ImportManifest:
    """models/NAME/manifest.json. Digests are sha256 in hex, `created` is UTC; the keys of the dicts:

    source: sha256 and file (as given by the user), kind (file, known, pack, demo), licence, url, note, recipe (of
        a demo), copy: file, sha256 and exact (false if source.onnx is a repaired or joined version of it).
    flavour: the fields of `arcface_build.imports.flavour.Flavour`.
    preprocessing: color, mean, std (0..255 units) that the file is fed and `why`; stated: the parts that the user said;
        network: color, mean, std as the network sees pixels, outside and inside the graph together, or None;
        look: see `arcface_build.imports.second_look.Look`, None for a file whose preprocessing is known.
    steps: step, changed, why, in the order in which they ran.
    serving: file, sha256, opset, bytes, conversion.
    proof: see `arcface_build.imports.proof.Proof`.
    tools: package → version.
    cpu: the same network laid out for ONNX Runtime's CPU provider (graph.blocked_layout): file, sha256, bytes, why,
        min_cosine, max_row_difference; None if that changes nothing.
    winograd: the same network with 3×3 convolutions by Winograd's method (graph.winograd); as `cpu`.
    golden: see `arcface_clients.evidence.golden`; None in imports made before it was kept.
    """

    name: str
    created: str
    source: dict[str, Any]
    flavour: dict[str, Any]
    preprocessing: dict[str, Any]
    dim: int
    contract_id: str
    steps: list[dict[str, Any]]
    serving: dict[str, Any]
    proof: dict[str, Any]
    tools: dict[str, str]
    precision: str = "fp32"
    cpu: dict[str, Any] | None = None
    winograd: dict[str, Any] | None = None
    golden: str | None = None
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """A JSON object with `format` first."""
        return {"format": self.format, **{k: v for k, v in asdict(self).items() if k != "format"}}

    def wants(self) -> Preprocessing:
        """The preprocessing that the source network expects, as the contract's class."""
        return Preprocessing.from_json(self.preprocessing)


def check_name(name: str, how: str = "") -> str:
    """The name of a model, which works as a folder and as an S3 key; `how` ends the refusal.

    Raises:
        WrongUse: it does not: a path, a blank, 64 characters or more.
    """
    if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}", name):
        raise WrongUse(f"{name!r} cannot be a model's name: expected letters, digits, '.', '_', '-'. {how}".rstrip())
    return name


def model_at(models_dir: Path, name: str) -> Path:
    """The folder of an imported model, which need not exist: models_dir/NAME.

    Raises:
        WrongUse: a path was given where a name is expected.
    """
    return models_dir / check_name(name, f"Name a folder of {models_dir}; another place: --models-dir FOLDER")


def read_import_manifest(folder: Path) -> ImportManifest:
    """The manifest of a model folder, or of a model repository version made from one.

    Raises:
        Missing: there is none.
        WrongUse: it is not JSON, has another format, or a field is missing or invalid; or what the contract id is
            made of was changed, which would give other embeddings the same name.
    """
    path = folder / IMPORT_MANIFEST
    again = "Import the model again: arcface import SOURCE"
    if not path.is_file():
        there = sorted(file.parent.name for file in folder.parent.glob(f"*/{IMPORT_MANIFEST}"))
        beside = f" ({folder.parent} contains {', '.join(there)})" if there else ""
        raise Missing(
            f"no imported model in {folder}: expected {IMPORT_MANIFEST} there{beside}. "
            "Import it: arcface import SOURCE."
        )
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as exc:
        raise WrongUse(f"{path} is not JSON ({exc}). {again}.") from exc
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        got = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise WrongUse(f"{path} has format {got!r}: expected {FORMAT}. {again}.")
    known = {field.name: field for field in fields(ImportManifest)}
    missing = [name for name, field in known.items() if field.default is MISSING and name not in data]
    if missing:
        raise WrongUse(f"{path} lacks {', '.join(missing)}. {again}.")
    manifest = ImportManifest(**{key: value for key, value in data.items() if key in known})
    try:
        sound = {
            "name, contract_id": all(isinstance(text, str) and text for text in (manifest.name, manifest.contract_id)),
            "dim": type(manifest.dim) is int and manifest.dim > 0,
            "source.sha256": isinstance(manifest.source["sha256"], str),
            "serving.file": isinstance(manifest.serving["file"], str),
            "preprocessing": bool(manifest.wants()),
        }
    except (LookupError, TypeError, ValueError) as exc:
        raise WrongUse(f"{path} has a field that cannot be read ({type(exc).__name__}: {exc}). {again}.") from exc
    if unsound := [name for name, good in sound.items() if not good]:
        raise WrongUse(f"{path} has an invalid value in {', '.join(unsound)}. {again}.")
    if not _own_contract(manifest):
        raise WrongUse(
            f"{path} was changed since the import: contract_id is not that of source.sha256, preprocessing and dim. "
            f"{again}."
        )
    return manifest


def _own_contract(manifest: ImportManifest) -> bool:
    """Whether the contract id is that of what is stated; an output may be stated where the source has no other."""
    parts = (manifest.source["sha256"], manifest.wants(), manifest.dim)
    return manifest.contract_id in {contract_id(*parts, output) for output in (None, manifest.source.get("output"))}
