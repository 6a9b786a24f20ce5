"""Ways in which faces are fed wrongly to a network, each with the words that tell it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.contract import FACE_SIZE, Preprocessing

Zoom = tuple[float, float]
"""Across, down."""


TURNS = (
    (0, True, "crop mirrored", "The crops are mirrored."),
    (1, False, "crop turned", "The crops are turned by a quarter to the left."),
    (2, False, "crop turned", "The crops are upside down."),
    (3, False, "crop turned", "The crops are turned by a quarter to the right."),
    (
        1,
        True,
        "crop turned",
        "The crops are mirrored, then turned by a quarter to the left (rows and columns swapped).",
    ),
    (2, True, "crop turned", "The crops are flipped top to bottom."),
    (3, True, "crop turned", "The crops are mirrored, then turned by a quarter to the right."),
)


@dataclass(frozen=True)
class Hypothesis:
    """A fault, the words for it, and how faces uint8 (N,112,112,3) BGR become the network's input with it."""

    fault: str
    words: str
    prepare: Callable[[Array], Array]
    at: tuple[float, float, float] = (1.0, 0.0, 0.0)  # zoom, px right, px down


def exact_faults(stated: Preprocessing) -> Iterator[Hypothesis]:
    """Wrong channel order, wrong numbers, both, colours lost, and crops mirrored or turned: what can be reproduced."""
    other = "bgr" if stated.color == "rgb" else "rgb"
    swapped = f"The channels are swapped: the network expects {stated.color.upper()} and gets {other.upper()}."
    mean, std = np.array(stated.mean), np.array(stated.std)
    numbers: list[tuple[str, str, Array, Array]] = [
        (
            "wrong scale",
            f"Pixels are divided by {std[0] * 128 / 127.5:g} instead of {std[0]:g} (/128 for /127.5).",
            mean,
            std * 128 / 127.5,
        ),
        ("missing normalisation", "The normalisation is missing: the network gets 0..255.", 0 * mean, 0 * std + 1),
        ("missing normalisation", "Pixels are only divided by 255: the network gets 0..1.", 0 * mean, 0 * std + 255),
        ("missing normalisation", "The mean is not subtracted, only the division is done.", 0 * mean, std),
        ("normalised twice", "The normalisation is applied twice.", mean + std * mean, std * std),
        ("wrong numbers", "Mean and std are given in the other channel order.", mean[::-1], std[::-1]),
        ("wrong numbers", "Mean 127.5 and std 127.5 (InsightFace's) are used.", 0 * mean + 127.5, 0 * std + 127.5),
        ("wrong numbers", "Mean 127.5 and std 128 are used.", 0 * mean + 127.5, 0 * std + 128),
        (
            "wrong numbers",
            "ImageNet's mean and std are used.",
            255 * np.array([0.485, 0.456, 0.406]),
            255 * np.array([0.229, 0.224, 0.225]),
        ),
    ]
    yield Hypothesis("channels swapped", swapped, replace(stated, color=other).apply)
    for fault, words, m, s in numbers:
        wrong = Preprocessing(stated.color, tuple(m), tuple(s))
        if np.allclose(m, mean) and np.allclose(s, std):
            continue
        if fault == "wrong numbers":
            words = f"{words} The network expects mean {_written(mean)}, std {_written(std)}."
        yield Hypothesis(fault, words, wrong.apply)
        yield Hypothesis(f"channels swapped, {fault}", f"{swapped} {words}", replace(wrong, color=other).apply)
    yield Hypothesis(
        "layout",
        "The pixels are reshaped to NCHW instead of transposed.",
        lambda faces: stated.apply(faces).transpose(0, 2, 3, 1).reshape(len(faces), 3, FACE_SIZE, FACE_SIZE),
    )
    yield Hypothesis("grey input", "The pictures have lost their colours.", _after(grey, stated))
    for quarters, mirrored, fault, words in TURNS:
        yield Hypothesis(fault, words, _after(partial(turned, quarters=quarters, mirrored=mirrored), stated))


def crop_faults(stated: Preprocessing) -> Iterator[Hypothesis]:
    """Crops cut by another template: shifted or zoomed."""
    for scale, dx, dy in (
        *((1.0, dx, dy) for dx in (-8, -4, 0, 4, 8) for dy in (-8, -4, 0, 4, 8) if dx or dy),
        *((scale, 0, dy) for scale in (0.8, 0.9, 1.1, 1.25) for dy in (-6, 0, 6)),
    ):
        yield moved(stated, scale, dx, dy)


def stretched_faults(stated: Preprocessing) -> Iterator[Hypothesis]:
    """A box resized to a square, whatever its sides: another zoom across than down."""
    sides = (0.55, 0.8, 1.0, 1.3)
    for across, down, dy in ((a, d, dy) for a in sides for d in sides if a != d for dy in (-8, 0)):
        yield Hypothesis(
            "square resize",
            f"The pictures look like boxes resized to a square, not like aligned crops: about {across:g} × as wide "
            f"and {down:g} × as high as the ArcFace template has it. Align by five landmarks.",
            _after(partial(warp, zoom=(across, down), dx=0, dy=dy), stated),
        )


def moved(stated: Preprocessing, scale: float, dx: float, dy: float) -> Hypothesis:
    """Crops zoomed and shifted against the template."""
    parts = [f"shifted by {dx:+g} px to the right and {dy:+g} px down"] if dx or dy else []
    parts += [f"zoomed by {scale:.3g}"] if scale != 1 else []
    return Hypothesis(
        "crop template off",
        f"The crops do not follow the ArcFace template: {' and '.join(parts)}.",
        _after(partial(warp, zoom=scale, dx=dx, dy=dy), stated),
        (scale, dx, dy),
    )


def warp(faces: Array, zoom: float | Zoom, dx: float, dy: float) -> Array:
    """Faces uint8 (N,112,112,3) zoomed about their centre and moved, in pixels; bilinear, borders repeated."""
    across, down = zoom if isinstance(zoom, tuple) else (zoom, zoom)
    centre = (FACE_SIZE - 1) / 2

    def along(values: Array, axis: int, scale: float, shift: float) -> Array:
        source = np.clip((np.arange(FACE_SIZE) - centre - shift) / scale + centre, 0, FACE_SIZE - 1)
        low = np.minimum(source.astype(int), FACE_SIZE - 2)
        part = (source - low).astype(np.float32)
        part = part.reshape(-1, *[1] * (values.ndim - axis - 1))
        return np.asarray(values.take(low, axis) * (1 - part) + values.take(low + 1, axis) * part)

    moved = along(along(faces.astype(np.float32), 1, down, dy), 2, across, dx)
    return np.asarray(np.rint(moved).astype(np.uint8))


def _after(change: Callable[[Array], Array], stated: Preprocessing) -> Callable[[Array], Array]:
    return lambda faces: stated.apply(change(faces))


def grey(faces: Array) -> Array:
    """Faces without colour: BT.601's weights, as OpenCV and Pillow take them, in all three channels."""
    luma = np.rint(faces.astype(np.float32) @ np.array([0.114, 0.587, 0.299], np.float32)).astype(np.uint8)
    return np.repeat(luma[..., None], 3, axis=-1)


def turned(faces: Array, quarters: int, mirrored: bool) -> Array:
    """Faces turned by quarters to the left, after mirroring."""
    return np.rot90(faces[:, :, ::-1] if mirrored else faces, quarters, (1, 2))


def _written(values: Array) -> str:
    rounded = [f"{v:g}" for v in np.round(values, 3)]
    return rounded[0] if len(set(rounded)) == 1 else f"({', '.join(rounded)})"
