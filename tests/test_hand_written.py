"""The hand-written files of a model repository: laid out where there are none, followed, never over an edit."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from arcface_build.repository.find import find_repository
from arcface_build.repository.hand_written import MEMORY, Followed, follow, hand_written, lay_out
from arcface_clients.config.schema import EmbeddingConfig
from arcface_clients.errors import Missing, WrongUse
from conftest import REPO


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """What a version brings, to be changed by a test."""
    return lay_out(tmp_path / "shipped", REPO / "model_repository")


def test_the_hand_written_files_are_those_in_git():
    line = ["git", "ls-files", "model_repository"]
    listed = subprocess.run(line, cwd=REPO, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    in_git = [name.removeprefix("model_repository/") for name in listed.stdout.splitlines()]
    assert hand_written(REPO / "model_repository") == sorted(in_git)


def test_a_repository_is_laid_out_without_what_the_build_wrote_into_the_other(shipped, tmp_path):
    (shipped / "arcface_onnx" / "1" / "model.onnx").write_bytes(b"weights")
    (shipped / "arcface_onnx" / "configs").mkdir()
    (shipped / "arcface_onnx" / "configs" / "onnx.pbtxt").write_text("an overlay")
    (shipped / "arcface" / "configs" / "tuned.pbtxt").write_text("tuned")
    made = lay_out(tmp_path / "new", shipped)
    assert find_repository(made) == made
    assert hand_written(made) == hand_written(REPO / "model_repository")
    assert not list(made.glob("*/1/*.onnx")) and not (made / "arcface_onnx" / "configs").exists()
    assert not list(made.rglob("tuned.pbtxt"))


def test_an_empty_folder_is_filled_and_any_other_refused(shipped, tmp_path):
    (tmp_path / "volume").mkdir()
    assert lay_out(tmp_path / "volume", shipped).is_dir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    with pytest.raises(WrongUse, match="neither a model repository of ours nor empty"):
        lay_out(tmp_path / "photos", shipped)


def test_a_copy_that_fails_leaves_nothing(shipped, tmp_path):
    (shipped / "arcface_trt" / "config.pbtxt").unlink()
    (shipped / "arcface_trt" / "config.pbtxt").mkdir()
    with pytest.raises(IsADirectoryError):
        lay_out(tmp_path / "new", shipped)
    assert not (tmp_path / "new").exists()


def test_a_later_version_replaces_what_nobody_edited_and_leaves_weights_alone(shipped, tmp_path):
    made = lay_out(tmp_path / "new", shipped)
    assert follow(made, shipped) == Followed()
    (made / "arcface_onnx" / "1" / "model.onnx").write_bytes(b"weights")
    edited, untouched = "arcface/config.pbtxt", "embedding_drift/1/model.py"
    (made / edited).write_text("# ours")
    for name in (edited, untouched):
        (shipped / name).write_text("# of the next version")
    (shipped / "later_model").mkdir()
    (shipped / "later_model" / "config.pbtxt").write_text('name: "later_model"')
    (shipped / "arcface_parity" / "configs" / "tensorrt.pbtxt").unlink()

    followed = follow(made, shipped)
    assert set(followed.updated) == {
        untouched, "later_model/config.pbtxt", "arcface_parity/configs/tensorrt.pbtxt"
    }  # fmt: skip
    assert followed.edited == (edited,)
    assert (made / edited).read_text() == "# ours"
    assert (made / untouched).read_text() == "# of the next version"
    assert not (made / "arcface_parity" / "configs" / "tensorrt.pbtxt").exists()
    assert (made / "arcface_onnx" / "1" / "model.onnx").read_bytes() == b"weights"
    assert follow(made, shipped) == Followed(edited=(edited,)), "said until it is settled"
    (made / edited).unlink()
    assert follow(made, shipped).updated == (edited,)
    assert follow(made, shipped) == Followed()
    (shipped / "later_model" / "config.pbtxt").unlink()
    assert follow(made, shipped).updated == ("later_model/config.pbtxt",)
    assert not (made / "later_model").exists(), "Triton takes a folder without config.pbtxt for a broken model"


def test_an_edit_is_nothing_to_talk_about_while_the_version_stays(shipped, tmp_path):
    made = lay_out(tmp_path / "new", shipped)
    (made / "arcface" / "config.pbtxt").write_text("# ours")
    assert follow(made, shipped) == Followed()


def test_code_follows_in_every_version_of_its_model(shipped, tmp_path):
    made = lay_out(tmp_path / "new", shipped)
    model = made / "arcface_reference"
    for version in ("2", "3"):
        shutil.copytree(model / "1", model / version)
    (model / "3" / "model.py").write_text("# ours")
    (shipped / "arcface_reference" / "1" / "model.py").write_text("import new")
    (shipped / "arcface_reference" / "1" / "new.py").write_text("# which the next version's model.py needs")
    followed = follow(made, shipped)
    code = ("1/model.py", "2/model.py", "1/new.py", "2/new.py", "3/new.py")
    assert followed.updated == tuple(f"arcface_reference/{name}" for name in code)
    assert followed.edited == ("arcface_reference/3/model.py",)


def test_in_a_checkout_later_versions_take_the_code_of_the_first_and_nothing_else_is_touched(shipped, tmp_path):
    made = Path(shutil.copytree(shipped, tmp_path / "checkout"))
    (made / MEMORY).unlink()
    second = Path(shutil.copytree(made / "photo_faces" / "1", made / "photo_faces" / "2"))
    (second / "detector.onnx").write_bytes(b"weights")
    (made / "photo_faces" / "1" / "model.py").write_text("# what git brought\n")
    (second / "align.py").unlink()
    before = (made / "photo_faces" / "config.pbtxt").read_bytes()
    assert set(follow(made).updated) == {"photo_faces/2/model.py", "photo_faces/2/align.py"}
    assert (second / "model.py").read_text() == "# what git brought\n"
    assert (second / "detector.onnx").read_bytes() == b"weights"
    assert (made / "photo_faces" / "config.pbtxt").read_bytes() == before
    assert follow(made) == Followed()


def test_a_checkout_is_never_touched(shipped, tmp_path):
    made = lay_out(tmp_path / "new", shipped)
    (made / MEMORY).unlink()
    (shipped / "arcface" / "config.pbtxt").write_text("# of the next version")
    assert follow(made, shipped) == Followed()


def test_a_memory_that_cannot_be_read_is_said(shipped, tmp_path):
    made = lay_out(tmp_path / "new", shipped)
    (made / MEMORY).write_text(json.dumps(["?"]))
    with pytest.raises(Missing, match=rf"{MEMORY} cannot be read .* Next: delete it"):
        follow(made, shipped)


@pytest.mark.parametrize("make", [True, False])
def test_a_command_makes_a_repository_where_it_is_asked_to_and_follows_it(shipped, tmp_path, monkeypatch, capsys, make):
    from arcface_build.commands.options import folders
    from arcface_build.repository import hand_written as home

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(home, "shipped", lambda name: shipped)
    monkeypatch.setattr(folders, "settings", EmbeddingConfig)
    if not make:
        with pytest.raises(Missing, match="Make one here: arcface serve"):
            folders.repository_at(None)
        return
    made = folders.repository_at(None, make=True)
    assert made == tmp_path / "here" / "model_repository"
    (made / "arcface" / "config.pbtxt").write_text("# ours")
    for name in ("arcface", "embedding_drift"):
        (shipped / name / "config.pbtxt").write_text("# of the next version")
    assert folders.repository_at(None) == made
    said = " ".join(capsys.readouterr().err.split())
    assert "brought to this version: embedding_drift/config.pbtxt" in said
    assert f"kept {made / 'arcface' / 'config.pbtxt'}, which somebody edited" in said


def test_an_absent_folder_that_was_named_is_a_mistake_and_not_made(tmp_path, monkeypatch):
    from arcface_build.commands.options import folders

    monkeypatch.setattr(folders, "settings", EmbeddingConfig)
    with pytest.raises(Missing, match="is not our model repository"):
        folders.repository_at(tmp_path / "modl_repository", make=True)
    assert list(tmp_path.iterdir()) == []
