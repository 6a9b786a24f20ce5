"""Splits a face set in two: one part to calibrate and search on, and one held back, which alone decides.

A variant fitted to some faces passes on those faces. MobileFaceNet in int8 drifts by 0.0036 on the faces used to search
its layers, by 0.0047 on other people and by 0.0128 on blurred faces (docs/variants.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from arcface_build.variants.eval_set import FaceSet
from arcface_clients.errors import WrongUse

MIN_PEOPLE = 8  # with fewer, a part would have too few impostor pairs to judge decisions
ONE_LIGHT = 40  # grey levels; see docs/variants.md


@dataclass(frozen=True)
class Parts:
    """`searched` may be fitted to, `held_back` never; `how` describes the split in words."""

    searched: FaceSet
    held_back: FaceSet
    how: str


def part(faces: FaceSet, count: int, seed: int = 0) -> Parts:
    """Two halves of at most `count` faces in all; no person is in both if there are enough people.

    Args:
        faces: the complete set: a person's side must not depend on how many faces are then sampled.
        count: maximum number of faces in both parts together.
        seed: of the sample.

    Raises:
        WrongUse: fewer than two different faces.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(faces.faces))
    who = faces.identities
    if who is not None and len(np.unique(who)) >= MIN_PEOPLE:
        how = "by person: nobody is in both parts"
        sides = _people_in_turns(who, rng)
    elif who is not None:
        how = f"by face, half of each person's: there are fewer than {MIN_PEOPLE} people"
        order = order[np.argsort(who[order], kind="stable")]
        sides = (order[::2], order[1::2])
    else:
        how = "by face: identities are unknown"
        sides = (order[::2], order[1::2])
    searched, held_back = (take(faces, np.sort(side)) for side in sides)
    held_back = without(held_back, searched)
    return Parts(searched.sample(-(-count // 2), seed), held_back.sample(count // 2, seed), how)


def without(faces: FaceSet, others: FaceSet) -> FaceSet:
    """The faces whose pixels are not in `others`.

    Raises:
        WrongUse: none is left.
    """
    known = {face.tobytes() for face in others.faces}
    left = [i for i, face in enumerate(faces.faces) if face.tobytes() not in known]
    if not left:
        raise WrongUse(
            f"no face of {faces.origin} is left to judge on: those that a variant is fitted to do not count. "
            "Give more faces: --eval FOLDER"
        )
    return faces if len(left) == len(faces.faces) else take(faces, left)


def take(faces: FaceSet, index: Sequence[int] | np.ndarray) -> FaceSet:
    """The faces at these rows."""
    identities = None if faces.identities is None else faces.identities[index]
    return replace(faces, faces=faces.faces[index], names=[faces.names[i] for i in index], identities=identities)


def light(faces: FaceSet) -> tuple[float, float]:
    """The range of mean grey levels (0..255) that covers nine of ten faces."""
    grey = faces.faces.reshape(len(faces.faces), -1).mean(axis=1)
    return float(np.percentile(grey, 5)), float(np.percentile(grey, 95))


def likeness(name: str, fitted: FaceSet | None, judged: FaceSet) -> list[str]:
    """Warnings if the verdict says little about other faces: synthetic ones, one source, one lighting."""
    said = []
    verify = f"Judge it on others too: arcface quantize {name} --verify FACES"
    if judged.origin == "synthetic":
        said.append(f"judged on synthetic faces: its effect on real ones is unknown. {verify}")
    elif fitted is not None and fitted.origin == judged.origin:
        said.append(f"fitted to and judged on faces from one source ({judged.origin}). {verify}")
    darkest, brightest = light(judged)
    if brightest - darkest < ONE_LIGHT:
        said.append(
            f"the faces have uniform lighting: nine of ten have a mean grey from {darkest:.0f} to {brightest:.0f} of "
            f"255. {verify}"
        )
    return said


def _people_in_turns(who: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each side; every person, in random order, goes to the side with fewer faces so far."""
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    sizes = [0, 0]
    for person in rng.permutation(np.unique(who)):
        rows = np.flatnonzero(who == person)
        side = int(sizes[1] < sizes[0])
        sides[side].append(rows)
        sizes[side] += len(rows)
    return np.concatenate(sides[0]), np.concatenate(sides[1])
