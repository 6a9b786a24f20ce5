"""Faces for a load: crops from files, else synthetic ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt

from arcface_clients.faces.images import faces_or_synthetic


def faces_for_load(sources: Sequence[str], batch: int, refused: Callable[[str], None]) -> npt.NDArray[Any]:
    """Crops uint8 (N,112,112,3) BGR from `sources` (folders, files, .npz); without any, at least one synthetic batch.

    Args:
        sources: what the user named.
        batch: the largest batch.
        refused: called with each crop that could not be read, and why.

    Raises:
        WrongUse: not one could be read.
    """
    return faces_or_synthetic(sources, max(64, batch), refused)[0][: max(256, batch)]
