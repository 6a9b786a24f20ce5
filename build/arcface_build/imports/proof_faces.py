"""Faces to prove on: a folder or .npz of aligned crops, or drawn ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arcface_build.imports.proof import MIN_FACES
from arcface_clients.arrays import Array
from arcface_clients.contract import FACE_SHAPE
from arcface_clients.errors import InvalidFaces, Missing, WrongUse
from arcface_clients.faces.images import read_array
from arcface_clients.faces.synthetic import synthetic_faces


@dataclass(frozen=True)
class ProofFaces:
    """Aligned crops uint8 (N,112,112,3) BGR, where they come from, and who each is where that is known."""

    faces: Array
    origin: str
    people: tuple[str, ...] | None = None


PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def drawn_faces() -> ProofFaces:
    """Drawn ones, the same for everybody."""
    return ProofFaces(synthetic_faces(MIN_FACES), "drawn")


def read_faces(path: Path) -> ProofFaces:
    """A folder of pictures (searched to its bottom; a sub-folder is a person) or an .npz with `faces`.

    Raises:
        WrongUse: not crops of 112×112, or fewer than the proof needs.
        Missing: OpenCV is not installed.
    """
    people = None
    if path.is_dir():
        pictures = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES)
        faces = _read_pictures(path, pictures)
        if any(picture.parent != path for picture in pictures):
            people = tuple(str(picture.parent.relative_to(path)) for picture in pictures)
    else:
        try:
            faces = read_array(path)
        except (OSError, InvalidFaces) as exc:
            raise WrongUse(
                f"{path} is no .npz of crops: expected an array `faces` (N,112,112,3) uint8 BGR ({exc})."
            ) from exc
    if len(faces) < MIN_FACES:
        raise WrongUse(f"{path} holds {len(faces)} faces: expected at least {MIN_FACES} for a proof.")
    return ProofFaces(faces, path.name, people)


def _read_pictures(path: Path, pictures: list[Path]) -> Array:
    try:
        import cv2
    except ImportError as exc:
        raise Missing(f"OpenCV cannot be imported to read {path}: {exc}. pip install 'arcface-triton[images]'") from exc
    faces = []
    for picture in pictures:
        face = cv2.imread(str(picture))
        if face is None or face.shape != FACE_SHAPE:
            got = "no picture" if face is None else "×".join(map(str, face.shape))
            raise WrongUse(f"{picture} is {got}: expected an aligned 112×112 crop. Align first, or leave --faces away.")
        faces.append(face)
    return np.stack(faces) if faces else np.empty((0, *FACE_SHAPE), np.uint8)
