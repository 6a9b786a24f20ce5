"""Test your own code without a server: FakeEmbedder is deterministic, checks faces, and fails on cue.

pytest examples/test_with_fake_embedder.py
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from arcface_clients import FakeEmbedder
from arcface_clients.errors import InvalidFaces, ServerUnreachable
from arcface_clients.faces.synthetic import synthetic_faces


def same_person(embedder: FakeEmbedder, one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> bool | None:
    """Your code: whether two crops show one person, None where the service is away."""
    try:
        a, b = embedder.encode(np.stack([one, other]))
    except ServerUnreachable:
        return None
    return bool(1 - a @ b < 0.4)


def test_the_same_crop_is_the_same_person() -> None:
    """Equal pixels give equal embeddings, different pixels nearly orthogonal ones."""
    ann, bob = synthetic_faces(2)
    embedder = FakeEmbedder()
    assert same_person(embedder, ann, ann) is True
    assert same_person(embedder, ann, bob) is False
    assert embedder.calls == [2, 2]


def test_a_lost_server_is_no_answer() -> None:
    """`fails` says what the next calls do: raise, or answer (None)."""
    ann, bob = synthetic_faces(2)
    embedder = FakeEmbedder(fails=[ServerUnreachable("gone"), None])
    assert same_person(embedder, ann, bob) is None
    assert same_person(embedder, ann, bob) is False


def test_a_crop_of_another_size_is_refused() -> None:
    """As by the real client, before anything is sent."""
    with pytest.raises(InvalidFaces):
        FakeEmbedder().encode(np.zeros((1, 160, 160, 3), np.uint8))
