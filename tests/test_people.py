"""Folders of people: strangers found, files that cannot be read listed, an interrupted run gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from arcface_build.commands.consensus import command, run
from arcface_clients.errors import ConfigError, ContractMismatch, ServerUnreachable, WrongUse
from arcface_clients.faces.synthetic import synthetic_people
from arcface_clients.people.cache import EmbeddingCache
from arcface_clients.people.persons import Journal, Limits, consensus_of_people, people_in
from deadlines import HANG_S
from people import CONTRACT, PixelEngine

LIMITS = Limits(max_distance=0.12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight people with five faces each, one stranger in each folder, one file that is no image."""
    root = tmp_path_factory.mktemp("people")
    faces = synthetic_people(9, 6, seed=3)
    for person in range(8):
        (root / f"p{person}").mkdir()
        for view in range(5):
            cv2.imwrite(str(root / f"p{person}" / f"{view}.png"), faces[person, view])
        cv2.imwrite(str(root / f"p{person}" / "stranger.png"), faces[person + 1, 5])
    (root / "p0" / "broken.jpg").write_bytes(b"no image")
    return root


def test_strangers_in_each_folder_are_found(folder: Path, tmp_path: Path) -> None:
    records = run(folder, tmp_path / "out.json", PixelEngine(), LIMITS, 3, None, False)
    assert list(records) == [f"p{i}" for i in range(8)]
    for name, record in records.items():
        assert record["agreed"], record["reason"]
        assert [Path(outlier["path"]).name for outlier in record["outliers"]] == ["stranger.png"]
        assert [Path(path).name for path in record["references"]] == [f"{i}.png" for i in range(5)]
        assert len(record["refused"]) == (name == "p0")
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["format"], written["version"], written["contract_id"]) == ("arcface-consensus", 2, CONTRACT)
    assert np.linalg.norm(written["people"]["p3"]["embedding"]) == pytest.approx(1, abs=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_folder_in_which_no_file_is_a_face_is_one_sentence_and_leaves_no_file(tmp_path: Path) -> None:
    for name, data in (("ann/1.jpg", b"no image"), ("ann/2.jpg", b""), ("bob/notes.txt", b"text")):
        (tmp_path / "people" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "people" / name).write_bytes(data)
    with pytest.raises(WrongUse, match=r"no face could be read from .*people \(2 people, 2 files refused; .*1.jpg"):
        run(tmp_path / "people", tmp_path / "out.json", PixelEngine(), LIMITS, 1, None, False)
    assert [path.name for path in tmp_path.iterdir()] == ["people"]


def test_an_undecided_person_has_both_groups_in_the_output_and_on_the_screen(tmp_path: Path, monkeypatch) -> None:
    faces = synthetic_people(2, 3, seed=6)
    (tmp_path / "people" / "twins").mkdir(parents=True)
    files = [tmp_path / "people" / "twins" / f"{name}{view}.png" for name in "ab" for view in range(3)]
    for file, face in zip(files, faces.reshape(-1, 112, 112, 3), strict=True):
        cv2.imwrite(str(file), face)
    records = run(tmp_path / "people", tmp_path / "out.json", PixelEngine(), LIMITS, 1, None, False)
    monkeypatch.setattr("arcface_clients.TritonEmbedder", lambda *_, **__: PixelEngine())
    shown = CliRunner().invoke(
        command, [str(tmp_path / "people"), "-o", str(tmp_path / "two.json"), "--max-distance", "0.12"]
    )
    groups = [[str(file) for file in files[:3]], [str(file) for file in files[3:]]]
    record = json.loads((tmp_path / "out.json").read_text())["people"]["twins"]
    assert (record["agreed"], record["references"], record["outliers"], record["embedding"]) == (False, [], [], None)
    assert sorted(record["groups"]) == sorted(records["twins"]["groups"]) == groups
    assert "undecided: twins: 3 of 6 different faces agree" in shown.output
    assert all(f"3 faces: {', '.join(group)}" in shown.output for group in groups)


def test_a_cache_spares_the_engine_and_forgets_one_person(folder: Path, tmp_path: Path) -> None:
    engine = PixelEngine()
    for name in ("a.json", "b.json"):
        run(folder, tmp_path / name, engine, LIMITS, 2, tmp_path / "cache.sqlite", False)
    assert engine.faces_seen == 48
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    with EmbeddingCache(path=tmp_path / "cache.sqlite") as cache:
        assert cache.clear("p5") == 6


def test_ctrl_c_keeps_who_is_finished_and_a_rerun_goes_on(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from people import PixelEngine\n"
        "from arcface_build.commands.consensus import run\n"
        "from arcface_clients.people.persons import Limits\n"
        "class Slow(PixelEngine):\n"
        "    def encode(self, faces):\n"
        "        time.sleep(0.2)\n"
        "        return super().encode(faces)\n"
        "run(Path(sys.argv[2]), Path(sys.argv[3]), Slow(), Limits(max_distance=0.12), 1, None, False)\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(folder), str(output)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        journal = tmp_path / "out.json.partial"
        deadline = time.monotonic() + HANG_S
        while (not journal.exists() or journal.read_bytes().count(b"\n") < 4) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        assert b"KeyboardInterrupt" in process.stderr.read()
    assert not output.exists()
    finished = journal.read_bytes().count(b"\n") - 1
    assert 3 <= finished < 8
    with journal.open("ab") as file:
        file.write(b'{"person": "p7", "signat')  # what a kill in the middle of a write leaves
    engine = PixelEngine()
    records = run(folder, output, engine, LIMITS, 2, None, False)
    assert len(engine.calls) == 8 - finished
    assert list(records) == [f"p{i}" for i in range(8)]
    assert run(folder, tmp_path / "again.json", PixelEngine(), LIMITS, 2, None, False) == records
    assert not journal.exists()


def test_a_person_whose_files_changed_is_done_again(folder: Path, tmp_path: Path) -> None:
    people = people_in(folder)
    with Journal(tmp_path / "j", CONTRACT, LIMITS) as journal:
        for record in consensus_of_people(people, PixelEngine(), LIMITS):
            journal.add(record)
        assert journal.left(people) == {}
        people["p4"] = people["p4"][:-1]
        assert list(journal.left(people)) == ["p4"]


def test_a_journal_of_another_model_or_other_limits_is_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "out.json.partial"
    Journal(path, CONTRACT, LIMITS).close()
    with pytest.raises(ContractMismatch, match="Start over: --force"):
        Journal(path, "d" * 64, LIMITS)
    with pytest.raises(ConfigError, match=r"was started with \{'max_distance': 0.12"):
        Journal(path, CONTRACT, Limits())
    with pytest.raises(ConfigError, match="'photos': 'yunet sha256=1'}: expected the same"):
        Journal(path, CONTRACT, LIMITS, detector_id="yunet sha256=1")
    with (
        Journal(path, "d" * 64, LIMITS, start_over=True),
        pytest.raises(ConfigError, match="another process is writing"),
    ):
        Journal(path, "d" * 64, LIMITS)
    for text in ("something else", "[1]", '{"contract_id": 1}\n[1]', "{}"):
        path.write_text(f"{text}\n")
        with pytest.raises(ConfigError, match="is not a journal written by this program"):
            Journal(path, CONTRACT, LIMITS)


def test_a_journal_of_another_detector_is_not_mixed_in_and_one_of_an_unknown_detector_only_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "out.json.partial"
    Journal(path, CONTRACT, LIMITS, detector_id="yunet sha256=1").close()
    with pytest.raises(ConfigError, match=r"'photos': 'yunet sha256=1'\}, now it is .*sha256=2'\}: expected the same"):
        Journal(path, CONTRACT, LIMITS, detector_id="yunet sha256=2")
    path.write_text(path.read_text().replace('"yunet sha256=1"', "true"))  # as earlier versions wrote it
    Journal(path, CONTRACT, LIMITS, detector_id="yunet sha256=2").close()
    assert "does not say which detector found the faces of the people who are in it" in caplog.text


def test_a_dead_server_stops_the_run_and_no_more_people_wait_than_twice_the_workers(folder: Path) -> None:
    class Dying(PixelEngine):
        def encode(self, faces: np.ndarray) -> np.ndarray:
            if len(self.calls) == 3:
                raise ServerUnreachable("gone")
            return super().encode(faces)

    asked: list[str] = []

    class People(dict):
        def items(self):  # type: ignore[override]
            for name, files in super().items():
                asked.append(name)
                yield name, files

    records = consensus_of_people(People(people_in(folder)), Dying(), LIMITS, workers=1)
    next(records)
    assert len(asked) <= 3
    with pytest.raises(ServerUnreachable):
        list(records)


def test_a_folder_without_folders_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one per person"):
        people_in(tmp_path)


def test_the_command_asks_a_real_server(server, folder: Path, assets: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-c", "from arcface_build.cli import main; main()", "consensus"]
    options = ["--url", server.grpc_url, "--max-distance", "0.9", "--json"]
    done = subprocess.run(
        [*line, folder, "-o", tmp_path / "out.json", *options], capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["people"], summary["refused"]) == (8, 1)
    again = subprocess.run([*line, folder, "-o", tmp_path / "out.json", *options], capture_output=True, text=True)
    assert again.returncode == 2
    assert "already exists" in again.stderr
    photos = tmp_path / "photos"
    photos.mkdir()
    for person in sorted((assets / "faces" / "raw250").iterdir())[:2]:
        (photos / person.name).symlink_to(person)
    found_by = ["--detect", "--detector", assets / "detectors" / "face_detection_yunet_2023mar.onnx"]
    done = subprocess.run(
        [*line, photos, "-o", tmp_path / "photos.json", *options, *found_by],
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    people = json.loads((tmp_path / "photos.json").read_text())["people"]
    assert all(len(record["distances"]) >= 8 for record in people.values())
