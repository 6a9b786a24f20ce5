"""A second check of preprocessing, independent of the graph: does the network get what it was trained on?

There are two kinds of evidence, when available. BatchNormalization stores the mean and variance its input had in
training: with other preprocessing, its input departs from them. And if it is known who the faces show, faces of one
person must be closer than faces of two, most clearly so with the right preprocessing. Neither decides; if another
preprocessing is clearly better than the chosen one, the import warns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from arcface_build.graph.cut_out import cut_out
from arcface_build.graph.index import GraphIndex, attribute
from arcface_build.imports.proof_faces import ProofFaces
from arcface_clients.arrays import Array
from arcface_clients.contract import Preprocessing
from arcface_clients.engines.runtimes import open_session

if TYPE_CHECKING:
    import onnx

# What networks are trained on, except 127.5 / 128, which cannot be told from 127.5 / 127.5.
USUAL: dict[str, tuple[Any, Any]] = {
    "(x − 127.5) / 127.5": (127.5, 127.5),
    "0..255": (0.0, 1.0),
    "0..1": (0.0, 255.0),
    "ImageNet's": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}
BATCHNORMS, STATISTICS_FACES = 4, 16  # the first ones depend on the input most directly
PEOPLE, PER_PERSON, FEWEST_PEOPLE = 16, 4, 8
DRAWS = 200  # bootstrap over people
# Measured, see docs/import.md: correctly fed demos depart by 0.001 to 0.07, the nearest wrong way by 0.1 to 0.3.
DEPARTED_MORE, DEPARTED_BY, SOUND = 3.0, 0.1, 1.0
TRAINED = 2.0  # d′ of a trained network: random weights stay below 1.2 on real faces


@dataclass(frozen=True)
class Look:
    """Results per way of feeding: `departure` from BatchNormalization's statistics, `separation` of people (d′).

    Each is {way: figure}, empty without such evidence; `warning` is "" unless another way is clearly better.
    """

    chosen: str
    departure: dict[str, float]
    separation: dict[str, float]
    warning: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)


def second_look(model: onnx.ModelProto, fed: Preprocessing, faces: ProofFaces) -> Look:
    """Feed the model in each usual way and compare the evidence.

    Args:
        model: float32 NCHW image in, embedding out; as the reference runs it.
        fed: the chosen preprocessing.
        faces: what to feed; knowing who each shows helps.
    """
    ways = {_name(way): way for way in [fed, *_usual_ways()]}
    chosen = _name(fed)
    departure = _departures(model, ways, faces.faces[:STATISTICS_FACES])
    separation, sure = _separations(model, ways, faces.faces, faces.people, chosen) if faces.people else ({}, {})
    doubts = []
    if departure:
        best = min(departure, key=departure.__getitem__)
        limit = max(DEPARTED_MORE * departure[best], departure[best] + DEPARTED_BY)
        if departure[best] < SOUND and departure[chosen] > limit:
            doubts.append(
                (best, f"its BatchNormalization departs by {departure[best]:.2g}, not {departure[chosen]:.2g}")
            )
    if separation and max(separation.values()) >= TRAINED:
        best = max(separation, key=separation.__getitem__)
        if sure.get(best):
            doubts.append((best, f"it separates people by d′ {separation[best]:.2f}, not {separation[chosen]:.2f}"))
    said = "; ".join(f"{way} fits better: {why}" for way, why in doubts)
    return Look(chosen, departure, separation, f"fed {chosen}, but {said}" if said else "")


def _usual_ways() -> list[Preprocessing]:
    ways = []
    for mean, std in USUAL.values():
        means, stds = (tuple(np.broadcast_to(np.float64(value), 3).tolist()) for value in (mean, std))
        ways += [Preprocessing("rgb", means, stds), Preprocessing("bgr", means[::-1], stds[::-1])]
    return ways


def _name(way: Preprocessing) -> str:
    order = 1 if way.color == "rgb" else -1
    for name, (mean, std) in USUAL.items():
        near = np.allclose(way.mean[::order], mean, atol=1) and np.allclose(way.std[::order], std, rtol=0.01)
        if near:
            return f"{way.color} {name}"
    return f"{way.color} (x − {list(way.mean)}) / {list(way.std)}"


def _departures(model: onnx.ModelProto, ways: dict[str, Preprocessing], faces: Array) -> dict[str, float]:
    """How far the inputs of the first BatchNormalizations are from their stored statistics, for each way.

    The divergence of two normal distributions, ½ (v/v₀ + (m−m₀)²/v₀ − 1 − ln v/v₀): the median over the channels of
    each node, the mean over the nodes.
    """
    index = GraphIndex(model.graph)
    kept: list[tuple[str, Array, Array]] = []
    for node in model.graph.node:
        if node.op_type == "BatchNormalization" and len(kept) < BATCHNORMS:
            mean, variance = index.constant(node.input[3]), index.constant(node.input[4])
            if mean is not None and variance is not None:
                kept.append((node.input[0], mean.astype(np.float64), variance + attribute(node, "epsilon", 1e-5)))
    if not kept:
        return {}
    run = _runner(cut_out(model, index, [name for name, _, _ in kept]))
    found = {}
    for name, way in ways.items():
        outputs = [run(way.apply(face[None])) for face in faces]
        divergences = []
        for tensor, mean0, variance0 in kept:
            seen = np.concatenate([output[tensor] for output in outputs]).astype(np.float64)
            axes = (0, *range(2, seen.ndim))
            mean, ratio = seen.mean(axes), seen.var(axes) / variance0
            each = 0.5 * (ratio + np.square(mean - mean0) / variance0 - 1 - np.log(np.maximum(ratio, 1e-12)))
            divergences.append(float(np.median(each)))
        found[name] = round(float(np.mean(divergences)), 4)
    return found


def _separations(
    model: onnx.ModelProto, ways: dict[str, Preprocessing], faces: Array, people: Sequence[str], chosen: str
) -> tuple[dict[str, float], dict[str, bool]]:
    """(d′ of genuine against impostor pairs for each way, whether it beats the chosen way in 99 % of all draws)."""
    rows, groups = _pick(people)
    if len(groups) < FEWEST_PEOPLE:
        return {}, {}
    run = _runner(model)
    output = model.graph.output[0].name
    cosines = {}
    for name, way in ways.items():
        raw = np.concatenate([run(way.apply(faces[row][None]))[output].reshape(1, -1) for row in rows])
        unit = raw / np.maximum(np.linalg.norm(raw, axis=1, keepdims=True), 1e-12)
        cosines[name] = unit @ unit.T
    whole = np.arange(len(groups))
    found = {name: round(_d_prime(cosine, groups, whole), 3) for name, cosine in cosines.items()}
    rng = np.random.default_rng(0)
    draws = [rng.choice(len(groups), len(groups)) for _ in range(DRAWS)]
    base = np.array([_d_prime(cosines[chosen], groups, draw) for draw in draws])
    sure = {
        name: bool(np.mean([_d_prime(cosine, groups, draw) for draw in draws] > base) >= 0.99)
        for name, cosine in cosines.items()
    }
    return found, sure


def _pick(people: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """(faces to embed, and for each person the indices among those): up to four faces each of sixteen people."""
    by_person: dict[str, list[int]] = {}
    for row, person in enumerate(people):
        by_person.setdefault(person, []).append(row)
    several = [rows[:PER_PERSON] for rows in by_person.values() if len(rows) > 1][:PEOPLE]
    rows = [row for group in several for row in group]
    place = {row: position for position, row in enumerate(rows)}
    return rows, [[place[row] for row in group] for group in several]


def _d_prime(cosine: Array, groups: list[list[int]], draw: Array) -> float:
    """(mean genuine − mean impostor) / pooled deviation, over the people drawn."""
    drawn = [groups[i] for i in draw]
    genuine = np.concatenate(
        [cosine[np.ix_(rows, rows)][np.triu_indices(len(rows), 1)] for rows in map(np.array, drawn)]
    )
    rows = np.array([row for group in drawn for row in group])
    person = np.repeat(draw, [len(group) for group in drawn])
    impostor = cosine[np.ix_(rows, rows)][person[:, None] != person]
    return float((genuine.mean() - impostor.mean()) / np.sqrt((genuine.var() + impostor.var()) / 2 + 1e-12))


def _runner(model: onnx.ModelProto) -> Any:
    """A function from a blob (1,3,112,112) to a dict of the outputs."""
    session = open_session(model)
    names = [value.name for value in session.get_outputs()]
    face = session.get_inputs()[0].name
    return lambda blob: dict(zip(names, session.run(None, {face: blob}), strict=True))
