"""The versions of each model in the model repository, and atomic installation of new ones.

Weights live in numbered version folders; the highest is served. A version's manifest.json says what it is (contract id,
precision, source), and so do, for clients to read from the server, parameters in the overlays configs/NAME.pbtxt. A
version appears in one rename, followed by its overlays. Each overlay pins the version that it describes: after a kill
in between, the server serves what it served before or refuses to start, but never serves new weights under an old
contract id. `arcface_build.repository.mend` repairs the rest.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arcface_build.repository.integrity import BY_ROLLBACK, CHOICE, HELD, check_version, how_to_mend, sealed, weights_in
from arcface_build.repository.lock import locked
from arcface_build.repository.profiles import with_profiles
from arcface_build.repository.stated import outputs_pbtxt, states
from arcface_clients.atomic import copy_file, new_file, new_folder, remove, write_json
from arcface_clients.engines.import_manifest import DEMO
from arcface_clients.errors import GateFailed, Missing, WrongUse

OVERLAYS = ("tensorrt", "onnx", "reference")  # valid values of --model-config-name
REFERENCE = "arcface_reference"
LEAVES = ("arcface_onnx", "arcface_trt", REFERENCE)  # the models that hold weights


def find_repository(given: Path | None = None, configured: Path = Path("model_repository")) -> Path:
    """The model repository: the given folder, else the configured one; a relative path is also searched upwards.

    Raises:
        Missing: there is none.
    """
    if given is not None:
        if not (given / "arcface" / "config.pbtxt").is_file():
            raise Missing(f"{given} is not our model repository: expected arcface/config.pbtxt in it.")
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
        f"no {where}. Make one here: arcface serve, or arcface import SOURCE; or name it: --model-repository FOLDER, "
        "or local.model_repository in config/embedding.yaml"
    )


def versions(model: Path) -> list[int]:
    """Version numbers of a model folder that contain a manifest, and therefore weights, ascending."""
    return sorted(int(p.parent.name) for p in model.glob("*/manifest.json") if p.parent.name.isdecimal())


def served_version(repository: Path, model: str = "arcface_onnx") -> int | None:
    """The version to serve: the newest; for the reference, the newest with the contract of the model it verifies.

    None if there are no weights.

    Raises:
        Missing: a manifest cannot be read.
    """
    have = versions(repository / model)
    if model != REFERENCE or len(have) < 2:
        return have[-1] if have else None
    with contextlib.suppress(Missing):  # the code that needs that manifest reports it
        proved = [manifest["contract_id"] for leaf in LEAVES[:2] if (manifest := served_manifest(repository, leaf))]
        fitting = [v for v in have if _manifest(repository / model / str(v))["contract_id"] in proved[:1]]
        return fitting[-1] if fitting else have[-1]
    return have[-1]


def served_manifest(repository: Path, model: str = "arcface_onnx") -> dict[str, Any] | None:
    """The manifest of the version that Triton would serve, or None if there are no weights.

    Raises:
        Missing: it cannot be read.
    """
    version = served_version(repository, model)
    return None if version is None else _manifest(repository / model / str(version))


def _manifest(version: Path) -> dict[str, Any]:
    path, fix = version / "manifest.json", how_to_mend(version.parent.name)
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise Missing(f"{path} cannot be read ({exc}). {fix}") from exc
    expected = {"name", "source", *["contract_id"] * (version.parent.name in LEAVES)}  # a detector has no contract
    lacking = expected - set(data if isinstance(data, dict) else ())
    if lacking:
        raise Missing(f"{path} is not a version's manifest: it lacks {', '.join(sorted(lacking))}. {fix}")
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


def check_served(repository: Path, model: str) -> None:
    """Refuse the version that Triton would serve if it does not hold what its manifest says; none is no fault.

    Raises:
        GateFailed: it was changed since it was installed.
        Missing: its manifest cannot be read.
    """
    version = served_version(repository, model)
    if version is not None:
        check(repository / model / str(version))


def check(version: Path) -> None:
    """The same for a version folder."""
    check_version(version, _manifest(version))


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
        return bool(_manifest(version)["source"].get("kind") == DEMO)
    return False


def _install(folder: Path, files: Mapping[str, Path], manifest: Mapping[str, Any], held: str | None) -> int:
    have = versions(folder)
    with contextlib.suppress(Missing, GateFailed):  # an unreadable manifest, or a changed version, is another one
        served = _manifest(folder / str(have[-1])) if have else {}
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


def write_overlays(repository: Path) -> None:
    """Write configs/{tensorrt,onnx,reference}.pbtxt of each leaf model if they are out of date.

    Those of a version that does not hold what its manifest says stay: they describe what was installed.
    """
    for overlay, text in stale_overlays(repository).items():
        try:
            check_served(repository, overlay.parent.parent.name)
        except GateFailed:
            continue
        # measured for, and pinned to, other weights
        (overlay.parent / "tuned.pbtxt").unlink(missing_ok=True)
        with new_file(overlay) as temporary:
            temporary.write_text(text)


def stale_overlays(repository: Path) -> dict[Path, str]:
    """The overlays that do not describe the version to be served, and what they should contain.

    Nothing is known of those of a version whose manifest cannot be read, which the code that serves it reports.
    """
    found = {}
    for name in LEAVES:
        with contextlib.suppress(Missing):
            version = served_version(repository, name)
            if version is None:
                continue
            text = _overlay_text(repository / name, version)
            for overlay in (repository / name / "configs" / f"{kind}.pbtxt" for kind in OVERLAYS):
                if not overlay.is_file() or overlay.read_text() != text:
                    found[overlay] = text
    return found


def _overlay_text(model: Path, version: int) -> str:
    """The text of an overlay: config.pbtxt, the version to serve, and parameters that identify its weights."""
    manifest = _manifest(model / str(version))
    parameters = {
        "contract_id": manifest["contract_id"],
        "precision": manifest.get("precision", "fp32"),
        "source_sha256": manifest["source"]["sha256"],
        "model_name": manifest["name"],
    }
    if manifest["source"].get("kind") == DEMO:
        parameters["demo"] = "true"
    if manifest.get("golden"):
        parameters["golden"] = manifest["golden"]
    lines = "".join(f'parameters {{ key: "{k}" value: {{ string_value: "{v}" }} }}\n' for k, v in parameters.items())
    pin = f"version_policy: {{ specific {{ versions: [ {version} ] }} }}\n"
    config = with_profiles((model / "config.pbtxt").read_text(), manifest.get("profiles", 1))
    outputs = "" if states(config, "output") else outputs_pbtxt(model / str(version), manifest)
    return (
        f"{config}\n"
        f"# Written by the build; settings and identity of these weights:\n"
        f"{manifest.get('overlay', '')}{outputs}{pin}{lines}"
    )


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
        manifest = _manifest(folder / str(have[-2]))
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
