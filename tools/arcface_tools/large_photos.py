"""What decoding a large JPEG at a reduced size saves, and whether it changes the faces: which, and their embeddings.

Two controls say where a difference comes from: the crops of both ways at the same landmarks differ by pixels only, and
the whole photo moved by one pixel shows how far a detector's landmarks move by themselves.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from arcface_build.bench.host import describe_host
from arcface_clients.engines.protocol import EmbeddingEngine
from arcface_clients.errors import WrongUse
from arcface_clients.faces.detect import DetectedFace, FaceDetector
from arcface_clients.faces.photos import decode_photo
from arcface_clients.faces.steps.align import align_face, magnification
from arcface_clients.faces.steps.decode import Photo
from arcface_clients.faces.steps.detect import MAX_SIDE

Image = npt.NDArray[np.uint8]
ACROSS, DOWN = 4, 3  # photos on a sheet
Pair: TypeAlias = tuple[DetectedFace, DetectedFace]
WAYS = ("reduced", "whole", "moved")  # the last: whole, by one pixel to the right and down


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
    del figures["moved"]
    pairs, moved = (
        [pair for both in zip(found[way], found["whole"], strict=True) for pair in _same(*both)]
        for way in ("reduced", "moved")
    )
    cosines, by_move = _cosines(pairs, engine), _cosines(moved, engine)
    at_same = [
        crops
        for sheet, reduced, whole in zip(sheets, found["reduced"], found["whole"], strict=True)
        for crops in _at_the_same_landmarks(sheet, reduced, whole)
    ]
    worst = int(np.argmin(cosines))
    return {
        "host": describe_host(),
        "megapixels": megapixels,
        "photos": len(sheets),
        "ways": figures,
        "same_faces": len(cosines),
        **_mean_and_min(cosines),
        "at_the_same_landmarks": _mean_and_min(_cosines(at_same, engine)),
        "moved_by_one_pixel": {"same_faces": len(by_move), **_mean_and_min(by_move)},
        "worst_face": _about(*pairs[worst], moved, by_move),
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
    for control, told in (("at the same landmarks", "at_the_same_landmarks"), ("moved by 1 px", "moved_by_one_pixel")):
        lines.append(f"  {control}: {result[told]['cosine_mean']:.4f} mean, {result[told]['cosine_min']:.4f} at least")
    worst = result["worst_face"]
    lines.append(
        f"  the lowest is a face {worst['width']:.0f} px wide, of score {worst['score']:.2f}; its landmarks are off by "
        f"{100 * worst['landmarks_moved']:.0f} % of its eyes' distance; by 1 px of movement {worst['cosine_moved']:.4f}"
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
    if way == "reduced":
        faces = finder.detect_encoded(sheet)
    else:
        pixels = decode_photo(sheet)
        faces = finder.detect(np.roll(pixels, (1, 1), axis=(0, 1)) if way == "moved" else pixels)
    seconds = time.perf_counter() - started
    return faces, seconds, _peak_mb()


def _peak_mb() -> float:
    """Largest memory of this process, in MiB. Not getrusage's: that begins with the memory of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _same(mine: list[DetectedFace], theirs: list[DetectedFace]) -> list[Pair]:
    """Each face with that of the other way whose box overlaps it by more than half, if there is one."""
    if not theirs:
        return []
    boxes, pairs = np.array([face.box for face in theirs]), []
    for face in mine:
        corner, size = np.array(face.box[:2]), np.array(face.box[2:])
        low, high = np.maximum(corner, boxes[:, :2]), np.minimum(corner + size, boxes[:, :2] + boxes[:, 2:])
        common = np.prod(np.maximum(0, high - low), axis=1)
        overlap = common / (size.prod() + boxes[:, 2:].prod(axis=1) - common)
        if overlap.max() > 0.5:
            pairs.append((face, theirs[overlap.argmax()]))
    return pairs


def _at_the_same_landmarks(sheet: bytes, reduced: list[DetectedFace], whole: list[DetectedFace]) -> list[Pair]:
    """Each face of the whole photo, cut out of the reduced one by the landmarks of the whole one, with itself."""
    photo = Photo(sheet)
    closest = max((magnification(face.landmarks) for face in reduced), default=0)
    reduction = photo.finer(photo.reduction(MAX_SIDE), closest)
    pixels = photo.pixels(reduction)
    return [
        (replace(face, face=align_face(pixels, face.landmarks, 1 / reduction)), face)
        for _, face in _same(reduced, whole)
    ]


def _cosines(pairs: list[Pair], engine: EmbeddingEngine) -> list[float]:
    """Of the embeddings of both faces of each pair."""
    if not pairs:
        return []
    ours, others = (engine.encode(np.stack([pair[side].face for pair in pairs])) for side in (0, 1))
    return [float(cosine) for cosine in np.einsum("nd,nd->n", ours, others)]


def _mean_and_min(cosines: list[float]) -> dict[str, float]:
    return {"cosine_mean": float(np.mean(cosines)), "cosine_min": float(np.min(cosines))}


def _about(mine: DetectedFace, whole: DetectedFace, moved: list[Pair], by_move: list[float]) -> dict[str, float]:
    """A face of the whole photo, how far its landmarks moved, and its cosine when the photo is moved by a pixel."""
    eyes = float(np.linalg.norm(whole.landmarks[1] - whole.landmarks[0]))
    return {
        "score": whole.score,
        "width": whole.box[2],
        "eyes_apart": eyes,
        "landmarks_moved": float(np.linalg.norm(mine.landmarks - whole.landmarks, axis=1).mean()) / eyes,
        "cosine_moved": next((by_move[i] for i, (_, same) in enumerate(moved) if same is whole), float("nan")),
    }
