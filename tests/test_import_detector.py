"""`arcface import-detector`, and what `arcface serve` makes of it: photos with a detector, faces without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from arcface_build.cli import cli
from arcface_build.errors import SourceRefused
from arcface_build.repository.detector import install_detector, photo_models
from arcface_build.repository.install import install, roll_back
from arcface_build.repository.versions import versions
from arcface_build.serving.binary import TritonBinary
from arcface_build.serving.ports import free_ports
from arcface_clients.errors import DependencyMissing
from arcface_clients.faces.detect import MODEL_NAME
from arcface_clients.plans.manifest import file_sha256
from conftest import copy_repository
from deadlines import HANG_S

MAIN = "import sys; from arcface_build.cli import main; main(sys.argv[1:])"


@pytest.fixture
def yunet(assets: Path) -> Path:
    return assets / "detectors" / MODEL_NAME


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return copy_repository(tmp_path)


def test_a_detector_is_installed_with_its_digest_and_licence(repository: Path, yunet: Path) -> None:
    assert photo_models(repository) == ([], "photos: not served, no detector. Next: arcface import-detector FILE")
    line = ["import-detector", str(yunet), "--model-repository", str(repository), "--json"]
    result = CliRunner().invoke(cli, line, standalone_mode=False)
    assert result.exception is None
    told = json.loads(result.stdout)
    assert told["version"] == 1
    assert told["source"]["sha256"] == file_sha256(yunet)
    assert told["source"]["licence"] == "MIT (OpenCV Zoo)"
    assert photo_models(repository)[0] == ["photo_faces", "photo_verify"]
    assert install_detector(yunet, repository) == 1  # the same again changes nothing


def test_another_detector_is_a_new_version_with_the_code_and_can_be_rolled_back(
    repository: Path, yunet: Path, tmp_path: Path
) -> None:
    install_detector(yunet, repository)
    other = tmp_path / "other.onnx"
    other.write_bytes(yunet.read_bytes())
    assert install_detector(other, repository, licence="ours") == 2
    folder = repository / "photo_faces" / "2"
    assert {path.name for path in folder.glob("*.py")} == {
        "model.py",
        "decode.py",
        "detect.py",
        "align.py",
        "refusal.py",
        "scrfd.py",
        "yunet.py",
    }
    assert roll_back(repository, "photo_faces") == (2, 1)
    assert versions(repository / "photo_faces") == [1]


def test_the_command_that_the_docs_name_goes_back_to_the_detector_before(
    repository: Path, yunet: Path, tmp_path: Path
) -> None:
    install_detector(yunet, repository)
    install_detector(yunet, repository, licence="ours")
    line = ["rollback", "--model", "photo_faces", "--model-repository", str(repository)]
    result = CliRunner().invoke(cli, line, standalone_mode=False)
    assert result.stdout == ("photo_faces: version 2 removed, version 1 is served (face_detection_yunet_2023mar)\n")


def test_what_is_no_detector_is_refused_and_nothing_is_installed(
    repository: Path, assets: Path, tmp_path: Path
) -> None:
    for file in (assets / "models" / "MobileFaceNet.onnx", repository / "photo_faces" / "config.pbtxt"):
        with pytest.raises(SourceRefused, match="not a detector that can be run as YuNet"):
            install_detector(file, repository)
    with pytest.raises(DependencyMissing, match="no face detector at"):
        install_detector(tmp_path / "nowhere.onnx", repository)
    assert versions(repository / "photo_faces") == []


def test_serve_loads_the_photo_models_and_goes_on_without_them_where_they_fail(
    triton_binary: TritonBinary, demo_repository: Path, yunet: Path, tmp_path: Path
) -> None:
    install_detector(yunet, demo_repository)
    output, _ = serve_once(demo_repository)
    assert "photos: photo_faces, photo_verify with face_detection_yunet_2023mar" in output
    cut = tmp_path / "detector.onnx"
    cut.write_bytes(yunet.read_bytes()[:1000])
    install(demo_repository, "photo_faces", {"detector.onnx": cut}, {"name": "cut", "source": {"kind": "detector"}})
    try:
        output, errors = serve_once(demo_repository)
    finally:
        roll_back(demo_repository, "photo_faces")
    assert "photo_faces: " in errors
    assert "serving onnx without photos instead" in errors


def serve_once(repository: Path) -> tuple[str, str]:
    """What `arcface serve --once` says; it has to succeed."""
    ports = free_ports()
    line = [sys.executable, "-c", MAIN, "serve", "--once", "--no-reference", "--variant", "installed"]
    line += ["--model-repository", str(repository)]
    line += [option for name, port in ports.named().items() for option in (f"--{name}-port", str(port))]
    done = subprocess.run(line, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
