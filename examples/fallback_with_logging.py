"""Keep embedding while the server is away, and log it: a chain of two engines of your choice.

python examples/fallback_with_logging.py crops/ models/ [localhost:8001]
"""

from __future__ import annotations

import logging
import sys

from arcface_clients import EngineRegistry, FallbackEmbedder
from arcface_clients.faces.images import load_faces


def main(folder: str, models_dir: str, url: str = "localhost:8001") -> None:
    """The server first; ONNX Runtime in this process while it does not answer."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    faces, _, _ = load_faces([folder])
    chain = [
        ("server", lambda: EngineRegistry.get("triton", url=url, retry_for_s=0)),  # made when it is first asked
        ("here", lambda: EngineRegistry.get("onnx", models_dir=models_dir)),
    ]
    with FallbackEmbedder(chain, retry_after_s=5) as embedder:
        embeddings = embedder.encode(faces)  # a mistake in `faces` is raised, whoever is there
        print(f"{len(embeddings)} embeddings by {embedder.last_engine}: {embedder.reason}")


if __name__ == "__main__":
    main(*sys.argv[1:])
