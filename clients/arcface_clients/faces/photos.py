"""Image files in, upright BGR pixels out; what is damaged or too large is refused before it costs memory."""

from __future__ import annotations

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

    Pillow reads it because it knows the size before it decodes, and says when a file is cut off (OpenCV fills the rest
    with grey).

    Raises:
        InvalidFaces: not an image, damaged, cut off, or of more than `max_pixels`.
        OSError: the file cannot be read.
        DependencyMissing: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as exc:
        raise DependencyMissing(f"reading photos needs Pillow ({exc}): pip install pillow") from exc
    with Path(path).open("rb") as file:
        try:
            with Image.open(file) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise InvalidFaces(f"{width}×{height} pixels; expected up to {max_pixels:,}. Shrink it first")
                rgb = np.asarray(ImageOps.exif_transpose(_eight_bits(image)).convert("RGB"))
        except InvalidFaces:
            raise
        except UnidentifiedImageError as exc:
            raise InvalidFaces("not an image, or of a kind that Pillow does not know") from exc
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
            raise InvalidFaces(f"too large: {exc}") from exc
        except (
            Exception
        ) as exc:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error … on bad bytes
            raise InvalidFaces(f"damaged or cut off ({exc})") from exc
    return np.ascontiguousarray(rgb[..., ::-1])


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey images keep their high byte; Pillow's own conversion would clip them to white."""
    if not image.mode.startswith("I"):
        return image
    from PIL import Image

    turned = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    turned.info = image.info
    return turned
