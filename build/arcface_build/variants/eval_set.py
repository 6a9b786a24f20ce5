"""Loads faces for calibration or judging, from a folder, an .npz or `synthetic`, with identities and a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arcface_clients.contract import FACE_SHAPE
from arcface_clients.errors import InvalidFaces, Missing, WrongUse
from arcface_clients.faces.images import read_array
from arcface_clients.faces.synthetic import synthetic_people

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
VIEWS = 4  # synthetic views per person


@dataclass(frozen=True)
class FaceSet:
    """Faces uint8 (N,112,112,3) BGR; a name for each; the person shown, or None if unknown."""

    origin: str
    faces: np.ndarray
    names: Sequence[str]
    identities: np.ndarray | None

    @property
    def sha256(self) -> str:
        """Digest of the pixels, in order."""
        return hashlib.sha256(np.ascontiguousarray(self.faces).tobytes()).hexdigest()

    def sample(self, count: int, seed: int = 0) -> FaceSet:
        """`count` faces sampled without replacement, in order; all if there are fewer."""
        if count >= len(self.faces):
            return self
        index = np.sort(np.random.default_rng(seed).choice(len(self.faces), count, replace=False))
        identities = None if self.identities is None else self.identities[index]
        return FaceSet(self.origin, self.faces[index], [self.names[i] for i in index], identities)

    def to_json(self) -> dict[str, Any]:
        """What a sidecar records: origin, count, digest."""
        return {"origin": self.origin, "faces": len(self.faces), "sha256": self.sha256}


def load_faces(source: str, count: int, seed: int = 0) -> FaceSet:
    """Faces from a folder, an .npz, or synthetic ones.

    Args:
        source: a folder of 112×112 crops (one subfolder per person, if identities are known); an .npz with `faces` and
            optionally `identities`; or "synthetic".
        count: maximum number; from files a seeded sample.
        seed: of the sample.

    Raises:
        Missing: no faces there.
        WrongUse: crops of another size, or another kind of file.
    """
    if source == "synthetic":
        people = -(-count // VIEWS)
        faces = synthetic_people(people, VIEWS, seed=7_000 + seed).reshape(-1, *FACE_SHAPE)[:count]
        who = np.repeat(np.arange(people), VIEWS)[:count]
        return FaceSet(source, faces, [f"synthetic {seed}:{i}" for i in range(len(faces))], who)
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        found = _from_npz(path)
    elif path.is_dir():
        found = _from_folder(path)
    else:
        raise Missing(f"no faces at {source}: expected a folder of 112×112 crops, an .npz, or the word synthetic.")
    return found.sample(count, seed)


def _from_npz(path: Path) -> FaceSet:
    expected = "expected an .npz with `faces` (N,112,112,3) uint8 BGR, and optionally `identities` (N,)"
    try:
        faces = read_array(path)
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            identities = None if isinstance(loaded, np.ndarray) else loaded.get("identities")
    except (InvalidFaces, ValueError) as exc:
        raise WrongUse(f"{path}: {exc}; {expected}.") from exc
    if identities is not None and identities.shape != (len(faces),):
        raise WrongUse(f"{path} has {len(faces)} faces and identities {identities.shape}: {expected}.")
    return FaceSet(path.name, faces, [f"{path.name}[{i}]" for i in range(len(faces))], identities)


def _from_folder(folder: Path) -> FaceSet:
    try:
        import cv2
    except ImportError as exc:
        raise Missing(
            f"cannot read pictures: {exc}. Next: pip install opencv-python-headless, or give an .npz"
        ) from exc
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise Missing(f"no pictures ({', '.join(sorted(SUFFIXES))}) in {folder}.")
    faces = []
    for path in paths:
        face = cv2.imread(str(path))
        if face is None or face.shape != FACE_SHAPE:
            got = "not a picture" if face is None else f"{face.shape[1]}×{face.shape[0]}"
            raise WrongUse(f"{path} is {got}: expected aligned crops of 112×112. arcface embed --detect aligns photos")
        faces.append(face)
    names = [str(p.relative_to(folder)) for p in paths]
    people = [p.parent.name for p in paths] if all(p.parent != folder for p in paths) else None
    return FaceSet(folder.name, np.stack(faces), names, None if people is None else np.array(people))
