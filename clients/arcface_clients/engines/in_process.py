"""The base class of in-process engines: loads once, checks faces, splits batches, and rejects overflowed results."""

from __future__ import annotations

import threading
from abc import abstractmethod

import numpy as np

from arcface_clients.arrays import FaceArray, FloatArray
from arcface_clients.closing import Closing
from arcface_clients.errors import ConfigError, InferenceFailed
from arcface_clients.faces.check import FacesLike, check_faces


class LocalEngine(Closing):
    """An engine in this process: subclasses load in `_load`, embed a chunk in `_run`, release in `_unload`.

    Attributes:
        max_batch: largest number of faces passed to one `_run`.
        taken: what is actually in use once loaded (provider, file, precision, threads); for logs and diagnostics.
    """

    name = "local"

    def __init__(self, max_batch: int) -> None:
        """Store the batch limit; nothing is loaded."""
        if max_batch < 1:
            raise ConfigError(f"max_batch is {max_batch}: expected at least 1.")
        self.max_batch = max_batch
        self.taken: dict[str, object] = {}
        self._ready = False
        self._dim: int | None = None
        self._load_lock = threading.Lock()

    @property
    def embedding_dim(self) -> int:
        """Width D; loads the model."""
        self.ensure_ready()
        if self._dim is None:  # the file does not state its width
            self._dim = self._run(np.zeros((1, 112, 112, 3), np.uint8)).shape[1]
        return self._dim

    @property
    @abstractmethod
    def contract_id(self) -> str | None:
        """Says which embeddings these may be compared with; None if unknown. Loads no weights."""

    def ensure_ready(self) -> None:
        """Load the model; free if it is already loaded."""
        with self._load_lock:
            if not self._ready:
                self._load()
                self._ready = True

    def encode(self, faces: FacesLike) -> FloatArray:
        """Embeddings of faces: uint8 (N,112,112,3) BGR → float32 (N,D) of unit rows, see `EmbeddingEngine`."""
        checked = check_faces(faces)
        self.ensure_ready()
        if not len(checked):
            return np.empty((0, self.embedding_dim), np.float32)
        chunks = [self._run(checked[i : i + self.max_batch]) for i in range(0, len(checked), self.max_batch)]
        embeddings = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
        self._dim = embeddings.shape[1]
        bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        if bad.size:
            raise InferenceFailed(
                f"{self.name}: {bad.size} of {len(embeddings)} embeddings contain NaN or infinity, "
                f"first for face {bad[0]}: the model overflows in this precision. "
                "Compare it with the reference: arcface parity"
            )
        return embeddings

    def close(self) -> None:
        """Release the model; the next `encode` loads it again."""
        with self._load_lock:
            if self._ready:
                self._unload()
                self._ready = False

    @abstractmethod
    def _load(self) -> None:
        """Load; set `taken` and, if the file states it, `_dim`."""

    @abstractmethod
    def _run(self, faces: FaceArray) -> FloatArray:
        """Embed 1..max_batch checked faces: float32 (n,D) of unit rows."""

    @abstractmethod
    def _unload(self) -> None:
        """Drop what `_load` created."""
