"""The faces for the proof: a folder or .npz of aligned crops, or synthetic ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from arcface_build.imports.proof import MIN_FACES
from arcface_clients.arrays import Array
from arcface_clients.errors import WrongUse
from arcface_clients.faces.images import load_faces
from arcface_clients.faces.synthetic import synthetic_faces


@dataclass(frozen=True)
class ProofFaces:
    """Aligned crops uint8 (N,112,112,3) BGR, their origin, and the person each shows, if known."""

    faces: Array
    origin: str
    people: tuple[str, ...] | None = None


def synthetic_proof_faces() -> ProofFaces:
    """Synthetic faces, always the same."""
    return ProofFaces(synthetic_faces(MIN_FACES), "synthetic")


def read_faces(path: Path) -> ProofFaces:
    """Read a folder of images (recursively; a subfolder is a person) or an .npz with `faces`.

    Raises:
        WrongUse: not crops of 112×112, or fewer than the proof needs.
        DependencyMissing: OpenCV is not installed.
    """
    faces, names, refused = load_faces([path])
    if refused:
        raise WrongUse(
            f"{refused[0].name} is not a crop: {refused[0].refused}. Expected aligned 112×112 crops, or an .npz with "
            "`faces` (N,112,112,3) uint8 BGR. Align first, or omit --faces"
        )
    if len(faces) < MIN_FACES:
        raise WrongUse(f"{path} contains {len(faces)} faces: expected at least {MIN_FACES} for a proof.")
    folders = [Path(name).parent for name in names]
    known = path.is_dir() and any(folder != path for folder in folders)
    return ProofFaces(faces, path.name, tuple(map(str, folders)) if known else None)
