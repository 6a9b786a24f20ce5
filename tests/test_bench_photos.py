"""The benches of photos, in small: what they compare, and what they say of it."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_build.bench.photo_callers import STAGES
from arcface_build.bench.photos import measure_photos, photos_text, what_runs
from arcface_build.repository.detector import install_detector
from arcface_build.serving.binary import TritonBinary
from arcface_build.terminal import round_bar
from arcface_clients.errors import WrongUse
from arcface_clients.faces.detect import MODEL_NAME
from arcface_tools import served_detector
from arcface_tools.large_photos import large_photos, large_photos_text


@pytest.fixture(scope="module")
def portraits(assets: Path) -> list[Path]:
    return [sorted(folder.iterdir())[0] for folder in sorted((assets / "faces" / "raw250").iterdir())[:12]]


def test_the_server_is_compared_with_both_ways_in_one_process_and_cpu_is_told_by_part(
    triton_binary: TritonBinary, demo_repository: Path, assets: Path, portraits: list[Path]
) -> None:
    install_detector(assets / "detectors" / MODEL_NAME, demo_repository)
    photos = [portrait.read_bytes() for portrait in portraits[:3]]
    result = measure_photos(photos, demo_repository, callers=[1, 2], rounds=1, sample_s=0.05, bars=round_bar)
    names = [f"{way} c{n}" for n in (1, 2) for way in ("one process", "usual parts", "server")]
    assert [row["name"] for row in result["variants"]] == names
    assert len(set(result["faces"].values())) == 1
    assert "as it was given" in result["runs"]["usual parts"]
    for key in ("ratios", "ratios_to_usual_parts"):
        assert [row["callers"] for row in result[key]] == [1, 2]
        assert all(row["median"] > 0 for row in result[key])
    parts = result["variants"][2]["cpu_ms_per_photo"]
    assert parts.keys() >= {"this process", "tritonserver", "photo_faces", "arcface_onnx"}
    assert all(result["waterfall_ms"]["1"][stage] > 0 for stage in STAGES)
    assert "server / usual parts" in photos_text(result)


def test_what_each_side_runs_is_told_whatever_is_served(tmp_path: Path) -> None:
    given = {"name": "r50", "source": {}, "contract_id": "c"}
    variant = {"precision": "bf16", "variant": {"runtime": "openvino-bf16"}}
    for leaf, manifest in (("arcface_reference", given), ("arcface_onnx", given | variant)):
        (tmp_path / leaf / "1").mkdir(parents=True)
        (tmp_path / leaf / "1" / "manifest.json").write_text(json.dumps(manifest))
    runs = what_runs(tmp_path, "onnx")
    assert runs["server"] == "r50 bf16 in openvino-bf16"
    assert runs["one process"].startswith("r50 bf16 in openvino-bf16, all faces")
    assert "r50 as it was given, fp32 in onnxruntime through InsightFace, one face a call" in runs["usual parts"]
    exact = given | {"variant": {"runtime": "openvino-fp32", "form": "Winograd"}}
    (tmp_path / "arcface_onnx" / "1" / "manifest.json").write_text(json.dumps(exact))
    assert what_runs(tmp_path, "onnx")["server"] == "r50 fp32 by Winograd in openvino-fp32"
    assert what_runs(tmp_path, "reference")["server"] == "r50 fp32 in onnxruntime through InsightFace"


def test_no_photo_with_a_single_face_is_wrong_use(demo_repository: Path, assets: Path, portraits: list[Path]) -> None:
    install_detector(assets / "detectors" / MODEL_NAME, demo_repository)
    group = np.hstack([cv2.imread(str(portrait)) for portrait in portraits[:2]])
    photos = [cv2.imencode(".jpg", group)[1].tobytes()]
    with pytest.raises(WrongUse, match="exactly one face"):
        measure_photos(photos, demo_repository, callers=[1], rounds=1, sample_s=0.0, single_face=True, bars=round_bar)


def test_the_detector_as_a_served_model_finds_the_same_faces_and_its_cpu_is_told(
    triton_binary: TritonBinary, demo_repository: Path, assets: Path, portraits: list[Path]
) -> None:
    install_detector(assets / "detectors" / MODEL_NAME, demo_repository)
    photos = [portrait.read_bytes() for portrait in portraits[:2]]
    result = served_detector.run(photos, demo_repository, callers=[1], rounds=1, sample_s=0.05, bars=round_bar)
    assert [row["name"] for row in result["variants"]] == ["inside c1", "served c1"]
    assert result["variants"][1]["cpu_ms_per_photo"].keys() >= {"yunet", "photo_faces_bls", "tritonserver"}
    assert "served / inside, 1 callers" in served_detector.text(result)


class Thumbnails:
    """Embeds a face as its 8×8 pixels."""

    embedding_dim = 192

    def encode(self, faces: np.ndarray) -> np.ndarray:
        small = faces.reshape(len(faces), 8, 14, 8, 14, 3).mean(axis=(2, 4)).reshape(len(faces), -1)
        return small / np.linalg.norm(small, axis=1, keepdims=True)


def test_a_large_photo_decoded_no_larger_than_needed_has_the_faces_of_the_whole_one(
    assets: Path, portraits: list[Path]
) -> None:
    result = large_photos(portraits, 12, Thumbnails(), assets / "detectors" / MODEL_NAME)
    reduced, whole = result["ways"]["reduced"], result["ways"]["whole"]
    assert reduced["faces"] == whole["faces"] == result["same_faces"] >= 12
    assert reduced["peak_mb"] < whole["peak_mb"]
    assert result["cosine_min"] > 0.99
    assert result["at_the_same_landmarks"]["cosine_min"] > 0.999
    assert result["moved_by_one_pixel"]["same_faces"] >= 12
    assert "1 JPEGs of 12 million pixels" in large_photos_text(result)
    with pytest.raises(WrongUse, match="expected at least 12"):
        large_photos(portraits[:11], 12, Thumbnails())
