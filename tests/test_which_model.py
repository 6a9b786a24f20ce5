"""A demo network and two models of one's own in models/, and a server: every door takes the one that is served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from arcface_build.cli import main
from arcface_build.serving.ports import free_ports
from arcface_build.serving.process import TritonProcess
from arcface_clients import get_embedding_backend
from arcface_clients.faces.synthetic import synthetic_faces
from tiny_model import write_model


@pytest.fixture
def folder(demo_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose models/ holds mine, other and the demo network, which is served."""
    shutil.copytree(demo_repository.parent / "models", tmp_path / "models")
    for seed, name in enumerate(("mine", "other")):
        write_model(tmp_path / "models" / name, seed=seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    said = capsys.readouterr()
    return caught.value.code, said.out + said.err


def test_a_pipeline_falls_back_to_and_is_validated_by_the_served_model(
    server: TritonProcess, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCFACE_TRITON__URL", server.grpc_url)
    with get_embedding_backend() as backend:
        assert backend.encode(synthetic_faces(2)).shape == (2, 512)
        assert (backend.last_engine, backend.validations["triton"].status) == ("triton", "passed")


def test_compare_matrix_and_doctor_take_the_served_model(
    server: TritonProcess, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = run(capsys, "compare", "insightface", f"{server.grpc_url}/arcface", "--n-samples", "4", "--json")
    assert status == 0, said
    assert json.loads(said)["passed"]
    status, said = run(capsys, "matrix", f"{server.grpc_url}/arcface", "--n-samples", "4", "--batch", "2")
    assert status == 0, said
    _, said = run(capsys, "doctor", server.grpc_url, "--json")
    (model,) = [check for check in json.loads(said)["checks"] if check["name"] == "local model"]
    assert (model["status"], model["found"].split()[0]) == ("ok", "demo-mobile")


def test_without_a_server_two_models_of_ones_own_are_asked_about_and_a_demo_is_not(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCFACE_TRITON__URL", f"127.0.0.1:{free_ports().grpc}")
    line = ("compare", "insightface", "onnx", "--n-samples", "4")
    status, said = run(capsys, *line)
    assert status == 2 and "models contains 2 models (mine, other), and none of them is served: choose one" in said
    shutil.rmtree(folder / "models" / "other")
    status, said = run(capsys, *line, "--json")
    assert status == 0 and json.loads(said)["a"]["contract_id"] == contract_of(folder / "models" / "mine")


def contract_of(model: Path) -> str:
    return str(json.loads((model / "manifest.json").read_text())["contract_id"])
