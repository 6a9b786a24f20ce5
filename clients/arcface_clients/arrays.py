"""Names for the arrays that travel between rooms; shape and range stand in each docstring."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
"""Any array: the dtype is checked where it arrives."""
FaceArray = npt.NDArray[np.uint8]
"""Faces uint8 (N,112,112,3) BGR."""
FloatArray = npt.NDArray[np.float32]
"""Embeddings float32 (N,D), or distances."""
