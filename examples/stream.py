"""Embed an endless source in bounded memory: a generator of faces in, one embedding for each out, in order.

python examples/stream.py [localhost:8001] [200]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from arcface_clients import TritonEmbedder
from arcface_clients.faces.synthetic import synthetic_faces


def camera(count: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Stands for your source: one aligned crop, uint8 (112,112,3) BGR, at a time."""
    face = synthetic_faces(1)[0]
    for i in range(count):
        yield np.roll(face, i, axis=1)


def main(url: str = "localhost:8001", count: str = "200") -> None:
    """Count what comes back, and how often the face looks like the one before it."""
    done, alike = 0, 0
    before: npt.NDArray[np.float32] | None = None
    with TritonEmbedder(url) as embedder:
        for row in embedder.encode_stream(camera(int(count))):  # float32 (D,), unit length
            alike += before is not None and bool(1 - row @ before < 0.3)
            done, before = done + 1, row
    print(f"{done} faces, {alike} of them close to the face before")


if __name__ == "__main__":
    main(*sys.argv[1:])
