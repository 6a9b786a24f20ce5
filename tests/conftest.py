"""Fixtures: test data that may be absent, faces, and one real tritonserver for the whole session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arcface_build.errors import Missing
from arcface_build.serving.binary import TritonBinary, find_tritonserver
from arcface_build.serving.process import TritonProcess, free_ports

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with real weights and faces; skips the test, visibly, where it is absent."""
    folder = Path(os.environ.get("ARCFACE_TEST_ASSETS", REPO.parent / "shared" / "assets"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no test assets in {folder} (set ARCFACE_TEST_ASSETS)")
    return folder


@pytest.fixture(scope="session")
def lfw_faces(assets: Path) -> np.ndarray:
    """The 400 aligned LFW crops, in the order of faces/index.csv: uint8 (400,112,112,3) BGR."""
    import cv2

    rows = (assets / "faces" / "index.csv").read_text().splitlines()[1:]
    return np.stack([cv2.imread(str(assets / "faces" / "aligned112" / row.split(",")[0])) for row in rows])


@pytest.fixture(scope="session")
def triton_binary() -> TritonBinary:
    """The tritonserver of this host; skips the test, visibly, where there is none."""
    try:
        return find_tritonserver(REPO)
    except Missing as exc:
        pytest.skip(str(exc))


@pytest.fixture
def start_triton(triton_binary: TritonBinary, tmp_path: Path) -> Iterator[Callable[..., TritonProcess]]:
    """start_triton(repository, models, **options): a tritonserver of the test's own, ready, stopped at the end."""
    started: list[TritonProcess] = []

    def start(repository: Path | str, models: Sequence[str], **options: Any) -> TritonProcess:
        log_path = tmp_path / f"tritonserver-{len(started)}.log"
        options.setdefault("ports", free_ports())
        started.append(TritonProcess(triton_binary, repository, models, log_path=log_path, **options))
        started[-1].start().wait_ready()
        return started[-1]

    yield start
    for server in started:
        server.stop()
