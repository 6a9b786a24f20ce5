"""Decodes photos to upright BGR pixels; damaged and oversized files are refused before they use memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from arcface_clients.arrays import Array
from arcface_clients.errors import InvalidFaces
from arcface_clients.extras import importing

if TYPE_CHECKING:
    from arcface_clients.faces.steps.decode import Photo

MAX_PIXELS = 80_000_000


def read_photo(path: Path | str, max_pixels: int = MAX_PIXELS) -> Array:
    """An image uint8 (H,W,3) BGR, with EXIF orientation applied; grey, palette, CMYK and alpha are converted to BGR.

    Of an animation, the first frame. Uses Pillow because it knows the size before decoding, and reports a truncated
    file (OpenCV fills the rest with grey).

    Raises:
        InvalidFaces: not an image, damaged, truncated, more than `max_pixels`, or HEIC without pillow-heif.
        OSError: the file cannot be read.
        DependencyMissing: Pillow or OpenCV is not installed.
    """
    return decode_photo(Path(path).read_bytes(), max_pixels)


def decode_photo(data: bytes, max_pixels: int = MAX_PIXELS) -> Array:
    """Like `read_photo`, from a file's bytes.

    Raises:
        InvalidFaces, DependencyMissing: see `read_photo`.
    """
    with opened_photo(data, max_pixels) as photo:
        return photo.pixels()


@contextmanager
def opened_photo(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Photo]:
    """A photo to be decoded within the block, at a reduced size if need be.

    Raises:
        InvalidFaces, DependencyMissing: see `read_photo`; also from what is done within the block.
    """
    with importing("reading photos"):
        from arcface_clients.faces.steps.decode import BadPhoto, Photo
    try:
        yield Photo(data, max_pixels)
    except BadPhoto as exc:
        raise InvalidFaces(str(exc)) from exc
