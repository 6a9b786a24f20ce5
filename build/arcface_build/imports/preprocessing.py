"""Determines the preprocessing a file expects: stated by the user, known for the file, or measured in its graph.

A graph reveals it by what its front does to pixels (`arcface_build.imports.front`). If two readings are plausible, the
import asks instead of choosing: a wrong choice gives embeddings that look right but compare wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import numpy as np

from arcface_build.errors import SourceRefused
from arcface_build.imports.front import Front, PixelMap
from arcface_clients.contract import Preprocessing
from arcface_clients.errors import WrongUse

Three = tuple[float, float, float]
NEUTRAL: tuple[Three, Three] = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
ASK = "State what it expects: --color rgb --mean 127.5 --std 127.5 (in 0..255 units)"
IMAGENET_MEAN = (123.675, 116.28, 103.53)  # red, green, blue of ImageNet's training images
LARGEST, SMALLEST = 4, 0.2  # normalised pixels extend beyond ±SMALLEST on both sides, and not beyond ±LARGEST
NARROWEST, FURTHEST = 0.02, 4  # what networks see of 0..255 is wider than this, and its middle is within so many widths


@dataclass(frozen=True)
class Stated:
    """The preprocessing stated by the user; None for a part not stated. `mean` and `std` go together."""

    color: str | None = None
    mean: Three | None = None
    std: Three | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the parts that were stated."""
        return {key: list(value) if key != "color" else value for key, value in asdict(self).items() if value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Stated:
        """The inverse of `to_json`."""
        mean, std = (tuple(data[key]) if key in data else None for key in ("mean", "std"))
        return cls(data.get("color"), mean, std)


@dataclass(frozen=True)
class Decision:
    """What the file is fed (`fed`), why, and what its network then sees: None if the front is not an affine map."""

    fed: Preprocessing
    why: str
    stated: Stated
    network: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """The manifest's entry: color, mean, std, why, stated, network."""
        return {**self.fed.to_json(), "why": self.why, "stated": self.stated.to_json(), "network": self.network}


def decide_preprocessing(
    front: Front,
    file: str,
    stated: Stated | None = None,
    known: tuple[Preprocessing, str] | None = None,
    *,
    says_inside: bool = False,
    whole_pixels: bool = False,
) -> Decision:
    """Decide: what the user stated, else what is known about the file, else what its graph shows beyond doubt.

    Args:
        front: of the file's graph.
        file: its name, for messages.
        stated: the user's statement.
        known: preprocessing, and why we know it, of a file known by its digest or made by us.
        says_inside: InsightFace concludes from node names that the graph normalises.
        whole_pixels: the input is uint8, so the pixels cannot have been normalised outside.

    Raises:
        SourceRefused: the graph is ambiguous; the message is the question to answer.
        WrongUse: the stated preprocessing would normalise twice.
    """
    stated = stated or Stated()
    reasons: list[str] = []
    if stated.mean and stated.std:
        span, why = (stated.mean, stated.std), "stated by the caller"
        _refuse_twice(front, file, span, whole_pixels)
    elif known:
        span, why = (known[0].mean, known[0].std), known[1]
    else:
        span, why = _span(front, file, says_inside, whole_pixels)
    reasons.append(why)
    seen = front.pixel_map(Preprocessing("bgr", *span))
    if stated.color:
        color, why = stated.color, "stated by the caller"
    elif known:
        color, why = known[0].color, known[1]
    else:
        color, why = _color(front, seen, file, inside=span == NEUTRAL)
    reasons += [why] if why not in reasons else []
    fed = Preprocessing(color, *span)
    return Decision(fed, "; ".join(reasons), stated, seen.told(color) if seen else None)


def _span(front: Front, file: str, says_inside: bool, whole_pixels: bool) -> tuple[tuple[Three, Three], str]:
    """(mean, std) that the input expects, and why."""
    raw = front.pixel_map()
    if raw is None:
        _ask(file, f"{_named(front)} before the network does not map each channel by itself")
    low, high = raw.ends.min(), raw.ends.max()
    if whole_pixels:
        return NEUTRAL, f"the input takes whole pixels; the graph maps 0..255 to {low:.4g}..{high:.4g}"
    if np.allclose(raw.scale, 1, atol=1e-3) and np.allclose(raw.shift, 0, atol=0.05):
        if says_inside:
            _ask(
                file,
                "InsightFace reads 'inside the graph' from node names, but no constant is subtracted from the "
                "input or multiplied with it",
            )
        if front.folded_mean is not None:
            _ask(
                file,
                f"nothing normalises, but the first convolution takes a grey level of {front.folded_mean:.0f} away, as "
                "where normalisation was multiplied into its weights (whole pixels are --mean 0 --std 1)",
            )
        usual = Preprocessing("bgr")
        seen = front.pixel_map(usual)
        if seen is None or not np.allclose(seen.ends, [[-1] * 3, [1] * 3], atol=0.02):
            _ask(file, f"{_named(front)} lets pixels 0..255 pass but not (x − 127.5) / 127.5, and nothing normalises")
        return (usual.mean, usual.std), "InsightFace's rule for a graph without normalisation"
    if _is_normalised(raw):
        return NEUTRAL, f"the graph itself maps pixels 0..255 to {low:.4g}..{high:.4g}"
    fraction = front.pixel_map(Preprocessing("bgr", (0, 0, 0), (255, 255, 255)))
    hint = " (it fits an input of 0..1, which is --mean 0 --std 255)" if fraction and _is_normalised(fraction) else ""
    _ask(
        file,
        f"the graph maps pixels 0..255 to {low:g}..{high:g}{hint}, expected about −1..1 around 0, or no change",
    )


def _color(front: Front, seen: PixelMap | None, file: str, *, inside: bool) -> tuple[str, str]:
    """The input's channel order, and why: from constants that differ by channel, a swap in the graph, or the rule."""
    if seen is None:
        _ask(file, f"{_named(front)} before the network hides the order of its channels", "State it: --color rgb")
    if sorted(seen.channels) != [0, 1, 2]:
        _ask(file, f"the network sees the input's channels {list(seen.channels)}", "State their order: --color rgb")
    mean = np.empty(3)
    mean[list(seen.channels)] = seen.mean  # by position in the input
    if np.allclose(mean, IMAGENET_MEAN, atol=1):
        return "rgb", "its means are ImageNet's, red first"
    if np.allclose(mean, IMAGENET_MEAN[::-1], atol=1):
        return "bgr", "its means are ImageNet's, blue first"
    swapped = seen.channels == (2, 1, 0)
    if not swapped and seen.channels != (0, 1, 2):
        _ask(file, f"the graph reorders its channels to {list(seen.channels)}", "State the input's order: --color rgb")
    if swapped and not inside:
        _ask(file, "the graph swaps red and blue but does not normalise", ASK.replace("rgb", "bgr"))
    # In photos of people red is brighter than green, and green than blue; means in the opposite order raise a doubt.
    steps = np.diff(mean)
    if np.ptp(mean) > 0.5 and ((steps < 0).all() if swapped else (steps > 0).all()):
        shown = ", ".join(f"{value:.4g}" for value in mean)
        _ask(
            file,
            f"its means {shown} suggest blue first"
            if not swapped
            else f"the graph swaps red and blue, but its means {shown} suggest red first",
            "State it: --color bgr",
        )
    if swapped:
        return "bgr", "the graph swaps red and blue"
    return "rgb", "red first is InsightFace's rule: the graph does not show the order"


def _is_normalised(seen: PixelMap) -> bool:
    """Whether pixels are mapped to what networks are trained on: each channel around 0, within ±4, not mirrored."""
    low, high = seen.ends
    return bool(low.min() >= -LARGEST and high.max() <= LARGEST and low.max() <= -SMALLEST and high.min() >= SMALLEST)


def _refuse_twice(front: Front, file: str, span: tuple[Three, Three], whole_pixels: bool) -> None:
    """Refuse a stated mean and std that the graph applies as well, wholly or in part."""
    if span == NEUTRAL:
        return
    raw, seen = front.pixel_map(), front.pixel_map(Preprocessing("bgr", *span))
    if whole_pixels or (raw and _is_normalised(raw)):
        does = "takes whole pixels (uint8)" if whole_pixels else "normalises inside its graph"
    elif raw and seen and _is_absurd(seen):
        low, high = seen.ends.min(), seen.ends.max()
        does = f"does a part of it inside its graph (the network would see pixels as {low:.4g}..{high:.4g})"
        raise WrongUse(f"{file} {does}: expected the rest as --mean and --std, got {list(span[0])}, {list(span[1])}.")
    else:
        return
    raise WrongUse(
        f"{file} {does}: expected --mean 0 --std 1, got mean {list(span[0])}, std {list(span[1])}; "
        "it would be done twice."
    )


def _is_absurd(seen: PixelMap) -> bool:
    """Whether no network is trained on this: all pixels nearly alike, or far to one side of 0."""
    low, high = seen.ends
    width = np.abs(high - low)
    return bool(width.max() < NARROWEST or (np.abs(high + low) / 2 > FURTHEST * width).any())


def _named(front: Front) -> str:
    shown = list(dict.fromkeys(front.ops))
    return " → ".join([*shown[:4], "…"] if len(shown) > 4 else shown) or "something"


def _ask(file: str, what: str, question: str = ASK) -> NoReturn:
    raise SourceRefused(f"{file}: cannot tell the preprocessing: {what}. {question}.")
