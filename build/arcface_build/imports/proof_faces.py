"""Faces to prove on: a folder or .npz of aligned crops in, uint8 (N,112,112,3) BGR out; drawn ones by default."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from arcface_build.imports.proof import MIN_FACES
from arcface_clients.contract import FACE_SHAPE
from arcface_clients.errors import InvalidFaces, Missing, WrongUse
from arcface_clients.faces.images import read_array
from arcface_clients.faces.synthetic import synthetic_faces

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def drawn_faces() -> tuple[np.ndarray, str]:
    """(faces, where they come from): drawn ones, the same for everybody."""
    return synthetic_faces(MIN_FACES), "drawn"


def read_faces(path: Path) -> tuple[np.ndarray, str]:
    """(faces, where they come from) of a folder of pictures (searched to its bottom) or of an .npz with `faces`.

    Raises:
        WrongUse: not crops of 112×112, or fewer than the proof needs.
        Missing: OpenCV is not installed.
    """
    if path.is_dir():
        faces = _read_folder(path)
    else:
        try:
            faces = read_array(path)
        except (OSError, InvalidFaces) as exc:
            raise WrongUse(
                f"{path} is no .npz of crops: expected an array `faces` (N,112,112,3) uint8 BGR ({exc})."
            ) from exc
    if len(faces) < MIN_FACES:
        raise WrongUse(f"{path} holds {len(faces)} faces: expected at least {MIN_FACES} for a proof.")
    return faces, path.name


def _read_folder(path: Path) -> np.ndarray:
    try:
        import cv2
    except ImportError as exc:
        raise Missing(f"OpenCV cannot be imported to read {path}: {exc}. pip install 'arcface-triton[images]'") from exc
    faces = []
    for picture in sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES):
        face = cv2.imread(str(picture))
        if face is None or face.shape != FACE_SHAPE:
            got = "no picture" if face is None else "×".join(map(str, face.shape))
            raise WrongUse(f"{picture} is {got}: expected an aligned 112×112 crop. Align first, or leave --faces away.")
        faces.append(face)
    return np.stack(faces) if faces else np.empty((0, *FACE_SHAPE), np.uint8)
