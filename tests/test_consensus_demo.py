"""The demo's figures: strangers among real people are found, and its own arithmetic is right."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_clients.errors import WrongUse
from arcface_clients.faces.synthetic import synthetic_people
from arcface_clients.people.consensus import MAX_DISTANCE
from arcface_tools.consensus import equal_error_rate, find_strangers, run
from people import PixelEngine


def test_strangers_among_lfw_people_are_found_with_few_false_alarms(lfw_embeddings) -> None:
    embeddings, names = lfw_embeddings
    figures = find_strangers(embeddings, names, MAX_DISTANCE, 3, np.random.default_rng(1))
    assert figures["strangers"] >= 250
    assert figures["found_share"] >= 0.99
    assert figures["false_alarm_share"] <= 0.005
    assert figures["undecided"] == 0


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
    assert [row["draws"] for row in report["mixtures"]] == [400] * 4 + [0] * 2  # nobody has five photos
    assert report["host"]["cores"] >= 1
    assert len(said) == 16
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
