"""Fills requests with the faces of a stream, and cuts the answers to the shape of what came in. No I/O."""

from __future__ import annotations

from collections import deque

import numpy as np

from arcface_clients.arrays import FloatArray
from arcface_clients.contract import FACE_SHAPE
from arcface_clients.faces.check import Faces, FacesLike, check_in_place
from arcface_clients.faces.gpu_arrays import GpuFaces


class Stream:
    """What is between a source of faces and its embeddings.

    Args:
        size: faces in a full request.
        embedding_dim: D.
    """

    def __init__(self, size: int, embedding_dim: int) -> None:
        """Nothing has come in yet."""
        self._size = size
        self._waiting: list[Faces] = []  # faces for the request that is being filled
        self._room = size
        # what went in and has not come out: how many faces a batch has, None for a lone face
        self._items: deque[int | None] = deque()
        self._rows = np.empty((0, embedding_dim), np.float32)

    def take(self, item: FacesLike) -> list[list[Faces]]:
        """The requests that one face (112,112,3) or a batch (n,112,112,3) completes; to be packed before the next take.

        An item on a GPU completes what waits and makes requests of its own: to wait, it would have to be copied.

        Raises:
            InvalidFaces: what `check_in_place` refuses.
        """
        lone = getattr(item, "shape", None) == FACE_SHAPE
        faces = check_in_place(item)
        self._items.append(None if lone else len(faces))
        if isinstance(faces, GpuFaces):
            there: list[list[Faces]] = [[faces[i : i + self._size]] for i in range(0, len(faces), self._size)]
            return [*self.rest(), *there]
        full: list[list[Faces]] = []
        while len(faces) >= self._room:
            full.append([*self._waiting, faces[: self._room]])
            faces = faces[self._room :]
            self._waiting, self._room = [], self._size
        if len(faces):
            self._waiting.append(faces.copy())  # the source may reuse its memory for the next item
            self._room -= len(faces)
        return full

    def rest(self) -> list[list[Faces]]:
        """The last request, which is not full; none when nothing waits."""
        rest, self._waiting, self._room = self._waiting, [], self._size
        return [rest] if rest else []

    def give(self, rows: FloatArray) -> list[FloatArray]:
        """The items that these rows complete, in order: (D,) for a face, (n,D) for a batch."""
        self._rows = np.concatenate([self._rows, rows]) if len(self._rows) else rows
        return self.finished()

    def finished(self) -> list[FloatArray]:
        """The items at the head for which all rows are there: batches of no faces need none."""
        done: list[FloatArray] = []
        start = 0
        while self._items and start + self._needs(self._items[0]) <= len(self._rows):
            count = self._items.popleft()
            done.append(self._rows[start] if count is None else self._rows[start : start + count])
            start += 1 if count is None else count
        self._rows = self._rows[start:]
        return done

    @staticmethod
    def _needs(item: int | None) -> int:
        return 1 if item is None else item
