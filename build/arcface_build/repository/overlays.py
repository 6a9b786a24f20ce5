"""Writes the overlays configs/NAME.pbtxt of the models that hold weights, by which clients learn what is served.

Each is the model's config.pbtxt with the identity of the weights as parameters, and pins the version that it describes:
after a kill between the version and its overlays, the server serves what it served before or refuses to start, but
never serves new weights under an old contract id.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from arcface_build.repository.profiles import with_profiles
from arcface_build.repository.stated import outputs_pbtxt, states
from arcface_build.repository.versions import LEAVES, check_served, manifest_of, served_version
from arcface_clients.atomic import new_file
from arcface_clients.engines.import_manifest import DEMO
from arcface_clients.errors import GateFailed, Missing

OVERLAYS = ("tensorrt", "onnx", "reference")  # valid values of --model-config-name


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
    manifest = manifest_of(model / str(version))
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
