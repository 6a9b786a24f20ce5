"""What decoding a large JPEG at a reduced size saves, and whether it changes which faces are found."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from arcface_build.bench.host import describe_host
from arcface_clients.engines.protocol import EmbeddingEngine
from arcface_clients.errors import WrongUse
from arcface_clients.faces.detect import DetectedFace, FaceDetector
from arcface_clients.faces.photos import decode_photo

Image = npt.NDArray[np.uint8]
ACROSS, DOWN = 4, 3  # photos on a sheet
WAYS = ("reduced", "whole")


def large_photos(
    files: Sequence[Path], megapixels: float, engine: EmbeddingEngine, detector: Path | None = None
) -> dict[str, Any]:
    """Time, memory and faces of large JPEGs, decoded no larger than needed and whole.

    Args:
        files: photos, of which 12 each are pasted on a sheet that is then enlarged.
        megapixels: of a sheet.
        engine: embeds.
        detector: YuNet's ONNX.

    Raises:
        WrongUse: fewer than 12 photos.
    """
    sheets = [_sheet(files[i : i + ACROSS * DOWN], megapixels) for i in range(0, len(files), ACROSS * DOWN)]
    sheets = [sheet for sheet in sheets if sheet]
    if not sheets:
        raise WrongUse(f"{len(files)} photos: expected at least {ACROSS * DOWN}, which make one large photo")
    found, figures = {}, {}
    for way in WAYS:  # in a process of its own, whose peak of memory is that of this way
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            answers = [child.submit(_detect, sheet, way, detector).result() for sheet in sheets]
        found[way] = [faces for faces, _, _ in answers]
        figures[way] = {
            "seconds": float(np.median([seconds for _, seconds, _ in answers])),
            "peak_mb": max(peak_mb for _, _, peak_mb in answers),
            "faces": sum(map(len, found[way])),
        }
    cosines = [
        cosine
        for reduced, whole in zip(found["reduced"], found["whole"], strict=True)
        for cosine in _cosines(reduced, whole, engine)
    ]
    return {
        "host": describe_host(),
        "megapixels": megapixels,
        "photos": len(sheets),
        "ways": figures,
        "same_faces": len(cosines),
        "cosine_mean": float(np.mean(cosines)),
        "cosine_min": float(np.min(cosines)),
    }


def large_photos_text(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{result['photos']} JPEGs of {result['megapixels']:g} million pixels"]
    for way, told in result["ways"].items():
        lines.append(
            f"{way:8} {told['seconds']:.2f} s a photo, {told['peak_mb']:.0f} MB at the peak, {told['faces']} faces"
        )
    lines.append(
        f"{result['same_faces']} faces found by both: cosine {result['cosine_mean']:.4f} mean, "
        f"{result['cosine_min']:.4f} at least"
    )
    return "\n".join(lines)


def _sheet(files: Sequence[Path], megapixels: float) -> bytes:
    """A JPEG of so many pixels with 12 photos on it; empty if there are fewer."""
    if len(files) < ACROSS * DOWN:
        return b""
    side = int((megapixels * 1e6 / (ACROSS * DOWN)) ** 0.5)
    photos = [
        cv2.resize(decode_photo(file.read_bytes()), (side, side), interpolation=cv2.INTER_CUBIC) for file in files
    ]
    rows = [np.hstack(photos[i : i + ACROSS]) for i in range(0, ACROSS * DOWN, ACROSS)]
    return cv2.imencode(".jpg", np.vstack(rows), [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def _detect(sheet: bytes, way: str, detector: Path | None) -> tuple[list[DetectedFace], float, float]:
    """The faces, the seconds taken, and the peak of this process in MB."""
    finder = FaceDetector(detector)
    finder.detect(np.zeros((64, 64, 3), np.uint8))
    decode_photo(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    started = time.perf_counter()
    faces = finder.detect_encoded(sheet) if way == "reduced" else finder.detect(decode_photo(sheet))
    seconds = time.perf_counter() - started
    return faces, seconds, _peak_mb()


def _peak_mb() -> float:
    """Largest memory of this process, in MiB. Not getrusage's: that begins with the memory of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _cosines(mine: list[DetectedFace], theirs: list[DetectedFace], engine: EmbeddingEngine) -> list[float]:
    """Of each face to the face of the other way whose box overlaps it by more than half."""
    if not mine or not theirs:
        return []
    ours, others = (engine.encode(np.stack([face.face for face in faces])) for faces in (mine, theirs))
    boxes = np.array([face.box for face in theirs])
    cosines = []
    for face, embedding in zip(mine, ours, strict=True):
        corner, size = np.array(face.box[:2]), np.array(face.box[2:])
        low, high = np.maximum(corner, boxes[:, :2]), np.minimum(corner + size, boxes[:, :2] + boxes[:, 2:])
        common = np.prod(np.maximum(0, high - low), axis=1)
        overlap = common / (size.prod() + boxes[:, 2:].prod(axis=1) - common)
        if overlap.max() > 0.5:
            cosines.append(float(embedding @ others[overlap.argmax()]))
    return cosines
