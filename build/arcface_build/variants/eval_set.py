"""Loads faces for calibration or judging, from a folder, an .npz or `synthetic`, with identities and a digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arcface_clients.arrays import DAMAGED
from arcface_clients.contract import FACE_SHAPE
from arcface_clients.errors import Missing, WrongUse
from arcface_clients.faces.images import ARRAY_SUFFIXES, load_faces
from arcface_clients.faces.synthetic import synthetic_people

VIEWS = 4  # of a synthetic person
_EXPECTED = (
    "expected aligned crops of 112×112, or an .npz with `faces` (N,112,112,3) uint8 BGR, and perhaps `identities` (N,)"
)


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

    @property
    def each(self) -> list[str]:
        """The first 64 bits (hex) of the digest of each face's pixels: a face is known whatever its file is called."""
        return [hashlib.sha256(np.ascontiguousarray(face).tobytes()).hexdigest()[:16] for face in self.faces]

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


def evaluation_faces(source: str, count: int, seed: int = 0) -> FaceSet:
    """Faces from a folder or an .npz, or synthetic ones.

    Args:
        source: a folder of 112×112 crops (one subfolder per person, if identities are known); an .npz with `faces` and
            optionally `identities`; or "synthetic".
        count: maximum number; from files a seeded sample.
        seed: of the sample.

    Raises:
        Missing: nothing there.
        WrongUse: a file that is no crop, or identities that do not fit.
    """
    if source == "synthetic":
        people = -(-count // VIEWS)
        faces = synthetic_people(people, VIEWS, seed=7_000 + seed).reshape(-1, *FACE_SHAPE)[:count]
        who = np.repeat(np.arange(people), VIEWS)[:count]
        return FaceSet(source, faces, [f"synthetic {seed}:{i}" for i in range(len(faces))], who)
    path = Path(source)
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() in ARRAY_SUFFIXES):
        raise Missing(f"no faces at {source}: expected a folder of 112×112 crops, an .npz, or the word synthetic.")
    faces, paths, refused = load_faces([path])
    if refused:
        raise WrongUse(f"{refused[0].name}: {refused[0].refused}; {_EXPECTED}. arcface embed --detect aligns photos")
    if not len(faces):
        raise Missing(f"no pictures in {source}: {_EXPECTED}.")
    names = [os.path.relpath(name, path.parent if path.is_file() else path) for name in paths]
    identities = _saved_identities(path, len(faces)) if path.is_file() else _folders(names)
    return FaceSet(path.name, faces, names, identities).sample(count, seed)


def _folders(names: Sequence[str]) -> np.ndarray | None:
    """The folder that holds each face is who it shows, where every one has a folder."""
    folders = [Path(name).parent.name for name in names]
    return np.array(folders) if all(folders) else None


def _saved_identities(path: Path, count: int) -> np.ndarray | None:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            identities = None if isinstance(loaded, np.ndarray) else loaded.get("identities")
    except DAMAGED as exc:
        raise WrongUse(f"{path}: {exc}; {_EXPECTED}.") from exc
    if identities is not None and identities.shape != (count,):
        raise WrongUse(f"{path} holds {count} faces and identities {identities.shape}: {_EXPECTED}.")
    return identities
