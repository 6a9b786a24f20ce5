"""The model repository on disk: which versions a model has, and weights put into a new version whole or not at all.

Weights live in numbered version folders; the highest is served. What a version is (contract id, precision, source)
stands in its manifest.json and, for clients to read from the server, as parameters in the overlays
configs/NAME.pbtxt. A version appears by one rename, and its overlays after it. Each overlay pins the version that it
describes: whoever is killed in between leaves a server that serves what it served, or refuses to start, but never new
weights under an old contract id. `arcface_build.repository.mend` does the rest.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arcface_build.repository.lock import locked
from arcface_clients.atomic import copy_file, new_file, new_folder, remove, write_json
from arcface_clients.errors import Missing, WrongUse

_AGAIN = "arcface rollback (the version before), or put the weights in anew: arcface import SOURCE"
OVERLAYS = ("tensorrt", "onnx", "reference")  # what --model-config-name can be
REFERENCE = "arcface_reference"
DEMO = "demo"  # source.kind of random weights
LEAVES = ("arcface_onnx", "arcface_trt", REFERENCE)  # the models that hold weights


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


def served_version(repository: Path, model: str = "arcface_onnx") -> int | None:
    """The version that is to be served: the newest; of the reference the newest with the contract of what it proves.

    None where there are no weights.

    Raises:
        Missing: a manifest cannot be read.
    """
    have = versions(repository / model)
    if model != REFERENCE or len(have) < 2:
        return have[-1] if have else None
    with contextlib.suppress(Missing):  # then whoever needs that manifest says so
        proved = [manifest["contract_id"] for leaf in LEAVES[:2] if (manifest := served_manifest(repository, leaf))]
        fitting = [v for v in have if _manifest(repository / model / str(v))["contract_id"] in proved[:1]]
        return fitting[-1] if fitting else have[-1]
    return have[-1]


def served_manifest(repository: Path, model: str = "arcface_onnx") -> dict[str, Any] | None:
    """The manifest of the version that Triton would serve, or None where there are no weights.

    Raises:
        Missing: it cannot be read.
    """
    version = served_version(repository, model)
    return None if version is None else _manifest(repository / model / str(version))


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


def serves_demo(repository: Path, model: str) -> bool:
    """Whether the version that is to be served holds random weights, which recognise nobody.

    Raises:
        Missing: its manifest cannot be read.
    """
    manifest = served_manifest(repository, model)
    return manifest is not None and manifest["source"].get("kind") == DEMO


def served_folder(repository: Path, model: str) -> Path:
    """The version folder that Triton would serve.

    Raises:
        Missing: the model has no weights.
    """
    version = served_version(repository, model)
    if version is None:
        raise Missing(f"{model} has no weights in {repository}. Next: arcface import demo, or arcface import YOUR.onnx")
    return repository / model / str(version)


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
    manifest = {**manifest, "overlay": overlay} if overlay else dict(manifest)
    with locked(repository):
        version = _install(repository / model, files, manifest)
        write_overlays(repository)
        for old in _outlived(repository / model, manifest, keep):
            _remove(repository / model / str(old))
    return version


def _outlived(folder: Path, manifest: Mapping[str, Any], keep: int) -> list[int]:
    """Versions that go: all but the newest `keep`, and beside a real model those with demo weights."""
    *before, _ = versions(folder)
    old = before[: max(len(before) + 1 - keep, 0)]
    if manifest["source"].get("kind") == DEMO:
        return old
    return [v for v in before if v in old or _is_demo(folder / str(v))]


def _is_demo(version: Path) -> bool:
    with contextlib.suppress(Missing):
        return bool(_manifest(version)["source"].get("kind") == DEMO)
    return False


def _install(folder: Path, files: Mapping[str, Path], manifest: Mapping[str, Any]) -> int:
    have = versions(folder)
    with contextlib.suppress(Missing):  # a manifest that cannot be read is another one
        if have and {k: v for k, v in _manifest(folder / str(have[-1])).items() if k != "held"} == manifest:
            return have[-1]
    version = have[-1] + 1 if have else 1
    target = folder / str(version)
    if version == 1:
        for name, source in files.items():
            copy_file(source, target / name)
        write_json(target / "manifest.json", manifest)
    else:
        with new_folder(target) as temporary:
            for code in (folder / str(have[-1])).glob("*.py"):
                shutil.copyfile(code, temporary / code.name)
            for name, source in files.items():
                shutil.copyfile(source, temporary / name)
            write_json(temporary / "manifest.json", manifest)
    return version


def write_overlays(repository: Path) -> None:
    """Write configs/{tensorrt,onnx,reference}.pbtxt of each leaf model, where they are not as they should be."""
    for overlay, text in stale_overlays(repository).items():
        # measured for other weights, and pinned to them
        (overlay.parent / "tuned.pbtxt").unlink(missing_ok=True)
        with new_file(overlay) as temporary:
            temporary.write_text(text)


def stale_overlays(repository: Path) -> dict[Path, str]:
    """The overlays that do not describe the version that is to be served, and what they should say.

    Raises:
        Missing: a manifest cannot be read.
    """
    found = {}
    for name in LEAVES:
        version = served_version(repository, name)
        if version is None:
            continue
        text = _overlay_text(repository / name, version)
        for overlay in (repository / name / "configs" / f"{kind}.pbtxt" for kind in OVERLAYS):
            if not overlay.is_file() or overlay.read_text() != text:
                found[overlay] = text
    return found


def _overlay_text(model: Path, version: int) -> str:
    """config.pbtxt, the version that is served, and parameters that say what its weights are."""
    manifest = _manifest(model / str(version))
    parameters = {
        "contract_id": manifest["contract_id"],
        "precision": manifest.get("precision", "fp32"),
        "source_sha256": manifest["source"]["sha256"],
        "model_name": manifest["name"],
    }
    if manifest["source"].get("kind") == DEMO:
        parameters["demo"] = "true"
    lines = "".join(f'parameters {{ key: "{k}" value: {{ string_value: "{v}" }} }}\n' for k, v in parameters.items())
    pin = f"version_policy: {{ specific {{ versions: [ {version} ] }} }}\n"
    return (
        f"{(model / 'config.pbtxt').read_text()}\n"
        f"# Written by the build; what the weights beside this want and are:\n{manifest.get('overlay', '')}{pin}{lines}"
    )


def roll_back(repository: Path, model: str) -> tuple[int, int]:
    """Remove the newest version of a model and write the overlays of the one before; returns (removed, now served).

    The one before is `held` from then on: `arcface serve` does not put a faster variant in its place again.

    Raises:
        WrongUse: there is no version before.
    """
    folder = repository / model
    with locked(repository):
        have = versions(folder)
        if len(have) < 2:
            raise WrongUse(
                f"{model} has {len(have)} version{'s' * (len(have) != 1)}: expected at least two to go back."
            )
        manifest = _manifest(folder / str(have[-2]))
        write_json(folder / str(have[-2]) / "manifest.json", {**manifest, "held": True})
        _remove(folder / str(have[-1]))
        write_overlays(repository)
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
    if version.name != "1":
        remove(version)
        return
    (version / "manifest.json").unlink()  # first: without it the folder is no version
    for weights in [*version.glob("*.onnx"), *version.glob("*.plan"), *version.glob("*.plan.json")]:
        weights.unlink()
