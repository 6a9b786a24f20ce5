"""For the tests of people: an engine that needs no model, and faces of a few made-up people."""

from __future__ import annotations

import threading

import numpy as np

from arcface_clients.faces.check import check_faces

CONTRACT = "c" * 64


class PixelEngine:
    """Embeds by a seeded projection of the coarse picture: alike faces are near, others are not. Counts its work."""

    name = "pixels"

    def __init__(self, dim: int = 64, contract_id: str | None = CONTRACT) -> None:
        self.embedding_dim = dim
        self.contract_id = contract_id
        self.faces_seen = 0
        self.calls: list[int] = []
        self._lock = threading.Lock()
        self._projection = np.random.default_rng(0).normal(size=(28 * 28 * 3, dim)).astype(np.float32)

    def ensure_ready(self) -> None:
        pass

    def encode(self, faces: np.ndarray) -> np.ndarray:
        faces = check_faces(faces)
        with self._lock:
            self.faces_seen += len(faces)
            self.calls.append(len(faces))
        coarse = faces.reshape(len(faces), 28, 4, 28, 4, 3).mean(axis=(2, 4), dtype=np.float32)
        coarse = coarse.reshape(len(faces), 28 * 28 * 3)
        coarse -= coarse.mean(axis=1, keepdims=True)
        rows = coarse @ self._projection
        return rows / np.linalg.norm(rows, axis=1, keepdims=True) if len(rows) else rows

    def close(self) -> None:
        pass

    def __enter__(self) -> PixelEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
