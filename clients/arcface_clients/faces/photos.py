"""Image files in, upright BGR pixels out; what is damaged or too large is refused before it costs memory."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.errors import DependencyMissing, InvalidFaces

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 80_000_000  # 240 MB of BGR; below the size at which Pillow warns of a decompression bomb


def read_photo(path: Path | str, max_pixels: int = MAX_PIXELS) -> Array:
    """An image uint8 (H,W,3) BGR, turned as its EXIF orientation says; grey, palette, CMYK and alpha become BGR.

    Of an animation, the first picture. Pillow reads it because it knows the size before it decodes, and says when a
    file is cut off (OpenCV fills the rest with grey).

    Raises:
        InvalidFaces: not an image, damaged, cut off, of more than `max_pixels`, or HEIC without pillow-heif.
        OSError: the file cannot be read.
        DependencyMissing: Pillow is not installed.
    """
    with Path(path).open("rb") as file:
        return decode_photo(file.read(), max_pixels)


def decode_photo(data: bytes, max_pixels: int = MAX_PIXELS) -> Array:
    """An image as `read_photo` gives it, from a file's bytes.

    Raises:
        InvalidFaces, DependencyMissing: as `read_photo`.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as exc:
        raise DependencyMissing(f"reading photos needs Pillow ({exc}): pip install pillow") from exc
    _know_heif()
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise InvalidFaces(f"{width}×{height} pixels; expected up to {max_pixels:,}. Shrink it first")
            upright = ImageOps.exif_transpose(_eight_bits(image)) or image
            rgb = np.asarray(upright.convert("RGB"))
    except InvalidFaces:
        raise
    except UnidentifiedImageError as exc:
        if data[4:8] == b"ftyp":
            raise InvalidFaces(
                "HEIC or AVIF, which needs a decoder that is not here: pip install 'arcface-triton[heif]'"
            ) from exc
        raise InvalidFaces("not an image, or of a kind that Pillow does not know") from exc
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise InvalidFaces(f"too large: {exc}") from exc
    except Exception as exc:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error … on bad bytes
        raise InvalidFaces(f"damaged or cut off ({exc})") from exc
    return np.ascontiguousarray(rgb[..., ::-1])


@cache
def _know_heif() -> None:
    """Let Pillow read HEIC (and AVIF, where it does not itself) with pillow-heif, where that is installed."""
    try:
        import pillow_heif
    except ImportError:
        return
    pillow_heif.register_heif_opener()


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey images keep their high byte; Pillow's own conversion would clip them to white."""
    if not image.mode.startswith("I"):
        return image
    from PIL import Image

    turned = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    turned.info = image.info
    return turned
