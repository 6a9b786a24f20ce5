"""The model repository on disk: which versions a model has, and weights put into a new version whole or not at all.

Weights live in numbered version folders; Triton serves the highest. What a version is (contract id, precision, source)
stands in its manifest.json and, for clients to read from the server, as parameters in configs/<name>.pbtxt.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arcface_clients.atomic import new_file, new_folder, write_json
from arcface_clients.errors import Missing, WrongUse

_AGAIN = "arcface rollback (the version before), or put the weights in anew: arcface import SOURCE"
OVERLAYS = ("tensorrt", "onnx", "reference")  # what --model-config-name can be


def find_repository(given: Path | None = None, configured: Path = Path("model_repository")) -> Path:
    """The model repository: the given folder, else the configured one, here or in a folder above where it is relative.

    Raises:
        Missing: there is none.
    """
    if given is not None:
        if not (given / "arcface" / "config.pbtxt").is_file():
            raise Missing(f"{given} is not our model repository: it has no arcface/config.pbtxt.")
        return given.resolve()
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / configured / "arcface" / "config.pbtxt").is_file():
            return folder / configured
    where = (
        f"model repository at {configured}"
        if configured.is_absolute()
        else f"{configured}/ in {Path.cwd()} or above it"
    )
    raise Missing(
        f"no {where}. Run from a checkout of arcface-triton, or name the model repository: --model-repository FOLDER, "
        "or local.model_repository in config/embedding.yaml"
    )


def versions(model: Path) -> list[int]:
    """Version numbers of a model folder that hold a manifest (so: weights), ascending."""
    return sorted(int(p.parent.name) for p in model.glob("*/manifest.json") if p.parent.name.isdecimal())


def served_manifest(repository: Path, model: str = "arcface_onnx") -> dict[str, Any] | None:
    """The manifest of the version that Triton would serve, or None where there are no weights.

    Raises:
        Missing: it cannot be read.
    """
    have = versions(repository / model)
    return _manifest(repository / model / str(have[-1])) if have else None


def _manifest(version: Path) -> dict[str, Any]:
    path = version / "manifest.json"
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise Missing(f"{path} cannot be read ({exc}). Next: {_AGAIN}") from exc
    lacking = {"name", "contract_id", "source"} - set(data if isinstance(data, dict) else ())
    if lacking:
        raise Missing(f"{path} is no manifest of a version: it lacks {', '.join(sorted(lacking))}. Next: {_AGAIN}")
    return data


def served_folder(repository: Path, model: str) -> Path:
    """The version folder that Triton would serve.

    Raises:
        Missing: the model has no weights.
    """
    have = versions(repository / model)
    if not have:
        raise Missing(f"{model} has no weights in {repository}. Next: arcface import demo, or arcface import YOUR.onnx")
    return repository / model / str(have[-1])


def install(
    repository: Path,
    model: str,
    files: Mapping[str, Path],
    manifest: Mapping[str, Any],
    *,
    overlay: str = "",
    keep: int = 3,
) -> int:
    """Put files into a model as a new version and write its overlays; the same manifest again changes nothing.

    The first version goes into the folder `1` that git already holds; each later one appears by a single rename.
    Files whose names end in .py are carried over from the version before. `overlay` is more text for config.pbtxt that
    these weights want; versions older than the newest `keep` are removed.

    Returns:
        The version number that now holds the files.
    """
    folder = repository / model
    have = versions(folder)
    manifest = {**manifest, "overlay": overlay} if overlay else dict(manifest)
    with contextlib.suppress(Missing):  # a manifest that cannot be read is another one
        if have and {k: v for k, v in _manifest(folder / str(have[-1])).items() if k != "held"} == manifest:
            return have[-1]
    version = have[-1] + 1 if have else 1
    target = folder / str(version)
    if version == 1:
        for name, source in files.items():
            with new_file(target / name) as temporary:
                shutil.copyfile(source, temporary)
        write_json(target / "manifest.json", manifest)
    else:
        with new_folder(target) as temporary:
            for code in (folder / str(have[-1])).glob("*.py"):
                shutil.copyfile(code, temporary / code.name)
            for name, source in files.items():
                shutil.copyfile(source, temporary / name)
            write_json(temporary / "manifest.json", manifest)
    write_overlays(folder, manifest)
    for old in versions(folder)[:-keep]:
        _remove(folder / str(old))
    return version


def write_overlays(model: Path, manifest: Mapping[str, Any]) -> None:
    """Write configs/{tensorrt,onnx,reference}.pbtxt: config.pbtxt plus parameters that say what the weights are."""
    parameters = {
        "contract_id": manifest["contract_id"],
        "precision": manifest.get("precision", "fp32"),
        "source_sha256": manifest["source"]["sha256"],
        "model_name": manifest["name"],
    }
    lines = "".join(f'parameters {{ key: "{k}" value: {{ string_value: "{v}" }} }}\n' for k, v in parameters.items())
    base = (model / "config.pbtxt").read_text()
    (model / "configs" / "tuned.pbtxt").unlink(missing_ok=True)  # measured for other weights, and states their contract
    for name in OVERLAYS:
        with new_file(model / "configs" / f"{name}.pbtxt") as temporary:
            added = manifest.get("overlay", "") + lines
            temporary.write_text(f"{base}\n# Written by the build; what the weights beside this want and are:\n{added}")


def roll_back(repository: Path, model: str) -> tuple[int, int]:
    """Remove the newest version of a model and write the overlays of the one before; returns (removed, now served).

    The one before is `held` from then on: `arcface serve` does not put a faster variant in its place again.

    Raises:
        WrongUse: there is no version before.
    """
    folder = repository / model
    have = versions(folder)
    if len(have) < 2:
        raise WrongUse(f"{model} has {len(have)} version{'s' * (len(have) != 1)}: expected at least two to go back.")
    manifest = _manifest(folder / str(have[-2]))
    write_json(folder / str(have[-2]) / "manifest.json", {**manifest, "held": True})
    write_overlays(folder, manifest)
    _remove(folder / str(have[-1]))
    return have[-1], have[-2]


def roll_back_served(repository: Path, models: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
    """Roll back each of `models`; without any, arcface_onnx, and the reference where it stands for another source then.

    Returns:
        Model → (removed, now served).

    Raises:
        WrongUse: there is no version before.
    """
    done = {model: roll_back(repository, model) for model in models or ("arcface_onnx",)}
    if not models:
        serving, reference = (served_manifest(repository, m) for m in ("arcface_onnx", "arcface_reference"))
        if serving and reference and serving["contract_id"] != reference["contract_id"]:
            done["arcface_reference"] = roll_back(repository, "arcface_reference")
    return done


def _remove(version: Path) -> None:
    """Remove a version at once for Triton (one rename), then its files; what git holds of version 1 stays."""
    if version.name == "1":
        (version / "manifest.json").unlink()  # first: without it the folder is no version
        for weights in [*version.glob("*.onnx"), *version.glob("*.plan")]:
            weights.unlink()
        return
    doomed = version.with_name(f".{version.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    version.rename(doomed)
    shutil.rmtree(doomed)
