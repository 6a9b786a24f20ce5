"""Installs files as a new version of a model in the model repository, and takes the newest one back.

A version appears in one rename and disappears in one; its overlays follow. `arcface_build.repository.mend` puts right
what a kill in between leaves.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arcface_build.repository.integrity import BY_ROLLBACK, CHOICE, HELD, sealed, weights_in
from arcface_build.repository.lock import locked
from arcface_build.repository.overlays import write_overlays
from arcface_build.repository.versions import check, manifest_of, served_manifest, versions
from arcface_clients.atomic import copy_file, new_folder, remove, write_json
from arcface_clients.engines.import_manifest import DEMO
from arcface_clients.errors import GateFailed, Missing, WrongUse


def install(
    repository: Path,
    model: str,
    files: Mapping[str, Path],
    manifest: Mapping[str, Any],
    *,
    overlay: str = "",
    keep: int = 3,
    held: str | None = None,
) -> int:
    """Install files as a new version of a model and write its overlays; installing the same again changes nothing.

    The first version goes into the folder `1`, which is in git; each later one appears in a single rename. Files whose
    names end in .py are copied from the previous version. `overlay` is additional text for config.pbtxt that these
    weights need. All versions but the newest `keep` are removed, and demo versions once a real model is there. `held`
    is the remark by which `arcface serve` leaves the version as it is; empty takes it away, None leaves it.

    Returns:
        The number of the version with these files.
    """
    manifest = sealed({**manifest, "overlay": overlay} if overlay else manifest, files)
    with locked(repository):
        version = _install(repository / model, files, manifest, held)
        write_overlays(repository)
        for old in _outlived(repository / model, manifest, keep):
            _remove(repository / model / str(old))
    return version


def _outlived(folder: Path, manifest: Mapping[str, Any], keep: int) -> list[int]:
    """Versions to remove: all but the newest `keep`, and demo weights once there is a real model."""
    *before, _ = versions(folder)
    old = before[: max(len(before) + 1 - keep, 0)]
    if manifest["source"].get("kind") == DEMO:
        return old
    return [v for v in before if v in old or _is_demo(folder / str(v))]


def _is_demo(version: Path) -> bool:
    with contextlib.suppress(Missing):
        return bool(manifest_of(version)["source"].get("kind") == DEMO)
    return False


def _install(folder: Path, files: Mapping[str, Path], manifest: Mapping[str, Any], held: str | None) -> int:
    have = versions(folder)
    with contextlib.suppress(Missing, GateFailed):  # an unreadable manifest, or a changed version, is another one
        served = manifest_of(folder / str(have[-1])) if have else {}
        if have and _identity(served) == _identity(manifest):
            check(folder / str(have[-1]))
            told = _remarked(manifest, served.get(HELD) if held is None else held)
            if told != served:
                write_json(folder / str(have[-1]) / "manifest.json", told)
            return have[-1]
    manifest = _remarked(manifest, held)
    version = have[-1] + 1 if have else 1
    target = folder / str(version)
    if version == 1:
        for stray in weights_in(target):  # of no version: there was no manifest
            stray.unlink()
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


def _remarked(manifest: Mapping[str, Any], held: object) -> dict[str, Any]:
    return {**manifest, HELD: held} if held else dict(manifest)


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a version another one: the same weights, chosen for another reason, are none."""
    return {key: value for key, value in manifest.items() if key not in (HELD, CHOICE)}


def roll_back(repository: Path, model: str) -> tuple[int, int]:
    """Remove the newest version of a model and write the overlays of the previous one; returns (removed, now served).

    The previous version is then `held`: `arcface serve` does not replace it with a faster variant again.

    Raises:
        WrongUse: there is no previous version.
        GateFailed: it does not hold what its manifest says; nothing is changed.
    """
    folder = repository / model
    with locked(repository):
        have = versions(folder)
        if len(have) < 2:
            raise WrongUse(
                f"{model} has {len(have)} version{'s' * (len(have) != 1)}: expected at least two for a rollback. "
                "Install another: arcface import SOURCE, or arcface assemble NAME"
            )
        check(folder / str(have[-2]))
        manifest = manifest_of(folder / str(have[-2]))
        write_json(folder / str(have[-2]) / "manifest.json", _remarked(manifest, BY_ROLLBACK))
        _remove(folder / str(have[-1]))
        write_overlays(repository)
    return have[-1], have[-2]


def roll_back_served(repository: Path, models: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
    """Roll back each of `models`; without any, arcface_onnx, and the reference if its source would no longer match.

    Returns:
        Model → (removed, now served).

    Raises:
        WrongUse: there is no previous version.
        GateFailed: it does not hold what its manifest says.
    """
    done = {model: roll_back(repository, model) for model in models or ("arcface_onnx",)}
    if not models:
        serving, reference = (served_manifest(repository, m) for m in ("arcface_onnx", "arcface_reference"))
        if serving and reference and serving["contract_id"] != reference["contract_id"]:
            done["arcface_reference"] = roll_back(repository, "arcface_reference")
    return done


def _remove(version: Path) -> None:
    """Hide a version from Triton in one rename, then delete its files; files of version 1 that are in git stay."""
    if version.name != "1":
        remove(version)
        return
    (version / "manifest.json").unlink()  # first: without it the folder is not a version
    for weights in weights_in(version):
        weights.unlink()
