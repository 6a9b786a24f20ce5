"""`arcface embed` against a real server: what is written, what is listed, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arcface_clients import TritonEmbedder
from arcface_clients.faces.synthetic import synthetic_faces
from deadlines import HANG_S

cv2 = pytest.importorskip("cv2")


def program(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", "from arcface_build.cli import main; main()", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=HANG_S, **options)


def arcface(*arguments: str) -> subprocess.CompletedProcess[str]:
    return program("embed", *arguments)


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("crops")
    for i, face in enumerate(synthetic_faces(5)):
        cv2.imwrite(str(folder / f"{i}.png"), face)
    (folder / "bad.jpg").write_text("not an image")
    return folder


def test_embeddings_and_names_are_written_and_bad_files_listed(server, crops: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    done = arcface(str(crops), "-o", str(out), "--url", server.grpc_url, "--json")
    assert done.returncode == 0, done.stderr
    assert f"not read: {crops}/bad.jpg: not an image that OpenCV can decode" in done.stderr
    told = json.loads(done.stdout)
    with np.load(out) as saved, TritonEmbedder(server.grpc_url) as embedder:
        assert saved["paths"].tolist() == [str(crops / f"{i}.png") for i in range(5)]
        np.testing.assert_allclose(saved["embeddings"], embedder.encode(synthetic_faces(5)), atol=1e-5)
        assert str(saved["contract_id"]) == (embedder.contract_id or "")
        assert str(saved["model"]) == "arcface"
        assert told["embedding_dim"] == embedder.embedding_dim
    assert [r["path"] for r in told["refused"]] == [f"{crops}/bad.jpg"]


def test_a_file_url_is_a_path_for_a_npz_too(server, crops: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "out.npz", crops / "0.png"
    done = arcface(source.as_uri(), "-o", str(out), "--url", server.grpc_url)
    assert done.returncode == 0, done.stderr
    with np.load(out) as saved:
        assert saved["paths"].tolist() == [str(source)]


def test_existing_output_is_kept_unless_forced(crops: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    out.write_bytes(b"precious")
    done = arcface(str(crops), "-o", str(out), "--url", "127.0.0.1:1")
    assert (done.returncode, out.read_bytes()) == (2, b"precious")
    assert done.stderr == f"WrongUse: {out} already exists. Choose another name, or overwrite it: --force\n"


def test_dead_server_leaves_nothing_behind(crops: Path, tmp_path: Path) -> None:
    done = arcface(str(crops), "-o", str(tmp_path / "out.npz"), "--url", "127.0.0.1:1")
    assert done.returncode == 3
    assert done.stderr.startswith("ServerUnreachable: no Triton server answers at grpc://127.0.0.1:1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["embed", "-o", "x.npz"], ["embed", "-o", "x.parquet"], ["consensus", "-o", "x"]])
def test_the_configured_servers_tls_files_are_used_for_that_server_alone(
    command: list[str], crops: Path, tmp_path: Path
) -> None:
    line = [command[0], str(crops), *command[1:]]
    settings = {"ARCFACE_TRITON__URL": "grpcs://127.0.0.1:1", "ARCFACE_TRITON__TLS__CA_FILE": "own.pem"}
    for options, code in ((), 2), (("--url", "grpcs://127.0.0.1:9"), 3):
        done = program(*line, *options, cwd=tmp_path, env={**os.environ, **settings})
        assert done.returncode == code, done.stderr
        assert ("own.pem" in done.stderr) == (not options)


@pytest.mark.parametrize(
    "command", [["embed", "{crops}", "-o", "x.npz"], ["parity"], ["consensus", "{crops}", "-o", "x"]]
)
def test_the_server_is_the_one_of_the_configuration_unless_an_option_names_one(
    command: list[str], crops: Path, tmp_path: Path
) -> None:
    line = [part.format(crops=crops) for part in command]
    settings = {"ARCFACE_TRITON__URL": "127.0.0.1:9"}
    for options, asked in ((), "127.0.0.1:9"), (("--url", "127.0.0.1:1"), "127.0.0.1:1"):
        done = program(*line, *options, cwd=tmp_path, env={**os.environ, **settings})
        assert done.returncode == 3, done.stderr
        assert asked in done.stderr


def test_nothing_readable_is_an_error_and_writes_nothing(server, crops: Path, tmp_path: Path) -> None:
    done = arcface(str(crops / "bad.jpg"), "-o", str(tmp_path / "out.npz"), "--url", server.grpc_url)
    assert done.returncode == 2
    assert "no face could be read" in done.stderr
    assert list(tmp_path.iterdir()) == []
