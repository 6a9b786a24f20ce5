"""`arcface import` as a user runs it: exit codes, whole messages, JSON, a second run, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from arcface_build.cli import main
from arcface_build.imports.importing import existing_import
from arcface_build.imports.source import known_models, resolve
from arcface_clients.faces.synthetic import synthetic_faces
from conftest import copy_repository
from deadlines import HANG_S
from test_checkpoint import state_dict, write_safetensors
from tiny_nets import tiny_net

# Warnings are errors, but for one of protobuf 4.25 about itself, on Python 3.12.
WARNINGS = ["-W", "error", "-W", "ignore:Type google._upb._message:DeprecationWarning"]
COMMAND = [sys.executable, *WARNINGS, "-c", "from arcface_build.cli import main; main()", "import"]


def arcface_import(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=folder, capture_output=True, text=True, timeout=HANG_S)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    onnx.save(tiny_net(batch=1, baked_reshape=1), str(tmp_path / "net.onnx"))
    return tmp_path


def test_a_file_is_imported_installed_and_the_second_time_left_alone(workplace: Path) -> None:
    repository = copy_repository(workplace)
    first = arcface_import(workplace, "net.onnx", "--name", "mine", "--json", "-q")
    assert (first.returncode, first.stderr) == (0, "")
    manifest = json.loads(first.stdout)
    assert manifest == json.loads((workplace / "models" / "mine" / "manifest.json").read_text())
    overlay = (repository / "arcface_onnx" / "configs" / "onnx.pbtxt").read_text()
    assert manifest["contract_id"] in overlay
    for file, form in (("model.onnx", "serving_cpu.onnx"), ("model.gpu.onnx", "serving.onnx")):
        served = (repository / "arcface_onnx" / "1" / file).read_bytes()
        assert served == (workplace / "models" / "mine" / form).read_bytes()
    assert '{ key: "8.6" value: "model.gpu.onnx" }' in overlay
    again = arcface_import(workplace, "net.onnx", "--name", "mine")
    assert "unchanged: models/mine (512-d, opset 17)" in again.stdout
    assert "served from: arcface_reference/1, arcface_onnx/1" in again.stdout
    unproved = arcface_import(workplace, "net.onnx", "--name", "mine", "--faces", ".")
    assert "so . was not looked at. To prove the import on it: --force" in unproved.stderr


def test_a_demo_that_is_there_is_not_built_again(demo_repository: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(demo_repository.parent / "models", models)
    again = arcface_import(tmp_path, "demo", "--no-assemble", "--models-dir", str(models))
    assert (again.returncode, "unchanged: " in again.stdout) == (0, True)
    source = resolve("demo", tmp_path, known=known_models())
    assert existing_import(models / source.name, source, None)
    assert not existing_import(models / source.name, replace(source, recipe="demo mobile, seed 0, of other code"), None)


def test_the_report_says_what_was_found_and_proved(workplace: Path) -> None:
    answer = arcface_import(workplace, "net.onnx", "--no-assemble", "--color", "bgr", "--mean", "127.5", "--std", "128")
    assert "bgr, mean [127.5, 127.5, 127.5], std [128.0, 128.0, 128.0] (stated by the caller)" in answer.stdout
    assert "dynamic_batch  batch was fixed to 1, also in 1 Reshape" in answer.stdout
    assert "64 faces (synthetic) against insightface.forward: min cosine 1.0000" in answer.stdout
    assert not (workplace / "model_repository").exists()


WRONG = {
    "no such file": (["no.onnx"], 3, "Missing: no.onnx does not exist: expected an ONNX file."),
    "no such name": (["no"], 2, "WrongUse: no file and no known model 'no': expected an ONNX file or one of demo,"),
    "not ONNX": (["not.onnx"], 2, "SourceRefused: not.onnx is not an ONNX file (it starts with 6e 6f 74)."),
    "mixes faces": (["mixes.onnx"], 1, "ProofFailed: the faces of a batch affect each other: row 1 of 2 differs"),
    "mean without std": (["net.onnx", "--mean", "1"], 2, "WrongUse: --mean and --std go together: expected both"),
    "units of 0..1": (
        ["net.onnx", "--mean", "0.5", "--std", "0.5"],
        2,
        "WrongUse: --mean 0.5 --std 0.5 look like units of 0..1: expected 0..255. Multiply both by 255.",
    ),
    "two numbers": (
        ["net.onnx", "--mean", "1,2", "--std", "1"],
        2,
        "WrongUse: --mean is '1,2': expected one number, or three such as 123.675,116.28,103.53.",
    ),
    "std 0": (
        ["net.onnx", "--mean", "0", "--std", "0"],
        2,
        "WrongUse: --mean, --std: std is (0.0, 0.0, 0.0); expected",
    ),
    "a name for a path": (["net.onnx", "--name", "../up"], 2, "WrongUse: '../up' cannot be a model's name: expected"),
    "few faces": (["net.onnx", "--faces", "few.npz"], 2, "WrongUse: few.npz contains 3 faces: expected at least 64"),
    "faces of another size": (
        ["net.onnx", "--faces", "pictures"],
        2,
        "WrongUse: pictures/a.png is not a crop: expected an aligned crop of 112×112 pixels, got 100×90. ",
    ),
    "a pack without licence": (
        ["buffalo_l", "--insightface-root", "none"],
        2,
        "LicenceNotAccepted: buffalo_l is not in none/models/buffalo_l; its weights are licensed for non-commercial",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_work_is_one_line_an_exit_code_and_nothing_left(
    what: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cv2

    arguments, code, message = WRONG[what]
    (workplace / "not.onnx").write_bytes(b"not")
    onnx.save(tiny_net(across_batch=True), str(workplace / "mixes.onnx"))
    np.savez(workplace / "few.npz", faces=synthetic_faces(3))
    (workplace / "pictures").mkdir()
    cv2.imwrite(str(workplace / "pictures" / "a.png"), np.zeros((90, 100, 3), np.uint8))
    before = sorted(workplace.rglob("*"))
    monkeypatch.chdir(workplace)
    with pytest.raises(SystemExit) as caught:
        main(["import", "-q", *arguments, "--no-assemble", "--models-dir", "out"])
    out, errors = capsys.readouterr()
    assert (caught.value.code, out) == (code, "")
    assert errors.startswith(message) and errors.count("\n") == 1
    assert sorted(path for path in workplace.rglob("*") if path != workplace / "out") == before


def test_a_model_repository_that_is_none_is_said_before_the_work(workplace: Path) -> None:
    answer = arcface_import(workplace, "net.onnx", "--model-repository", "models")
    assert (answer.returncode, answer.stderr) == (
        3,
        "Missing: models is not our model repository: expected arcface/config.pbtxt in it.\n",
    )
    assert not (workplace / "models").exists()


def children_in(folder: Path) -> list[str]:
    """Processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").resolve() == folder.resolve():
                found.append((process / "cmdline").read_text())
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_kill_leave_nothing_behind(workplace: Path, number: signal.Signals) -> None:
    np.savez(workplace / "many.npz", faces=np.repeat(synthetic_faces(8), 1000, axis=0))
    arguments = ["net.onnx", "--no-assemble", "--faces", "many.npz"]
    without_warnings = [part for part in COMMAND if part not in WARNINGS]  # an import cut short leaves files open
    process = subprocess.Popen([*without_warnings, *arguments], cwd=workplace, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + HANG_S
    while not list(workplace.glob("models/.import-*/made/.net.*/source.onnx")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=HANG_S)
    assert (process.returncode, errors.strip()) == (130, "interrupted")
    assert list((workplace / "models").iterdir()) == []
    assert not children_in(workplace)


def test_own_crops_prove_it(assets: Path, workplace: Path) -> None:
    crops = str(assets / "faces" / "aligned112")
    answer = arcface_import(workplace, "net.onnx", "--no-assemble", "--faces", crops, "--json")
    proof = json.loads(answer.stdout)["proof"]
    assert (proof["faces"], proof["faces_from"]) == (400, "aligned112")


def test_a_checkpoint_is_imported_by_the_command(workplace: Path) -> None:
    write_safetensors(workplace / "backbone.safetensors", state_dict((2, 2, 2, 2), dim=128))
    answer = arcface_import(workplace, "backbone.safetensors", "--no-assemble")
    assert answer.returncode == 0, answer.stderr
    assert "backbone: backbone.safetensors (" in answer.stdout
    assert "written: models/backbone (128-d, opset 17)" in answer.stdout
    assert [p.name for p in (workplace / "models").iterdir()] == ["backbone"]
