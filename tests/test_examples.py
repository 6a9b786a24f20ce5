"""Every example runs as its first lines say, in a process of its own, against the session's real server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from arcface_build.serving.process import TritonProcess
from arcface_clients.faces.synthetic import synthetic_faces
from conftest import REPO
from deadlines import HANG_S

EXAMPLES = REPO / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """run(example, *arguments, **environment): its standard output; fails with its errors where it does."""

    def run(example: str, *arguments: str | Path, program: tuple[str, ...] = (), **environment: str) -> str:
        line = [sys.executable, *program, str(EXAMPLES / example), *map(str, arguments)]
        done = subprocess.run(
            line, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=HANG_S
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout + done.stderr

    return run


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    """people/person-N/view-M.png: three synthetic people, four views of each that a random network finds alike too."""
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for number, face in enumerate(synthetic_faces(3)):
        views = (face.astype(np.int16) + rng.integers(-2, 3, (4, *face.shape))).clip(0, 255).astype(np.uint8)
        folder = tmp_path / "people" / f"person-{number}"
        folder.mkdir(parents=True)
        for view, face in enumerate(views):
            cv2.imwrite(str(folder / f"view-{view}.png"), face)
    return tmp_path / "people"


def test_every_example_is_listed_once_is_short_and_is_run() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".mjs", ".java")}
    listed = re.findall(r"^\| \[([\w.]+)\]\(\1\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(files)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_example*.py"))
    for name in files:
        assert len((EXAMPLES / name).read_text().splitlines()) < (90 if name.endswith(".java") else 60), name
        run = f"def test_{name.removeprefix('test_').replace('.', '_').removesuffix('_py').lower()}_"
        assert run in tests, f"no test is named after {name}"


def test_search_folder_names_who_is_in_a_photo(server: TritonProcess, crops: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "unknown").mkdir()
    (crops / "person-1" / "view-3.png").rename(tmp_path / "unknown" / "who.png")
    said = run("search_folder.py", crops, tmp_path / "unknown", server.grpc_url)
    assert re.search(r"who\.png: person-1, distance 0\.\d+", said)
    assert (crops / "gallery.npz").is_file()


def test_replace_insightface_runs_on_the_server_or_on_what_is_configured(
    server: TritonProcess, demo_repository: Path, crops: Path, run: Run
) -> None:
    settings = {
        "ARCFACE_TRITON__URL": server.grpc_url,
        "ARCFACE_LOCAL__MODELS_DIR": str(demo_repository.parent / "models"),
    }
    assert "12 faces, 512 numbers each, by triton" in run("replace_insightface.py", crops, **settings)
    assert "by onnx" in run("replace_insightface.py", crops, **settings, ARCFACE_BACKEND="onnx")


def test_asyncio_client_answers_all_jobs(server: TritonProcess, run: Run) -> None:
    assert "20 jobs, 60 embeddings" in run("asyncio_client.py", server.grpc_url)


def test_stream_gives_every_face_back(server: TritonProcess, run: Run) -> None:
    assert run("stream.py", server.grpc_url, "150").startswith("150 faces")


def test_consensus_of_folder_finds_the_stranger(server: TritonProcess, crops: Path, run: Run) -> None:
    import cv2

    cv2.imwrite(str(crops / "person-0" / "stranger.png"), np.full((112, 112, 3), 255, np.uint8))
    said = run("consensus_of_folder.py", crops / "person-0", server.grpc_url)
    assert "4 of 5 different faces agree" in said
    assert re.search(r"does not belong: .*stranger\.png", said)


def test_fallback_with_logging_answers_without_a_server(demo_repository: Path, crops: Path, run: Run) -> None:
    said = run("fallback_with_logging.py", crops, demo_repository.parent / "models", "127.0.0.1:1")
    assert "12 embeddings by here" in said
    assert "WARNING arcface_clients.engines.fallback" in said


def test_custom_engine_answers_by_its_name(run: Run) -> None:
    assert "(3, 256) by thumbnail" in run("custom_engine.py")


def test_compare_saved_lines_the_faces_up_by_path(tmp_path: Path, run: Run) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    paths = np.array([f"{i}.png" for i in range(5)])
    np.savez(tmp_path / "before.npz", paths=paths, embeddings=rows, contract_id=np.array("c1"))
    np.savez(tmp_path / "after.npz", paths=paths[::-1], embeddings=rows[::-1], contract_id=np.array("c1"))
    said = run("compare_saved.py", "before.npz", "after.npz")
    assert said.startswith("5 faces: mean cosine 1.000000")


def test_compare_saved_refuses_two_models(tmp_path: Path) -> None:
    for name in ("before", "after"):
        np.savez(tmp_path / f"{name}.npz", paths=["a"], embeddings=np.ones((1, 4)), contract_id=np.array(name))
    line = [sys.executable, str(EXAMPLES / "compare_saved.py"), "before.npz", "after.npz"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 1
    assert "ContractMismatch: these embeddings are of before, those to compare them with of after" in done.stderr


def test_with_fake_embedder_passes(run: Run) -> None:
    assert "3 passed" in run("test_with_fake_embedder.py", "-q", "-p", "no:cacheprovider", program=("-m", "pytest"))
