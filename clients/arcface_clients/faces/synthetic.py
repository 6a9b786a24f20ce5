"""Seeded synthetic faces, nobody's likeness, for proofs, warm-up and demos without real crops."""

from __future__ import annotations

import numpy as np

from arcface_clients.arrays import Array, FaceArray
from arcface_clients.contract import FACE_SIZE


def synthetic_faces(count: int, seed: int = 0) -> FaceArray:
    """`count` different faces: uint8 (count,112,112,3) BGR, eyes and mouth placed as in the ArcFace template."""
    return np.stack([_draw(np.random.default_rng([seed, i])) for i in range(count)]) if count else _none()


def synthetic_people(people: int, per_person: int, seed: int = 0) -> FaceArray:
    """`per_person` noisy views of each of `people` faces: uint8 (people,per_person,112,112,3) BGR.

    Views differ in brightness, contrast, a shift of up to two pixels and sensor noise.
    """
    base = synthetic_faces(people, seed)
    views = np.empty((people, per_person, *base.shape[1:]), np.uint8)
    for p in range(people):
        for v in range(per_person):
            rng = np.random.default_rng([seed, p, v, 1])
            shifted = np.roll(base[p], rng.integers(-2, 3, size=2), axis=(0, 1)).astype(np.float32)
            noisy = (
                (shifted - 128) * rng.uniform(0.85, 1.15) + 128 + rng.uniform(-15, 15) + rng.normal(0, 4, shifted.shape)
            )
            views[p, v] = noisy.clip(0, 255)
    return views


def _none() -> FaceArray:
    return np.empty((0, FACE_SIZE, FACE_SIZE, 3), np.uint8)


def _draw(rng: np.random.Generator) -> FaceArray:
    """Draw one face: background, head, hair, eyes, nose, mouth, then texture and light; all proportions random."""
    y, x = np.mgrid[0:FACE_SIZE, 0:FACE_SIZE].astype(np.float32)
    image = _texture(rng, amplitude=35) + rng.uniform(40, 200, 3)

    def blend(mask: Array, color: Array) -> None:
        image[:] = image * (1 - mask[..., None]) + mask[..., None] * color

    def ellipse(cx: float, cy: float, rx: float, ry: float, soft: float = 0.15) -> Array:
        inside: Array = np.clip((1 - np.hypot((x - cx) / rx, (y - cy) / ry)) / soft + 0.5, 0, 1)
        return inside

    skin = np.array([90, 120, 170]) * rng.uniform(0.5, 1.35) + rng.normal(0, 12, 3)
    hair = rng.uniform(10, 110) * np.array([0.8, 0.9, 1.0]) + rng.normal(0, 8, 3)
    width, height = rng.uniform(38, 52), rng.uniform(52, 66)
    blend(ellipse(56, 44 + rng.uniform(-4, 4), width * 1.15, height * 1.1), hair)
    blend(ellipse(56, 64 + rng.uniform(-3, 5), width, height), skin)
    # Centres of the ArcFace 112 template (InsightFace, face_align.arcface_dst), with the scatter of a real alignment.
    for cx, cy in ((38.3, 51.7), (73.5, 51.5)):
        cx, cy = cx + rng.normal(0, 1), cy + rng.normal(0, 1)
        blend(ellipse(cx, cy - rng.uniform(8, 12), rng.uniform(8, 13), rng.uniform(1.5, 3.5)), hair)
        blend(ellipse(cx, cy, rng.uniform(6, 9), rng.uniform(2.5, 5)), np.full(3, rng.uniform(190, 245)))
        blend(ellipse(cx, cy, rng.uniform(2, 3.5), rng.uniform(2, 4)), rng.uniform(10, 110, 3))
    blend(ellipse(56, 66, rng.uniform(4, 8), rng.uniform(8, 14), 0.8) * 0.5, skin * rng.uniform(0.7, 1.2))
    blend(ellipse(56, 92.3, rng.uniform(10, 18), rng.uniform(2.5, 7)), np.array([80, 70, 160]) * rng.uniform(0.6, 1.3))
    light = 1 + rng.uniform(-0.35, 0.35) * (x - 56) / 56 + rng.uniform(-0.25, 0.25) * (y - 56) / 56
    image = image * light[..., None] + _texture(rng, amplitude=14) + rng.normal(0, 3, image.shape)
    face: FaceArray = image.clip(0, 255).astype(np.uint8)
    return face


def _texture(rng: np.random.Generator, amplitude: float) -> Array:
    """A smooth random colour field (112,112,3): coarse noise, linearly interpolated."""
    coarse = rng.normal(0, 1, (9, 9, 3))
    grid = np.linspace(0, 8, FACE_SIZE)
    low = np.minimum(grid.astype(int), 7)
    part = (grid - low)[:, None]
    rows = coarse[low] * (1 - part[..., None]) + coarse[low + 1] * part[..., None]
    field = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    colours: Array = field * amplitude
    return colours
