"""The demo's figures: strangers among real people are found, and its own arithmetic is right."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_clients.contract import Preprocessing
from arcface_clients.errors import WrongUse
from arcface_clients.faces.synthetic import synthetic_people
from arcface_clients.people.consensus import MAX_DISTANCE
from arcface_tools.consensus import equal_error_rate, find_strangers, run
from people import PixelEngine


def test_strangers_among_lfw_people_are_found_with_few_false_alarms(assets: Path, lfw_faces: np.ndarray) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    model = assets / "models" / "MobileFaceNet.onnx"
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    imagenet = Preprocessing("rgb", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    blobs = imagenet.apply(lfw_faces)
    embeddings = np.concatenate([session.run(None, {"input0": blob[None]})[0] for blob in blobs])
    names = np.array([row.split(",")[1] for row in (assets / "faces" / "index.csv").read_text().splitlines()[1:]])
    figures = find_strangers(embeddings, names, MAX_DISTANCE, 3, np.random.default_rng(1))
    assert figures["strangers"] >= 250
    assert figures["found_share"] >= 0.99
    assert figures["false_alarm_share"] <= 0.01


def test_the_demo_reports_every_figure_that_it_says(tmp_path: Path) -> None:
    for person, views in enumerate(synthetic_people(6, 4)):
        (tmp_path / str(person)).mkdir()
        for i, face in enumerate(views):
            cv2.imwrite(str(tmp_path / str(person) / f"{i}.png"), face)
    said: list[str] = []
    report = run(tmp_path, PixelEngine(), rounds=1, say=said.append)
    assert json.loads(json.dumps(report)) == report
    assert (report["people"], report["faces"]) == (6, 24)
    assert (report["extraction"]["hits"], report["extraction"]["misses"]) == (24, 24)
    assert report["strangers"]["own_faces"] == 24
    assert report["against_pairwise"]["pairs"] == 3 * 15
    assert len(said) == 10
    with pytest.raises(WrongUse, match="expected at least 4"):
        (tmp_path / "few" / "a").mkdir(parents=True)
        run(tmp_path / "few", PixelEngine(), say=said.append)


@pytest.mark.parametrize(
    ("genuine", "impostor", "rate"),
    [([0.1, 0.2], [0.8, 0.9], 0.0), ([0.1, 0.2, 0.3, 0.9], [0.2, 0.8, 0.9, 1.0], 0.25), ([0.9], [0.1], 1.0)],
)
def test_the_equal_error_rate_is_where_both_errors_meet(
    genuine: list[float], impostor: list[float], rate: float
) -> None:
    assert equal_error_rate(np.array(genuine), np.array(impostor)) == pytest.approx(rate)
