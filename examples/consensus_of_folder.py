"""Find the photos in a person's folder that show somebody else.

python examples/consensus_of_folder.py people/Ann [localhost:8001]

For many people, with a journal that survives Ctrl-C: arcface consensus people/ -o consensus.json
"""

from __future__ import annotations

import sys

from arcface_clients import TritonEmbedder
from arcface_clients.faces.images import load_faces
from arcface_clients.people.consensus import find_consensus


def main(folder: str, url: str = "localhost:8001") -> None:
    """Print what the faces agree on and which of them do not belong."""
    faces, names, _ = load_faces([folder])
    with TritonEmbedder(url) as embedder:
        found = find_consensus(embedder.encode(faces))
    print(found.reason)
    for outlier in found.outliers:
        print(f"does not belong: {names[outlier.index]}, distance {outlier.distance:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
