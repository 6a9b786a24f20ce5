"""The clients in other languages get what TritonEmbedder gets, and what the server refuses is said."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from arcface_build.serving.process import TritonProcess
from arcface_clients import TritonEmbedder
from arcface_clients.faces.synthetic import synthetic_faces
from conftest import REPO
from deadlines import HANG_S

EXAMPLES = REPO / "examples"
FACES = synthetic_faces(3)


@pytest.fixture(scope="module")
def expected(server: TritonProcess) -> tuple[np.ndarray, str]:
    """Embeddings of FACES, and the digits of the contract id that an answer holds."""
    with TritonEmbedder(server.grpc_url) as embedder:
        rows = embedder.encode(FACES)
        prefix = embedder.contract_prefix
    assert prefix
    return rows, prefix


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "faces.bgr").write_bytes(FACES.tobytes())
    return tmp_path / "faces.bgr"


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on this host")
    return found


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=HANG_S)


def said(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_client_sh_gets_the_served_answer(server: TritonProcess, raw: Path, expected: tuple[np.ndarray, str]) -> None:
    program("curl")
    outputs = json.loads(said(run("bash", EXAMPLES / "client.sh", raw, f"http://{server.http_url}")))["outputs"]
    tensors = {tensor["name"]: np.array(tensor["data"]).reshape(tensor["shape"]) for tensor in outputs}
    np.testing.assert_allclose(tensors["embedding"], expected[0], atol=1e-5)
    assert tensors["contract"][0].astype(">i4").tobytes().hex() == expected[1]


def test_client_mjs_gets_the_served_answer(server: TritonProcess, raw: Path, expected: tuple[np.ndarray, str]) -> None:
    answer = json.loads(said(run(program("node"), EXAMPLES / "client.mjs", raw, f"http://{server.http_url}")))
    np.testing.assert_allclose(answer["embeddings"], expected[0], atol=1e-5)
    assert answer["contract"] == expected[1]


def test_client_mjs_turns_a_canvas_into_faces(tmp_path: Path) -> None:
    script = tmp_path / "canvas.mjs"
    script.write_text(
        f'import {{ bgrFromRgba }} from "{EXAMPLES / "client.mjs"}";\n'
        "console.log(JSON.stringify([...bgrFromRgba(new Uint8ClampedArray([1, 2, 3, 255, 4, 5, 6, 255]))]));\n"
    )
    assert json.loads(said(run(program("node"), script))) == [3, 2, 1, 6, 5, 4]


def test_client_java_gets_the_served_answer(
    server: TritonProcess, tmp_path: Path, expected: tuple[np.ndarray, str]
) -> None:
    java = program("java")
    cv2 = pytest.importorskip("cv2")
    crops = [tmp_path / f"{number}.png" for number in range(len(FACES))]
    for path, face in zip(crops, FACES, strict=True):
        cv2.imwrite(str(path), face)
    done = run(java, EXAMPLES / "Client.java", f"http://{server.http_url}", *crops)
    if "compiler" in done.stderr and "not found" in done.stderr:
        pytest.skip("this host's Java runs no source files: it has no compiler (a JDK has one)")
    first, *lines = said(done).splitlines()
    assert first == f"contract {expected[1]}"
    assert [line.split()[0] for line in lines] == [str(path) for path in crops]
    rows = np.array([line.split()[1:] for line in lines], np.float32)
    np.testing.assert_allclose(rows, expected[0], atol=1e-5)


@pytest.mark.parametrize(("client", "needs"), [("client.sh", "curl"), ("client.mjs", "node")])
def test_half_a_face_is_refused_before_it_is_sent(tmp_path: Path, client: str, needs: str) -> None:
    (tmp_path / "half.bgr").write_bytes(bytes(1000))
    command = "bash" if client.endswith("sh") else program(needs)
    done = run(command, EXAMPLES / client, tmp_path / "half.bgr", "http://127.0.0.1:1")
    assert done.returncode != 0
    assert "expected a multiple of 37632" in done.stderr


@pytest.mark.parametrize(("client", "needs"), [("client.sh", "curl"), ("client.mjs", "node")])
def test_what_the_server_says_against_a_request_is_shown(
    server: TritonProcess, tmp_path: Path, client: str, needs: str
) -> None:
    (tmp_path / "many.bgr").write_bytes(bytes(37632 * 200))  # more than max_batch_size
    command = "bash" if client.endswith("sh") and program(needs) else program(needs)
    done = run(command, EXAMPLES / client, tmp_path / "many.bgr", f"http://{server.http_url}")
    assert done.returncode != 0
    assert "batch-size must be <=" in done.stdout + done.stderr
