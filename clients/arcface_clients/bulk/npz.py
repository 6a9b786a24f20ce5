"""Files of crops or photos embedded into one .npz; for what fits into memory, bulk jobs write Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.atomic import new_file
from arcface_clients.faces.images import Crop, Found, read_crops

if TYPE_CHECKING:
    from arcface_clients.faces.detect import FaceDetector


class StreamEmbedder(Protocol):
    """What embeds: a `TritonEmbedder`, or its fake."""

    def encode_stream(self, items: Iterator[Array]) -> Iterator[Array]:
        """One embedding (D,) for each face, in order."""


@dataclass(frozen=True)
class Written:
    """What went into the file, and the crops that could not be read, each with its reason."""

    faces: int
    embedding_dim: int
    refused: tuple[Crop, ...]


def embed_to_npz(
    files: Sequence[str],
    embedder: StreamEmbedder,
    output: Path,
    *,
    contract_id: str | None,
    model: str,
    detector: FaceDetector | None = None,
    on_file: Callable[[], None] = lambda: None,
) -> Written:
    """Embed every face of `files` into `output`: `paths`, `embeddings` float32 (N,D), `contract_id`, `model`; with a
    detector also `scores`, `boxes`, `landmarks` and `detector_id`.

    Files are read while the server works. Without one face nothing is written.

    Args:
        files: images, .npz or .npy of crops; with a detector: photos.
        embedder: connected.
        output: appears whole or not at all.
        contract_id: of the served model.
        model: its name.
        detector: finds and aligns the faces of photos.
        on_file: called after each file.
    """
    names: list[str] = []
    refused: list[Crop] = []
    found: list[Found] = []

    def told() -> Iterator[str]:
        for name in files:
            yield name
            on_file()

    def readable() -> Iterator[Array]:
        for crop in _crops(told(), detector):
            if crop.face is None:
                refused.append(crop)
            else:
                names.append(crop.name)
                if crop.found is not None:
                    found.append(crop.found)
                yield crop.face

    rows = list(embedder.encode_stream(readable()))
    detector_id, places = (detector.detector_id, found) if detector else (None, None)
    write_npz(output, names, rows, contract_id=contract_id, model=model, found=places, detector_id=detector_id)
    return Written(len(rows), len(rows[0]) if rows else 0, tuple(refused))


def write_npz(
    output: Path,
    names: Sequence[str],
    rows: Sequence[Array],
    *,
    contract_id: str | None,
    model: str,
    found: Sequence[Found] | None,
    detector_id: str | None = None,
) -> None:
    """Write the embeddings `rows` and what they are of; nothing if there are none. `found`: None for crops."""
    if not rows:
        return
    columns: dict[str, Any] = {"paths": np.array(names), "embeddings": np.stack(rows)}
    columns |= {"contract_id": np.array(contract_id or ""), "model": np.array(model)}
    columns |= {} if found is None else _places(found) | {"detector_id": np.array(detector_id or "")}
    with new_file(output) as temporary, temporary.open("wb") as file:
        np.savez(file, **columns)


def _places(found: Sequence[Found]) -> dict[str, Array]:
    """Scores (N,), boxes (N,4) and landmarks (N,5,2), float32, in pixels of the upright photo."""
    return {
        "scores": np.array([each.score for each in found], np.float32),
        "boxes": np.array([each.box for each in found], np.float32),
        "landmarks": np.array([each.landmarks for each in found], np.float32),
    }


def _crops(files: Iterator[str], detector: FaceDetector | None) -> Iterator[Crop]:
    if detector is None:
        return read_crops(files)
    from arcface_clients.faces.detect import detect_crops

    return detect_crops(files, detector)
