"""Chooses the faces that two sides are compared on, and the labelled pairs among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from arcface_build.compare.comparison import Faces, names_of
from arcface_build.compare.sides import Side
from arcface_clients.errors import WrongUse
from arcface_clients.evidence.accuracy import Pairs, identities_from_paths, pairs_from_csv, pairs_from_identities
from arcface_clients.faces.images import faces_or_synthetic


def faces_of(sources: Sequence[str], sides: Sequence[Side], refused: Callable[[str], None]) -> Faces:
    """The given crops; else the files named by saved embeddings, if they still exist; else synthetic faces."""
    names = names_of(sides)
    wanted = sources or (names if names and all(Path(name).is_file() for name in names) else ())
    saved = next((side.saved for side in sides if side.saved is not None), None)
    if saved is not None and not wanted:
        return Faces(None, names or tuple(f"row {i}" for i in range(len(saved))))
    return Faces(*faces_or_synthetic(wanted, 64, refused))


def pairs_of(path: Path | None, identities: bool, faces: Faces) -> Pairs | None:
    """Labelled pairs from a CSV, or from folders as people, or None."""
    if path is None and not identities:
        return None
    if not faces.names:
        raise WrongUse("accuracy needs named faces: add --faces FOLDER, with one subfolder per person.")
    if path is not None:
        return pairs_from_csv(path, faces.names)
    return pairs_from_identities(identities_from_paths(faces.names))
