"""Replace InsightFace in a pipeline: what runs behind the one new line is chosen in config/embedding.yaml.

python examples/replace_insightface.py crops/

Before:  embeddings = normalize(recognizer.get_feat(list_of_crops))      # InsightFace, in every worker
After:   embeddings = backend.encode(crops)                              # a server, ONNX Runtime, or InsightFace
"""

from __future__ import annotations

import sys

from arcface_clients import get_embedding_backend
from arcface_clients.faces.images import load_faces


def main(folder: str) -> None:
    """Embed a folder and say which engine did it."""
    faces, names, _ = load_faces([folder])  # uint8 (N,112,112,3) BGR
    with get_embedding_backend() as backend:  # or get_embedding_backend("onnx", device="cpu")
        embeddings = backend.encode(faces)  # float32 (N,D), unit rows
        print(f"{len(names)} faces, {embeddings.shape[1]} numbers each, by {backend.last_engine}: {backend.reason}")


if __name__ == "__main__":
    main(*sys.argv[1:])
