"""Fixtures: test data that may be absent, faces, and one real tritonserver for the whole session."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

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
