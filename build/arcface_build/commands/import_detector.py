"""`arcface import-detector` installs a face detector, so that the server takes photos."""

from __future__ import annotations

from pathlib import Path

import click

from arcface_build import terminal
from arcface_build.commands.options.folders import model_repository_option, repository_at
from arcface_build.commands.options.output import hand_over, json_option
from arcface_build.commands.options.settings import settings

EPILOG = """\b
Examples:
  arcface import-detector face_detection_yunet_2023mar.onnx
  arcface import-detector ~/.insightface/models/buffalo_l/det_10g.onnx --licence 'non-commercial research'
  arcface import-detector                     the one in ~/.cache/arcface-triton/detectors
"""


@click.command(epilog=EPILOG)
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False), envvar="ARCFACE_DETECTOR")
@click.option("--licence", help="Of the file, for its manifest; needed for SCRFD.  [default: that of YuNet]")
@model_repository_option
@json_option
def command(file: Path | None, licence: str | None, model_repository: Path | None, as_json: bool) -> None:
    """Install a detector in the model repository: `arcface serve` then answers photos with faces (docs/photos.md).

    FILE is YuNet's ONNX, or SCRFD of an InsightFace pack (det_10g.onnx), which needs --licence.

    A running server picks it up after a restart.
    """
    from arcface_build.repository.detector import install_detector, installed_detector
    from arcface_build.serving.change_over import ChangeOver

    repository = repository_at(model_repository)
    change = ChangeOver(repository)
    version = install_detector(file, repository, licence, settings().versions_kept)
    manifest = installed_detector(repository) or {}
    source = manifest["source"]
    told = (
        f"photo_faces: version {version} finds faces with {source['file']} ({source['sha256'][:12]}…, licence "
        f"{source['licence']}). Next: arcface serve"
    )
    hand_over({"model": "photo_faces", "version": version, **manifest}, lambda: told, as_json)
    if still := change.told():
        terminal.complaint(still)
