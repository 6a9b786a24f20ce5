"""Faces for a load: crops from files, else synthetic ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt

from arcface_clients.errors import WrongUse
from arcface_clients.faces.synthetic import synthetic_faces


def faces_for_load(sources: Sequence[str], batch: int, refused: Callable[[str], None]) -> npt.NDArray[Any]:
    """Crops uint8 (N,112,112,3) BGR from `sources` (folders, files, .npz); without any, at least one synthetic batch.

    Args:
        sources: what the user named.
        batch: the largest batch.
        refused: called with each crop that could not be read, and why.

    Raises:
        WrongUse: not one could be read.
    """
    if not sources:
        return synthetic_faces(max(64, batch))
    from arcface_clients.faces.images import load_faces

    faces, _, unread = load_faces(sources)
    for crop in unread:
        refused(f"not read: {crop.name}: {crop.refused}")
    if not len(faces):
        raise WrongUse(f"no face could be read from {' '.join(sources)}: expected aligned 112×112 crops.")
    return faces[: max(256, batch)]
