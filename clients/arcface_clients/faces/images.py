"""Reads face crops from folders, files, globs, .npz and .npy; a file that cannot be read yields the reason instead."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arcface_clients.arrays import DAMAGED, Array, FaceArray
from arcface_clients.contract import FACE_SHAPE
from arcface_clients.errors import ArcFaceError, DependencyMissing, InvalidFaces, WrongUse
from arcface_clients.extras import importing
from arcface_clients.faces.check import check_faces
from arcface_clients.faces.synthetic import synthetic_faces

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".gif", ".heic", ".heif", ".avif", ".jp2"),
)
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*")
HEIF_STARTS = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis"))
ARRAY_SUFFIXES = (".npz", ".npy")


@dataclass(frozen=True)
class Found:
    """Where a detector found a face, in pixels of the photo after its EXIF orientation is applied."""

    score: float  # 0..1
    box: tuple[float, float, float, float]  # x, y, width, height
    landmarks: Array  # float32 (5,2): eye, eye, nose, mouth corners, from left to right


@dataclass(frozen=True)
class Crop:
    """One requested face: its name, and either the crop uint8 (112,112,3) BGR or the reason there is none."""

    name: str  # path, or path[index] for a row of an array file
    face: FaceArray | None
    refused: str = ""
    found: Found | None = None  # where it was found, if the file is a photo


def find_files(sources: Iterable[str | Path]) -> list[str]:
    """Files from folders (recursively), globs (including `**`) and single paths; sorted, without duplicates.

    A path that does not exist stays in the list: reading it reports the reason.
    """
    found: set[str] = set()
    for source in map(str, sources):
        if Path(source).is_dir():
            found.update(files_below(source, (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES)))
        elif glob.has_magic(source) and not Path(source).exists():
            # Path.glob does not accept absolute patterns
            found.update(p for p in glob.glob(source, recursive=True) if Path(p).is_file())  # noqa: PTH207
        else:
            found.add(source)
    return sorted(found)


def files_below(
    folder: str, suffixes: tuple[str, ...], above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[str]:
    """Files with these suffixes in a folder, recursively and sorted per folder; also images with any other suffix.

    Links are followed, except back to a folder `above` (device and inode); a broken link is listed, so that reading it
    reports the error. Uses os.scandir, because creating a Path for each of millions of files costs more.

    Raises:
        OSError: a folder cannot be read.
    """
    status = Path(folder).stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        found = sorted((entry.path, entry.is_dir(), entry.is_file()) for entry in entries)
    for path, is_folder, is_file in found:
        if is_folder:
            yield from files_below(path, suffixes, above | {here})
        elif path.lower().endswith(suffixes):
            if is_file or not Path(path).exists():  # no pipes, no sockets
                yield path
        elif is_file and _looks_like_an_image(path):
            yield path


def _looks_like_an_image(path: str) -> bool:
    """Whether a file starts like JPEG, PNG, GIF, BMP, TIFF, WebP or the HEIF family (HEIC, AVIF)."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head.startswith(IMAGE_STARTS) or (head[:4] == b"RIFF" and head[8:] == b"WEBP") or head[4:12] in HEIF_STARTS


def read_crops(files: Iterable[str]) -> Iterator[Crop]:
    """The crops of each file, one image in memory at a time; a file that cannot be read yields a refused Crop.

    Raises:
        DependencyMissing: there is an image to read, and OpenCV is not installed.
    """
    for name in files:
        try:
            if name.lower().endswith(ARRAY_SUFFIXES):
                for index, face in enumerate(read_array(name)):
                    yield Crop(f"{name}[{index}]", face)
            else:
                yield Crop(name, read_face(name))
        except DependencyMissing:
            raise
        except (ArcFaceError, OSError) as exc:
            yield Crop(name, None, _reason(exc))


def load_faces(sources: Iterable[str | Path]) -> tuple[FaceArray, list[str], list[Crop]]:
    """All crops at once: faces uint8 (N,112,112,3) BGR, their N names, and the refused crops."""
    return gather(read_crops(find_files(sources)))


