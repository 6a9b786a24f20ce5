"""photo_verify decides where `arcface compare --calibrate` measured it for the served weights, and says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from arcface_build.cli import cli
from arcface_build.repository.calibration import calibrate_verify, calibration_of, told_of
from arcface_build.repository.detector import install_detector
from arcface_build.repository.versions import served_manifest
from arcface_build.serving.binary import TritonBinary
from arcface_build.serving.ports import free_ports
from arcface_build.serving.process import TritonProcess
from arcface_clients import PhotoEmbedder
from arcface_clients.bulk.npz import write_npz
from arcface_clients.contract import contract_words
from arcface_clients.errors import Missing, WrongUse
from conftest import copy_repository

OTHER = "ab" * 32
COUNTS = {"genuine": 150, "impostor": 150, "fold_accuracy": 0.9, "fold_standard_error": 0.01}


@pytest.fixture
def people(tmp_path: Path) -> tuple[Path, list[str]]:
    """An .npz of 25 people with 4 embeddings each, of the contract OTHER, and the names of its rows."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((25, 64))
    rows = (centres[:, None] + 0.7 * rng.standard_normal((25, 4, 64))).reshape(-1, 64).astype(np.float32)
    names = [f"p{person}/{number}.jpg" for person in range(25) for number in range(4)]
    file = tmp_path / "people.npz"
    write_npz(
        file,
        names,
        list(rows / np.linalg.norm(rows, axis=1, keepdims=True)),
        contract_id=OTHER,
        model="arcface",
        found=None,
    )
    return file, names


def compared(*arguments: object) -> Result:
    line = ["compare", *map(str, arguments), "--json"]
    return CliRunner().invoke(cli, line, standalone_mode=False)


def test_calibrate_keeps_what_the_pairs_gave_for_each_model(people, tmp_path: Path) -> None:
    file, _ = people
    repository = copy_repository(tmp_path)
    assert told_of(repository, OTHER).startswith("photo_verify: uncalibrated. Next: arcface compare ")
    result = compared(file, file, "--identities", "--calibrate", "--model-repository", repository)
    assert result.exception is None, result.output
    report = json.loads(result.stdout)
    threshold = report["accuracy"]["b"]["fold_threshold"]
    found = calibration_of(repository, OTHER)
    assert found is not None
    assert found["max_distance"] == report["calibrated_max_distance"] == 1 - threshold
    assert "calibrated on 300 pairs, decides at distance 0." in told_of(repository, OTHER)
    assert calibration_of(repository, "cd" * 32) is None
    report["b"]["contract_id"] = "cd" * 32
    calibrate_verify(repository, report)
    assert calibration_of(repository, OTHER) == found  # for a rollback
    assert calibration_of(repository, "cd" * 32) is not None


def test_what_cannot_be_calibrated_is_refused_and_nothing_is_written(people, tmp_path: Path) -> None:
    file, names = people
    repository = copy_repository(tmp_path)
    few = tmp_path / "few.csv"
    few.write_text("".join(f"{names[0]},{name},{int(name.startswith('p0/'))}\n" for name in names[1:]))
    for options, error, words in [
        (("--pairs", few), WrongUse, "needs 100 pairs of one person and as many of two; got 3 and 96"),
        ((), WrongUse, "--calibrate needs labelled pairs: add --pairs"),
    ]:
        result = compared(file, file, *options, "--calibrate", "--model-repository", repository)
        assert isinstance(result.exception, error) and words in str(result.exception)
    report = {"accuracy": {"b": {}}, "b": {"contract_id": None, "label": "other.onnx"}}
    with pytest.raises(WrongUse, match=r"other\.onnx does not say which contract it serves"):
        calibrate_verify(repository, report)
    assert not (repository / "photo_verify" / "1" / "calibration.json").exists()


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"contract_id": OTHER, "contract": contract_words(OTHER).tolist(), "max_distance": 0.5},
        {"contract_id": OTHER, "contract": [1, 2, 3, 4], "max_distance": 0.5, **COUNTS},
        {"contract_id": OTHER, "contract": contract_words(OTHER).tolist(), "max_distance": "far", **COUNTS},
        {"contract_id": 7, "contract": [], "max_distance": 0.5, **COUNTS},
    ],
)
def test_a_damaged_calibration_is_named_with_what_to_do(tmp_path: Path, row: dict) -> None:
    repository = copy_repository(tmp_path)
    (repository / "photo_verify" / "1" / "calibration.json").write_text(json.dumps({"models": [row]}))
    with pytest.raises(Missing, match=r"Delete it, and calibrate again: arcface compare"):
        calibration_of(repository, OTHER)
    assert "cannot be read" in told_of(repository, OTHER)


def test_the_server_decides_at_the_distance_of_its_own_weights_and_says_that_it_was_measured(
    triton_binary: TritonBinary, demo_repository: Path, assets: Path, tmp_path: Path
) -> None:
    repository = Path(shutil.copytree(demo_repository, tmp_path / "model_repository"))
    install_detector(next((assets / "detectors").glob("*yunet*.onnx")), repository)
    served = (served_manifest(repository) or {})["contract_id"]
    for contract_id, threshold in ((OTHER, 0.9), (served, 0.3125)):
        report = {"accuracy": {"b": COUNTS | {"fold_threshold": threshold}}, "b": {"contract_id": contract_id}}
        calibrate_verify(repository, report)
    portraits = [min(folder.iterdir()) for folder in sorted((assets / "faces" / "raw250").iterdir())[:2]]
    models = ["arcface", "photo_faces", "photo_verify"]
    with (
        TritonProcess(triton_binary, repository, models, log_path=tmp_path / "log", ports=free_ports()) as server,
        PhotoEmbedder(server.grpc_url) as photos,
    ):
        server.wait_ready()
        pair = photos.verify(*portraits)
        assert pair is not None
        assert (pair.max_distance, pair.calibrated) == (0.6875, True)
        assert pair.same == (1 - pair.similarity <= 0.6875)
        asked = photos.verify(*portraits, max_distance=0.25)
        assert asked is not None
        assert (asked.max_distance, asked.calibrated) == (0.25, False)
