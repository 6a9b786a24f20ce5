"""Decodes photos to upright BGR pixels; damaged and oversized files are refused before they use memory."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.errors import DependencyMissing, InvalidFaces
from arcface_clients.extras import how_to_get

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 80_000_000  # 240 MB of BGR; below Pillow's decompression-bomb warning


def read_photo(path: Path | str, max_pixels: int = MAX_PIXELS) -> Array:
    """An image uint8 (H,W,3) BGR, with EXIF orientation applied; grey, palette, CMYK and alpha are converted to BGR.

    Of an animation, the first frame. Uses Pillow because it knows the size before decoding, and reports a truncated
    file (OpenCV fills the rest with grey).

    Raises:
        InvalidFaces: not an image, damaged, truncated, more than `max_pixels`, or HEIC without pillow-heif.
        OSError: the file cannot be read.
        DependencyMissing: Pillow is not installed.
    """
    with Path(path).open("rb") as file:
        return decode_photo(file.read(), max_pixels)


def decode_photo(data: bytes, max_pixels: int = MAX_PIXELS) -> Array:
    """Like `read_photo`, from a file's bytes.

    Raises:
        InvalidFaces, DependencyMissing: see `read_photo`.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as exc:
        raise DependencyMissing(f"reading photos needs Pillow ({exc}). Next: {how_to_get('PIL')}") from exc
    _know_heif()
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise InvalidFaces(f"{width}×{height} pixels; expected at most {max_pixels:,}. Shrink it first")
            upright = ImageOps.exif_transpose(_eight_bits(image)) or image
            rgb = np.asarray(upright.convert("RGB"))
    except InvalidFaces:
        raise
    except UnidentifiedImageError as exc:
        if data[4:8] == b"ftyp":
            raise InvalidFaces(f"HEIC or AVIF, whose decoder is not installed: {how_to_get('pillow_heif')}") from exc
        raise InvalidFaces("not an image, or a format that Pillow does not know") from exc
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise InvalidFaces(f"too large: {exc}") from exc
    except Exception as exc:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error … on bad bytes
        raise InvalidFaces(f"damaged or truncated ({exc})") from exc
    return np.ascontiguousarray(rgb[..., ::-1])


@cache
def _know_heif() -> None:
    """Let Pillow read HEIC (and AVIF, if it cannot by itself) with pillow-heif, if that is installed."""
    try:
        import pillow_heif
    except ImportError:
        return
    pillow_heif.register_heif_opener()


def _eight_bits(image: Image.Image) -> Image.Image:
    """Reduce 16-bit grey images to their high byte; Pillow's own conversion would clip them to white."""
    if not image.mode.startswith("I"):
        return image
    from PIL import Image

    turned = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    turned.info = image.info
    return turned
