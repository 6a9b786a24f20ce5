"""Decodes a photo's bytes to upright BGR pixels, at a reduced size where that is enough.

A bad file is refused before it uses memory: the size is read from the header, and only formats of photos are tried.
"""

from __future__ import annotations

import base64
import binascii
import io
from functools import cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 80_000_000  # 240 MB of BGR; below Pillow's decompression-bomb warning
REDUCTIONS = (8, 4, 2)  # what libjpeg can leave out while it decodes
# Others that Pillow knows run programs (EPS) or are no photos.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "HEIF", "AVIF")
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = (0, 1)
_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6", b"\0\0\0\x0cjP")


class BadPhoto(ValueError):
    """The bytes are not a photo that can be decoded; the message says why."""


class Photo:
    """An encoded photo whose size is known; its pixels are decoded when they are asked for.

    Attributes:
        width, height: in pixels, after the EXIF orientation is applied.
    """

    def __init__(self, encoded: bytes, max_pixels: int = MAX_PIXELS) -> None:
        """Read the header.

        Raises:
            BadPhoto: not an image, more than `max_pixels`, or HEIC without pillow-heif.
        """
        self._encoded = encoded
        image = self._open()
        width, height = image.size
        if width * height > max_pixels:
            raise BadPhoto(f"{width}×{height} pixels; expected at most {max_pixels:,}. Shrink it first")
        orientation = _orientation(image)
        self._upright = orientation in _UPRIGHT
        self.width, self.height = (height, width) if orientation >= 5 else (width, height)
        jpeg = image.format in ("JPEG", "MPO")
        # A side that the reduction does not divide is rounded up, at its end: an orientation would turn that end.
        self._reductions = tuple(
            by
            for by in REDUCTIONS
            if jpeg and (self._upright or not (width % by or height % by)) and min(width, height) >= by
        )
        # Its first pixels are read from here on. Not so a PNG, which is decoded when it is asked for its orientation.
        self._opened: Image.Image | None = image if jpeg else None

    def reduction(self, side: int) -> int:
        """The largest usable reduction that leaves the longer side at least `side` pixels; 1 if there is none."""
        return next((by for by in self._reductions if max(self.width, self.height) >= side * by), 1)

    def finer(self, reduction: int, scale: float) -> int:
        """The largest usable reduction of at most `reduction` that keeps at least `scale` pixels a pixel; else 1."""
        return next((by for by in self._reductions if by <= reduction and 1 / by >= scale), 1)

    def pixels(self, reduction: int = 1) -> npt.NDArray[np.uint8]:
        """The photo uint8 (H,W,3) BGR, upright; grey, palette, CMYK and alpha are converted, of 16 bits the high 8.

        Of an animation, the first frame. `reduction` is one of those that `reduction` and `finer` return: pixel i then
        covers `reduction` pixels of the photo, from `reduction`·i on.

        Raises:
            BadPhoto: damaged or truncated.
        """
        image, self._opened = self._opened or self._open(), None
        with image:
            try:
                if reduction > 1:
                    width, height = image.size
                    image.draft(None, (width // reduction, height // reduction))
                image.load()
                upright = _eight_bits(image)
                if not self._upright:
                    upright = ImageOps.exif_transpose(upright)
                rgb = np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
            except Exception as exc:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error …
                raise BadPhoto(f"damaged or truncated ({exc})") from exc
        return np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), np.uint8)

    def _open(self) -> Image.Image:
        _know_heif()
        try:
            return Image.open(io.BytesIO(self._encoded), formats=_formats())
        except UnidentifiedImageError as exc:
            if self._encoded[4:8] == b"ftyp":
                raise BadPhoto("HEIC or AVIF, whose decoder is not installed: pip install pillow-heif") from exc
            raise BadPhoto("not an image, or of a format that is not read") from exc
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
            raise BadPhoto(f"too large: {exc}") from exc
        except Exception as exc:
            raise BadPhoto(f"damaged or truncated ({exc})") from exc


def from_base64(data: bytes) -> bytes:
    """The file in `data`, which is the file itself, its base64, or a data URI of it; anything else unchanged.

    No file of a format that is read consists of base64's letters only.
    """
    if data.startswith(_STARTS) or data[4:8] == b"ftyp":
        return data
    text = data.partition(b",")[2] if data.startswith(b"data:") else data
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error:
        return data


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def _know_heif() -> None:
    """Let Pillow read HEIC (and AVIF, if it cannot by itself) with pillow-heif, if that is installed."""
    try:
        import pillow_heif
    except ImportError:
        return
    pillow_heif.register_heif_opener()


def _orientation(image: Image.Image) -> int:
    """1 to 8; that of HEIC is applied by its decoder, which then says 1."""
    try:
        told: Any = image.getexif().get(_ORIENTATION, 1)
        return told if isinstance(told, int) and 1 <= told <= 8 else 1
    except Exception:  # a damaged EXIF block is no reason to refuse a photo
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Reduce 16-bit grey images to their high byte; Pillow's own conversion would clip them to white."""
    if not image.mode.startswith("I"):
        return image
    turned = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    turned.info = image.info
    return turned
