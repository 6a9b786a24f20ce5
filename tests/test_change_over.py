"""Whoever installs weights under a running server is told that it answers with the former ones, and what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from arcface_build.cli import cli
from arcface_build.repository.assemble import assemble
from arcface_build.serving.change_over import ChangeOver, servers_of
from arcface_clients import TritonEmbedder
from arcface_clients.checks.parity import measure_parity, render_table
from arcface_clients.faces.detect import MODEL_NAME
from arcface_clients.faces.synthetic import synthetic_faces
from conftest import copy_repository
from deadlines import HANG_S
from serve_process import Serving
from tiny_model import write_model

FACES = synthetic_faces(2)


@pytest.fixture
def served(tmp_path, start_triton):
    """A repository with two versions of arcface_onnx, under a live server, and the folder of a third model."""
    repository = copy_repository(tmp_path)
    assemble(write_model(tmp_path / "models" / "first"), repository)
    assemble(write_model(tmp_path / "models" / "second", seed=1), repository)
    write_model(tmp_path / "models" / "third", seed=2)
    return repository, start_triton(repository, ["arcface"])


def arcface(*line: str | Path) -> Result:
    done = CliRunner().invoke(cli, [str(word) for word in line])
    assert done.exit_code == 0, done.output
    return done


def test_who_installs_or_goes_back_under_a_live_server_is_told_how_to_change_over(served, tmp_path):
    repository, server = served
    options = ("--model-repository", repository)
    with TritonEmbedder(server.grpc_url) as embedder:
        before = embedder.encode(FACES)
        for line in (("assemble", "third", "--models-dir", tmp_path / "models", *options), ("rollback", *options)):
            told = arcface(*line).stderr
            assert f"tritonserver (process {server.pid}) serves this repository and goes on answering with" in told
            assert "To change over: stop it and run arcface serve again. The new weights are of another" in told
            np.testing.assert_allclose(embedder.encode(FACES), before, atol=1e-5)
        nothing_new = arcface("assemble", "second", "--models-dir", tmp_path / "models", *options)
        assert "goes on answering" not in nothing_new.stderr
    assert servers_of(repository) == [server.pid]


def test_who_exchanges_the_detector_under_a_live_server_is_told_so_too(served, tmp_path, assets):
    repository, server = served
    options, yunet = ("--model-repository", repository), assets / "detectors" / MODEL_NAME
    model = onnx.load(yunet)
    model.doc_string = "trained anew"
    onnx.save(model, tmp_path / "anew.onnx")
    arcface("import-detector", yunet, *options)
    for line in (("import-detector", tmp_path / "anew.onnx"), ("rollback", "--model", "photo_faces")):
        told = arcface(*line, *options).stderr
        assert f"tritonserver (process {server.pid}) serves this repository and goes on answering with" in told
        assert "another contract" not in told
    assert "goes on answering" not in arcface("import-detector", yunet, *options).stderr


def test_a_server_that_comes_back_with_other_weights_says_so(triton_binary, tmp_path):
    repository = copy_repository(tmp_path)
    assemble(write_model(tmp_path / "models" / "first"), repository)
    serving = Serving(repository, "--no-reference")
    try:
        os.kill(serving.stub(), signal.SIGKILL)
        serving.wait_for("Ctrl-C stops it.", 2)
        assert "OTHER WEIGHTS" not in "".join(serving.said)
        assemble(write_model(tmp_path / "models" / "second", seed=1), repository)
        os.kill(serving.stub(), signal.SIGKILL)
        serving.wait_for("OTHER WEIGHTS than before: contract ")
        serving.wait_for("Ctrl-C stops it.", 3)
    finally:
        serving.stop()


def test_without_a_server_nothing_is_said(tmp_path):
    repository = copy_repository(tmp_path)
    change = ChangeOver(repository)
    assemble(write_model(tmp_path / "models" / "first"), repository)
    assert change.told() == ""


def test_demo_weights_are_named_in_the_table_the_metrics_and_by_embed_and_consensus(server, tmp_path):
    cv2 = pytest.importorskip("cv2")
    with TritonEmbedder(server.grpc_url) as embedder:
        embedder.ensure_ready()
        assert embedder.served.demo
    report = measure_parity(server.grpc_url, FACES, limits={"fp32": 1e-3})
    assert all(row.demo for row in report.rows)
    assert render_table(report).count(", DEMO\n") + 1 == len(report.rows)
    with urllib.request.urlopen(server.metrics_url, timeout=HANG_S) as metrics:
        assert 'arcface_demo_weights{model="arcface_onnx"} 1' in metrics.read().decode()
    person = tmp_path / "people" / "a"
    person.mkdir(parents=True)
    for number, face in enumerate(FACES):
        cv2.imwrite(str(person / f"{number}.png"), face)
    url = ("--url", server.grpc_url)
    for line in (
        ("embed", person, "-o", tmp_path / "out.npz", *url),
        ("embed", person, "-o", tmp_path / "out.parquet", *url),
        ("consensus", person.parent, "-o", tmp_path / "out.json", *url),
    ):
        if "out.parquet" in str(line[3]):
            pytest.importorskip("pyarrow")
        assert "runs DEMO weights: its embeddings recognise nobody" in command(*line), line[0]


def command(*line: str | Path) -> str:
    """What a command of its own process writes to standard error."""
    run = [sys.executable, "-c", "from arcface_build.cli import main; main()", *map(str, line)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    return done.stderr
