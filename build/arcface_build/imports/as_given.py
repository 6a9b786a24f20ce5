"""Proves a repaired copy against the original file, if ONNX Runtime can run that unrepaired."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from arcface_build.errors import ProofFailed
from arcface_build.imports.flavour import Flavour
from arcface_clients.arrays import Array
from arcface_clients.contract import Preprocessing
from arcface_clients.engines.runtimes import open_session
from arcface_clients.evidence.drift import cosine_per_face

MIN_COSINE = {"float16": 0.999}  # a float16 file rounds between layers, its float32 copy does not
FACES = 8
DTYPES = {"float16": np.float16, "float64": np.float64, "uint8": np.uint8}


def check_as_given(path: Path, flavour: Flavour, fed: Preprocessing, faces: Array, expected: Array) -> float | None:
    """Min cosine of the given file to `expected` on the first faces, one by one; None if it does not run as it is.

    Args:
        path: the file as the user gave it.
        flavour: its input and output.
        fed: the preprocessing its input expects.
        faces: uint8 (N,112,112,3) BGR.
        expected: embeddings (N,D) of the repaired copy.

    Raises:
        ProofFailed: the repaired copy computes something else.
    """
    rows = []
    try:
        session = open_session(path)
        for face in faces[:FACES]:
            blob = fed.apply(face[None]).astype(DTYPES.get(flavour.input_type, np.float32))
            blob = blob.transpose(0, 2, 3, 1) if flavour.layout == "NHWC" else blob
            batch = flavour.batch if isinstance(flavour.batch, int) else 1
            got = session.run([flavour.output], {flavour.input: np.repeat(blob, batch, axis=0)})[0]
            rows.append(np.asarray(got, np.float64).reshape(-1)[: expected.shape[1]])
    except Exception:  # ONNX Runtime's exceptions share no base class; this is why it needed repair
        return None
    cosine = float(cosine_per_face(expected[: len(rows)], np.stack(rows)).min())
    limit = MIN_COSINE.get("float16" if flavour.float16 else "", 0.99999)
    if not cosine >= limit:
        raise ProofFailed(
            f"the repaired copy differs from the original file: expected cosine ≥ {limit}, got {cosine:.7f}. "
            "Nothing was written; please report which exporter made the file."
        )
    return cosine
