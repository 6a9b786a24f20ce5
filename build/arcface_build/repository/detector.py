"""Installs a face detector as a version of `photo_faces`, the served model that takes photos."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from arcface_build.errors import LicenceNotAccepted, SourceRefused
from arcface_build.repository.install import install
from arcface_build.repository.integrity import PHOTO_MODEL
from arcface_build.repository.versions import check_served, served_manifest, versions
from arcface_clients.engines.runtimes import open_session
from arcface_clients.errors import ConfigError, DependencyMissing, GateFailed, Missing
from arcface_clients.extras import how_to_get
from arcface_clients.faces.detect import FaceDetector, find_detector
from arcface_clients.plans.manifest import file_sha256

VERIFY_MODEL = "photo_verify"
YUNET_LICENCE = "MIT (OpenCV Zoo)"


def install_detector(file: Path | None, repository: Path, licence: str | None = None, keep: int = 3) -> int:
    """Install a detector's ONNX, YuNet or SCRFD, as a version of `photo_faces`; returns its number.

    Args:
        file: the ONNX; None: YuNet where `find_detector` finds it.
        repository: the model repository.
        licence: of the file; None for YuNet's.
        keep: versions to keep for a rollback.

    Raises:
        DependencyMissing: no OpenCV, or no such file.
        SourceRefused: the file is no detector.
        LicenceNotAccepted: SCRFD, and no licence is named.
        Missing: the repository has no model `photo_faces`.
    """
    if not (repository / PHOTO_MODEL / "config.pbtxt").is_file():
        raise Missing(
            f"{repository} has no model {PHOTO_MODEL}: expected {PHOTO_MODEL}/config.pbtxt in it. "
            "Take model_repository/ of this version of arcface-triton"
        )
    found = find_detector(file)
    kind = _kind(found)
    if kind != "yunet" and not licence:
        raise LicenceNotAccepted(
            f"{found.name} is SCRFD; InsightFace's own weights are licensed for non-commercial research only: expected "
            "--licence TEXT with the licence that you use them under"
        )
    source = {"kind": "detector", "file": found.name, "sha256": file_sha256(found), "licence": licence or YUNET_LICENCE}
    manifest = {"name": found.stem, "detector": kind, "source": source}
    return install(repository, PHOTO_MODEL, {"detector.onnx": found}, manifest, keep=keep)


def _kind(file: Path) -> str:
    """yunet or scrfd.

    Raises:
        SourceRefused: neither can run it.
    """
    try:
        FaceDetector(file)
        return "yunet"
    except ConfigError as exc:
        no_yunet = exc
    from arcface_clients.faces.steps.scrfd import Scrfd

    try:
        Scrfd(open_session(file))
        return "scrfd"
    except (ConfigError, ValueError, DependencyMissing) as exc:
        raise SourceRefused(f"{no_yunet}; nor is it SCRFD ({exc})") from exc


def installed_detector(repository: Path) -> dict[str, Any] | None:
    """The manifest of the detector that `photo_faces` would be served with, None if there is none.

    Raises:
        Missing: it cannot be read.
    """
    return served_manifest(repository, PHOTO_MODEL) if versions(repository / PHOTO_MODEL) else None


def photo_models(repository: Path) -> tuple[list[str], str]:
    """The models to load for photos, and a line that says why.

    None without a detector that is what was installed, or without what decodes.
    """
    try:
        check_served(repository, PHOTO_MODEL)
        detector = installed_detector(repository)
    except (GateFailed, Missing) as exc:  # faces do not depend on photos
        return [], f"photos: not served, {exc}"
    if detector is None:
        return [], "photos: not served, no detector. Next: arcface import-detector FILE"
    lacking = [module for module in ("cv2", "PIL") if find_spec(module) is None]
    if lacking:
        return [], f"photos: not served, {lacking[0]} is missing. Next: {how_to_get(lacking[0])}"
    models = [name for name in (PHOTO_MODEL, VERIFY_MODEL) if (repository / name / "config.pbtxt").is_file()]
    return models, f"photos: {', '.join(models)} with {detector['name']}"
