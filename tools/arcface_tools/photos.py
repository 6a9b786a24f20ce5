"""What detection is worth: stability of embeddings by how a face is looked at, accuracy from photos, recall by size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from math import inf
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from arcface_build.bench.host import describe_host
from arcface_build.reports.page import page, paragraph, section, table
from arcface_build.reports.plots import Axis, Series, lines
from arcface_clients.engines.protocol import EmbeddingEngine
from arcface_clients.errors import InvalidFaces
from arcface_clients.evidence.accuracy import measure_accuracy, pairs_from_csv
from arcface_clients.faces.detect import FaceDetector, find_detector
from arcface_clients.faces.photos import read_photo
from arcface_clients.faces.steps.align import align_face
from arcface_clients.faces.steps.detect import LOOK_SIDE, find_faces
from arcface_clients.faces.steps.yunet import LOOKS, open_yunet
from arcface_clients.photos.embedder import PhotoEmbedder

Image = npt.NDArray[Any]
SETTINGS = [(1, LOOK_SIDE), *((looks, side) for looks in (2, 3) for side in (96, 128, 160, 224, 320))]
REPEATS = 3
SIZES = (16, 24, 32, 48, 64, 96)


def _scaled(by: float) -> Callable[[Image], Image]:
    how = cv2.INTER_AREA if by < 1 else cv2.INTER_CUBIC
    return lambda image: np.asarray(cv2.resize(image, None, fx=by, fy=by, interpolation=how))


def _recompressed(image: Image) -> Image:
    return np.asarray(cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], cv2.IMREAD_COLOR))


COPIES: dict[str, Callable[[Image], Image]] = {
    "shifted by 3, 5": lambda image: image[5:, 3:],
    "shifted by 17, 11": lambda image: image[11:, 17:],
    "at 0.5": _scaled(0.5),
    "at 0.8": _scaled(0.8),
    "at 1.5": _scaled(1.5),
    "at 3": _scaled(3),
    "mirrored": lambda image: image[:, ::-1],
    "JPEG quality 40": _recompressed,
}


def stability(
    files: Sequence[str], engine: EmbeddingEngine, detector: Path | None = None, say: Callable[[str], object] = print
) -> dict[str, Any]:
    """Cosine of a face's embedding to that of the same face in a changed copy of the photo, by how it was looked at.

    Time is CPU time on one thread, the least of a few repetitions, which other processes hardly change.

    Args:
        files: photos; the most central face of each is taken.
        engine: embeds.
        detector: YuNet's ONNX; None: where `find_detector` finds it.
        say: told a line for each setting.
    """
    images = [read_photo(name) for name in files]
    cv2.setNumThreads(1)
    rows = []
    for looks, side in SETTINGS:
        look = open_yunet(str(find_detector(detector)))
        find_faces(look, images[0], looks=looks, look_side=side)  # the networks of these sizes are made
        found, spent_s = [], 0.0
        for image in images:
            least_s = inf
            for _ in range(REPEATS):
                started_s = time.process_time()
                rows_of_image = find_faces(look, image, looks=looks, look_side=side)
                least_s = min(least_s, time.process_time() - started_s)
            found.append(rows_of_image)
            spent_s += least_s
        cpu_ms = 1000 * spent_s / max(1, sum(map(len, found)))
        base = engine.encode(np.stack([_central(each, image) for each, image in zip(found, images, strict=True)]))
        cosines = {}
        for name, copy in COPIES.items():
            crops = []
            for image in images:
                changed = np.ascontiguousarray(copy(image))
                crop = _central(find_faces(look, changed, looks=looks, look_side=side), changed)
                crops.append(crop[:, ::-1] if name == "mirrored" else crop)
            cosines[name] = np.einsum("nd,nd->n", base, engine.encode(np.stack(crops)))
        every = np.concatenate(list(cosines.values()))
        row = {
            "looks": looks,
            "side": side,
            "cpu_ms_per_face": cpu_ms,
            "cosine_mean": float(every.mean()),
            "cosine_p5": float(np.percentile(every, 5)),
            "by_copy": {name: float(values.mean()) for name, values in cosines.items()},
            "default": looks == LOOKS and side == LOOK_SIDE,
        }
        rows.append(row)
        say(_told(row))
    return {"host": describe_host(), "photos": len(files), "settings": rows}


def _told(row: dict[str, Any]) -> str:
    return (
        f"{row['looks']} looks, {row['side']:3} pixels: {row['cpu_ms_per_face']:6.2f} ms CPU a face, cosine "
        f"{row['cosine_mean']:.4f} mean, {row['cosine_p5']:.4f} at the 5th percentile{' (default)' * row['default']}"
    )


def stability_page(result: dict[str, Any]) -> str:
    """The curve as one HTML page."""
    rows = result["settings"]
    series = []
    for looks in sorted({row["looks"] for row in rows}):
        mine = sorted((row for row in rows if row["looks"] == looks), key=lambda row: row["cpu_ms_per_face"])
        name = f"{looks} look{'s' * (looks > 1)}"
        series.append(Series(name, [r["cpu_ms_per_face"] for r in mine], [r["cosine_mean"] for r in mine]))
    slowest = max(row["cpu_ms_per_face"] for row in rows)
    low = min(row["cosine_mean"] for row in rows)
    plot = lines(
        "Stability against time",
        series,
        Axis("ms CPU a face, one thread", 0, 1.1 * slowest),
        Axis("mean cosine to the face in a changed copy", low - 0.01, 1),
        marks=True,
    )
    head = ("looks", "pixels", "ms CPU a face", "mean cosine", "5th percentile", *COPIES)
    body = [
        (
            row["looks"],
            row["side"],
            f"{row['cpu_ms_per_face']:.2f}",
            f"{row['cosine_mean']:.4f}",
            f"{row['cosine_p5']:.4f}",
            *(f"{value:.4f}" for value in row["by_copy"].values()),
        )
        for row in rows
    ]
    what = "1 look: as found in the photo. 2: again at the face by itself, at so many pixels. 3: and mirrored."
    default = next(row for row in rows if row["default"])
    chosen = f"Default: {_told(default).removesuffix(' (default)')}."
    return page(
        "How often to look at a face",
        f"{result['photos']} photos",
        section("The curve", plot, paragraph(what), paragraph(chosen)),
        section("All figures", table(head, body)),
    )


def from_photos(
    folder: Path, pairs: Path, photos: PhotoEmbedder, engine: EmbeddingEngine, detector: Path | None = None
) -> dict[str, Any]:
    """Accuracy on pairs from photos alone, by the server and by our own detector and `engine`; recall by face size.

    Args:
        folder: the photos that `pairs` names, below it.
        pairs: CSV with a, b, same.
        photos: the server.
        engine: embeds what our own detector finds; the same weights.
        detector: YuNet's ONNX.
    """
    served_detector = photos.pin_detector()
    names = sorted({name for line in pairs.read_text().splitlines()[1:] for name in line.split(",")[:2]})
    finder, differing, lowest, faces = FaceDetector(detector), [], 1.0, 0
    rows: dict[str, list[Image]] = {"server": [], "client": []}
    for name, answer in zip(names, photos.faces_stream(folder / name for name in names), strict=True):
        found = finder.detect_encoded((folder / name).read_bytes())
        served = [] if isinstance(answer, InvalidFaces) else answer
        if len(found) != len(served) or not found:
            differing.append(name)
        height, width = read_photo(folder / name).shape[:2]
        mine = engine.encode(np.stack([face.face for face in found])) if found else np.zeros((1, engine.embedding_dim))
        for ours, theirs in zip(mine, served, strict=False):
            lowest, faces = min(lowest, float(ours @ theirs.embedding)), faces + 1
        rows["client"].append(mine[_nearest([face.box for face in found], width, height)])
        at = _nearest([face.box for face in served], width, height)
        rows["server"].append(served[at].embedding if served else np.zeros(engine.embedding_dim))
    accuracy = {
        way: measure_accuracy(np.stack(each).astype(np.float32), pairs_from_csv(pairs, names)).to_json()
        for way, each in rows.items()
    }
    return {
        "host": describe_host(),
        "contract_id": engine.contract_id,
        "detectors": {"server": served_detector, "client": finder.detector_id},
        "photos": len(names),
        "faces": faces,
        "lowest_cosine": lowest,
        "photos_with_other_faces_or_none": {"count": len(differing), "names": differing},
        "accuracy": accuracy,
        "recall": recall([folder / name for name in names[:100]], photos),
    }


def recall(files: Iterable[Path], photos: PhotoEmbedder) -> dict[str, dict[str, float]]:
    """Faces that are found again when the photo is shrunk until they are so many pixels high, by that size.

    Returns:
        By size: how many `faces` were that large or larger, and the `share` of them that was found.
    """
    sizes: dict[int, list[bool]] = {size: [] for size in SIZES}
    for file in files:
        image = read_photo(file)
        whole = photos.faces(image)
        if not whole:
            continue
        face = whole[_nearest([each.box for each in whole], image.shape[1], image.shape[0])]
        for size, hits in sizes.items():
            by = size / face.box[3]
            if by >= 1:
                continue
            small = np.asarray(cv2.resize(image, None, fx=by, fy=by, interpolation=cv2.INTER_AREA))
            centre = by * (np.array(face.box[:2]) + np.array(face.box[2:]) / 2)
            found = [np.array(each.box[:2]) + np.array(each.box[2:]) / 2 for each in photos.faces(small)]
            hits.append(any(np.abs(each - centre).max() < size / 2 for each in found))
    return {str(size): {"faces": len(hits), "share": float(np.mean(hits))} for size, hits in sizes.items() if hits}


def _nearest(boxes: Sequence[Sequence[float]], width: int, height: int) -> int:
    """Which box is nearest to the middle of the photo; 0 where there is none."""
    centres = [np.hypot(x + w / 2 - width / 2, y + h / 2 - height / 2) for x, y, w, h in boxes]
    return int(np.argmin(centres)) if centres else 0


def _central(rows: Image, image: Image) -> Image:
    """The most central face, aligned; black where there is none."""
    if not len(rows):
        return np.zeros((112, 112, 3), np.uint8)
    at = _nearest(rows[:, :4].tolist(), image.shape[1], image.shape[0])
    return align_face(image, rows[at, 4:14].reshape(5, 2))