def gather(crops: Iterable[Crop]) -> tuple[FaceArray, list[str], list[Crop]]:
    """Stack crops: faces uint8 (N,112,112,3), their N names, and the crops without a face."""
    faces: list[FaceArray] = []
    names: list[str] = []
    refused: list[Crop] = []
    for crop in crops:
        if crop.face is None:
            refused.append(crop)
        else:
            faces.append(crop.face)
            names.append(crop.name)
    return np.stack(faces) if faces else np.empty((0, *FACE_SHAPE), np.uint8), names, refused


def faces_or_synthetic(
    sources: Sequence[str | Path], count: int, say: Callable[[str], object] = lambda told: None
) -> tuple[Array, tuple[str, ...] | None]:
    """(faces uint8 (N,112,112,3) BGR, names) from files; without sources, `count` synthetic faces without names.

    Args:
        sources: folders, files, globs, .npz and .npy.
        count: number of synthetic faces.
        say: receives a line for each file that cannot be read.

    Raises:
        WrongUse: sources were given, but no face could be read from them.
    """
    if not sources:
        return synthetic_faces(count), None
    faces, names, refused = load_faces(sources)
    for crop in refused:
        say(f"not read: {crop.name}: {crop.refused}")
    if not len(faces):
        raise WrongUse(f"no face could be read from {' '.join(map(str, sources[:3]))}: expected aligned 112×112 crops.")
    return faces, tuple(names)


def read_face(path: str | Path) -> Array:
    """One crop uint8 (112,112,3) BGR; grey becomes BGR, transparency is dropped, EXIF orientation is applied.

    Raises:
        InvalidFaces: not an image, truncated, or not 112×112.
        OSError: the file cannot be read.
    """
    return decode_face(np.fromfile(path, np.uint8))


def decode_face(data: Array) -> Array:
    """Like `read_face`, from a file's bytes uint8 (n,).

    Raises:
        InvalidFaces: see `read_face`.
        DependencyMissing: OpenCV is not installed.
    """
    with importing("reading images"):
        import cv2
    if not data.size:
        raise InvalidFaces("the file is empty")
    encoded = data.tobytes()
    # OpenCV silently fills the missing part of a truncated JPEG with grey, so look for an end marker after scan data.
    if encoded.startswith(b"\xff\xd8") and encoded.rfind(b"\xff\xd9") < encoded.rfind(b"\xff\xda"):
        raise InvalidFaces("truncated JPEG")
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    except cv2.error as exc:  # more pixels than OpenCV's limit
        raise InvalidFaces(f"OpenCV cannot decode it: {exc.err or exc}") from exc
    if image is None:
        image = _decode_otherwise(encoded)
    if image.shape != FACE_SHAPE:
        height, width = image.shape[:2]
        raise InvalidFaces(f"expected an aligned crop of 112×112 pixels, got {width}×{height}")
    return np.asarray(image)


def _decode_otherwise(encoded: bytes) -> Array:
    """Decode what OpenCV cannot (GIF, HEIC, AVIF, CMYK) with Pillow."""
    from arcface_clients.faces.photos import decode_photo

    if not encoded.startswith(b"GIF8") and encoded[4:12] not in HEIF_STARTS:
        raise InvalidFaces("not an image that OpenCV can decode, or truncated")
    return decode_photo(encoded)


def read_array(path: str | Path) -> Array:
    """Faces uint8 (N,112,112,3) from a .npy, or from a .npz: its array `faces`, or else its only 4-D array.

    Raises:
        InvalidFaces: not such a file, or the array does not fit the tensor contract.
        OSError: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return check_faces(loaded)
            names = ["faces"] if "faces" in loaded.files else [n for n in loaded.files if loaded[n].ndim == 4]
            if len(names) != 1:
                raise InvalidFaces(f"expected an array `faces` in it, found: {', '.join(loaded.files) or 'nothing'}")
            return check_faces(loaded[names[0]])
    except InvalidFaces:
        raise
    except DAMAGED as exc:
        raise InvalidFaces(f"not a NumPy file, or truncated ({exc})") from exc


def _reason(exc: Exception) -> str:
    told = exc.strerror or str(exc) if isinstance(exc, OSError) else str(exc)
    return told.removesuffix(".")  # it becomes a part of a sentence
