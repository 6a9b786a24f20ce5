"""Faces to prove on: a folder or .npz of aligned crops in, uint8 (N,112,112,3) BGR out; drawn ones by default."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from arcface_build.imports.proof import MIN_FACES
from arcface_clients.errors import WrongUse
from arcface_clients.faces.images import load_faces
from arcface_clients.faces.synthetic import synthetic_faces


def drawn_faces() -> tuple[np.ndarray, str]:
    """(faces, where they come from): drawn ones, the same for everybody."""
    return synthetic_faces(MIN_FACES), "drawn"


def read_faces(path: Path) -> tuple[np.ndarray, str]:
    """(faces, where they come from) of a folder of pictures (searched to its bottom) or of an .npz with `faces`.

    Raises:
        WrongUse: not crops of 112×112, or fewer than the proof needs.
        DependencyMissing: OpenCV is not installed.
    """
    faces, _, refused = load_faces([path])
    if refused:
        raise WrongUse(
            f"{refused[0].name} is no crop: {refused[0].refused}. Expected aligned 112×112 crops, or an .npz with "
            "`faces` (N,112,112,3) uint8 BGR. Align first, or leave --faces away"
        )
    if len(faces) < MIN_FACES:
        raise WrongUse(f"{path} holds {len(faces)} faces: expected at least {MIN_FACES} for a proof.")
    return faces, path.name
