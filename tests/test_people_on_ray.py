"""The consensus of many people on Ray: the records of threads, workers that die, a run gone on with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from arcface_build.commands.consensus import OnRay, command, run
from arcface_clients.errors import ContractMismatch, ServerUnreachable
from arcface_clients.faces.synthetic import synthetic_people
from arcface_clients.people.on_ray import consensus_on_ray
from arcface_clients.people.persons import Limits, people_in
from arcface_clients.ray_cluster import Cluster, connected
from people import CONTRACT, PixelEngine

LIMITS = Limits(max_distance=0.12)
PEOPLE = 4
DEADLY = 255  # a face of this alone ends the worker of `Mortal`

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray warns about itself, and leaves files to its garbage collector


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Ray with two CPUs for all tests of this file, whose workers find this module."""
    pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        with connected(Cluster(2)):
            yield Cluster(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four people with four faces each, a stranger in each folder, one file that is no image."""
    root = tmp_path_factory.mktemp("people")
    faces = synthetic_people(PEOPLE + 1, 5, seed=3)
    for person in range(PEOPLE):
        (root / f"p{person}").mkdir()
        for view in range(4):
            cv2.imwrite(str(root / f"p{person}" / f"{view}.png"), faces[person, view])
        cv2.imwrite(str(root / f"p{person}" / "stranger.png"), faces[person + 1, 4])
    (root / "p0" / "broken.jpg").write_bytes(b"no image")
    return root


class Marked(PixelEngine):
    """Appends to a file how many faces each call had: what was done on Ray, whichever worker did it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def encode(self, faces: np.ndarray) -> np.ndarray:
        with (self.folder / "calls").open("a") as file:
            file.write(f"{len(faces)}\n")
        return super().encode(faces)


class Mortal(Marked):
    """Ends its worker once, and always with a face that is all 255."""

    def encode(self, faces: np.ndarray) -> np.ndarray:
        try:
            (self.folder / "died").touch(exist_ok=False)
        except FileExistsError:
            if not (faces == DEADLY).all(axis=(1, 2, 3)).any():
                return super().encode(faces)
            with (self.folder / "deaths").open("a") as file:
                file.write("x")
        os._exit(1)


class Bare(PixelEngine):
    """A server without the import's overlay: only its answers name its contract."""

    contract_prefix: str | None = None

    def __init__(self) -> None:
        super().__init__(contract_id=None)

    def encode(self, faces: np.ndarray) -> np.ndarray:
        rows = super().encode(faces)
        self.contract_prefix = "b" * 32
        return rows


class Away(PixelEngine):
    def encode(self, faces: np.ndarray) -> np.ndarray:
        raise ServerUnreachable("no server at gpu-1:8001")


def as_the_command_connects(folder: Path, url: str, model: str, **_: Any) -> PixelEngine:
    return Marked(folder)


def check_alike(found: dict[str, dict], expected: dict[str, dict]) -> None:
    assert list(found) == list(expected)
    for name, record in expected.items():
        assert record["agreed"], record["reason"]
        here = dict(found[name])
        np.testing.assert_allclose(here.pop("embedding"), record["embedding"], atol=1e-6)
        assert list(here["distances"]) == list(record["distances"])
        np.testing.assert_allclose(list(here["distances"].values()), list(record["distances"].values()), atol=2e-6)
        assert [row["path"] for row in here["outliers"]] == [row["path"] for row in record["outliers"]]
        for key in ("signature", "agreed", "reason", "references", "groups", "refused"):
            assert here[key] == record[key]


def test_records_are_those_of_threads_for_relative_names_too(
    cluster: Cluster, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)  # not where Ray's workers were started
    here = Path(folder.name)
    expected = run(here, tmp_path / "threads.json", PixelEngine(), LIMITS, 2, None, False)
    on_ray = OnRay(partial(Marked, tmp_path), cluster)
    found = run(here, tmp_path / "ray.json", PixelEngine(), LIMITS, 2, None, False, on_ray=on_ray)
    check_alike(found, expected)
    assert found["p0"]["references"][0] == f"{here}/p0/0.png"
    assert len((tmp_path / "calls").read_text().split()) == PEOPLE
    by_ray, by_threads = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ray", "threads"))
    assert {**by_ray, "people": None} == {**by_threads, "people": None}
    assert not (tmp_path / "ray.json.partial").exists()


def test_a_run_that_was_stopped_half_way_does_the_others(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    output, journal = tmp_path / "out.json", tmp_path / "out.json.partial"
    people = people_in(folder)
    expected = run(folder, tmp_path / "all.json", PixelEngine(), LIMITS, 2, None, False)
    head = {"format": "arcface-consensus", "version": 2, "contract_id": CONTRACT}
    lines = [{**head, "settings": {**vars(LIMITS), "photos": False}}, *(expected[name] for name in list(people)[:2])]
    journal.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"person": "p3", "sig')
    on_ray = OnRay(partial(Marked, tmp_path), cluster)
    check_alike(run(folder, output, PixelEngine(), LIMITS, 2, None, False, on_ray=on_ray), expected)
    assert len((tmp_path / "calls").read_text().split()) == PEOPLE - 2


def test_a_killed_worker_costs_nothing_and_a_person_who_kills_three_is_listed_as_failed(
    cluster: Cluster, folder: Path, tmp_path: Path
) -> None:
    people = people_in(folder)
    (tmp_path / "deadly.png").write_bytes(cv2.imencode(".png", np.full((112, 112, 3), DEADLY, np.uint8))[1].tobytes())
    expected = run(folder, tmp_path / "all.json", PixelEngine(), LIMITS, 2, None, False)
    records: dict[str, dict] = {}
    told: list[str] = []
    consensus_on_ray(
        {**people, "zoe": [str(tmp_path / "deadly.png")]},
        partial(Mortal, tmp_path),
        CONTRACT,
        lambda record: records.update({record["person"]: record}),
        LIMITS,
        cluster=cluster,
        say=told.append,
    )
    failed = records.pop("zoe")
    check_alike({name: records[name] for name in people}, expected)
    assert set(failed) == set(expected["p0"])
    assert (failed["agreed"], failed["embedding"]) == (False, None)
    assert failed["reason"].startswith("failed: this person killed 3 workers (")
    assert failed["refused"] == [{"path": str(tmp_path / "deadly.png"), "reason": failed["reason"]}]
    assert (tmp_path / "deaths").read_text() == "xxx"
    assert [line for line in told if line.startswith("zoe: ")] == [f"zoe: {failed['reason']}"]


def test_errors_of_a_task_come_out_as_they_are_and_another_contract_is_refused(cluster: Cluster, folder: Path) -> None:
    people = people_in(folder)
    with pytest.raises(ServerUnreachable, match=r"^no server at gpu-1:8001$"):
        consensus_on_ray(people, Away, CONTRACT, print, LIMITS, cluster=cluster)
    with pytest.raises(ContractMismatch, match=r"this run is of contract dddd.*start over: --force"):
        consensus_on_ray(people, PixelEngine, "d" * 64, print, LIMITS, cluster=cluster)
    records: list[dict] = []
    consensus_on_ray(people, Bare, "b" * 32, records.append, LIMITS, cluster=cluster)
    assert len(records) == PEOPLE
    for contract in ("d" * 32, "b" * 64):  # only its answers name it; a whole id is never stated
        with pytest.raises(ContractMismatch, match=rf"this run is of contract {contract}, .*expected one model"):
            consensus_on_ray(people, Bare, contract, print, LIMITS, cluster=cluster)


def test_faces_of_photos_are_found_in_the_task(cluster: Cluster, assets: Path, tmp_path: Path) -> None:
    detector = next((assets / "detectors").glob("*yunet*.onnx"))
    for person in sorted((assets / "faces" / "raw250").iterdir())[:2]:
        (tmp_path / "photos" / person.name).mkdir(parents=True)
        for photo in sorted(person.iterdir())[:3]:
            (tmp_path / "photos" / person.name / photo.name).symlink_to(photo)
    limits = Limits(max_distance=1.0)
    arguments = (tmp_path / "photos", tmp_path / "out.json", PixelEngine(), limits, 2, None, True, detector)
    expected = run(*arguments)
    found = run(*arguments, OnRay(PixelEngine, cluster))
    assert all(len(record["distances"]) >= 3 for record in expected.values())
    check_alike(found, expected)


def test_the_command_runs_on_ray(
    cluster: Cluster, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcface_clients.TritonEmbedder", partial(as_the_command_connects, tmp_path))
    line = [
        str(folder),
        "-o",
        str(tmp_path / "out.json"),
        "--engine",
        "ray",
        "--workers",
        "2",
        "--max-distance",
        "0.12",
    ]
    shown = CliRunner().invoke(command, line)
    assert shown.exit_code == 0, shown.output
    assert f"{PEOPLE} of {PEOPLE} people agreed, {PEOPLE} outliers, 1 files not read" in shown.output
    assert len((tmp_path / "calls").read_text().split()) == PEOPLE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "ray", "--cache", "faces.sqlite"], "--cache is a file of one host"),
        (["--runtime-env", __file__], "--runtime-env is for Ray: add --engine ray"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    shown = CliRunner().invoke(command, [str(folder), "-o", str(tmp_path / "out.json"), *options])
    assert message in str(shown.exception)
    assert list(tmp_path.iterdir()) == []
