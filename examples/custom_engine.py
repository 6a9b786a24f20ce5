"""Register an engine of your own: in this process its name then works for `backend:` and in chains.

python examples/custom_engine.py
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from arcface_clients import EmbeddingEngine, EngineRegistry, get_embedding_backend
from arcface_clients.faces.check import check_faces
from arcface_clients.faces.synthetic import synthetic_faces


@EngineRegistry.register("thumbnail")
class ThumbnailEngine:
    """A 16×16 grey thumbnail as the embedding: what a network must beat."""

    name = "thumbnail"
    embedding_dim = 256
    contract_id = "thumbnail-16"  # embeddings are compared with embeddings of this id only

    def ensure_ready(self) -> None:
        """Nothing to load."""

    def encode(self, faces: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Uint8 (N,112,112,3) BGR → float32 (N,256), unit rows."""
        grey = check_faces(faces).mean(axis=-1, dtype=np.float32)  # raises InvalidFaces, as every engine does
        rows = grey.reshape(-1, 16, 7, 16, 7).mean(axis=(2, 4)).reshape(-1, 256)
        rows -= rows.mean(axis=1, keepdims=True)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.asarray(rows / np.maximum(lengths, np.finfo(np.float32).tiny), np.float32)

    def close(self) -> None:
        """Nothing to give back."""

    def __enter__(self) -> EmbeddingEngine:
        """The engine itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""


if __name__ == "__main__":
    settings = {"validation.run_on_startup": False, "fallback.enabled": False}  # it is not meant to match the reference
    with get_embedding_backend("thumbnail", tensorrt_config=settings) as backend:
        embeddings = backend.encode(synthetic_faces(3))
        print(f"{embeddings.shape} by {backend.last_engine}")
