"""Decodes photos to upright BGR pixels; damaged and oversized files are refused before they use memory."""

from __future__ import annotations

import os
import stat
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
MAX_FILE_BYTES = 8 * MAX_PIXELS  # four channels of 16 bits, not compressed


def read_photo(path: Path | str, max_pixels: int = MAX_PIXELS) -> Array:
    """An image uint8 (H,W,3) BGR, with EXIF orientation applied; grey, palette, CMYK and alpha are converted to BGR.

    Of an animation, the first frame. Uses Pillow because it knows the size before decoding, and reports a truncated
    file (OpenCV fills the rest with grey).

    Raises:
        InvalidFaces: not an image, damaged, truncated, more than `max_pixels`, or HEIC without pillow-heif.
        OSError: the file cannot be read.
        DependencyMissing: Pillow or OpenCV is not installed.
    """
    return decode_photo(photo_bytes(path), max_pixels)


def photo_bytes(path: Path | str) -> bytes:
    """A photo's file, which is a regular one: a pipe may never end or never begin.

    Raises:
        InvalidFaces: a pipe or device, more than `MAX_FILE_BYTES`, or no name that a file can have.
        OSError: it cannot be read.
    """
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - Path.open takes no opener
    except ValueError as exc:  # NUL, half of a surrogate pair
        raise InvalidFaces(f"{str(path)!r} cannot be a file's name ({exc})") from exc
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InvalidFaces("a pipe or device; expected a file. Its content may be sent as bytes")
        if status.st_size > MAX_FILE_BYTES:
            raise InvalidFaces(f"{status.st_size:,} bytes; expected a photo of at most {MAX_FILE_BYTES:,}")
        return file.read()


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe that nobody writes to as well."""
    return os.open(path, flags | os.O_NONBLOCK)


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
