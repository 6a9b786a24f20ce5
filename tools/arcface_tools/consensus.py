"""Measures how well and how fast strangers among a person's faces are found.

Strangers, drawn from the other people, are mixed into each person's faces, and the faces reported as outliers are
counted. The same faces show what a verification call for every pair would have cost.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arcface_build.bench.host import describe_host
from arcface_clients.arrays import unit_rows
from arcface_clients.errors import WrongUse
from arcface_clients.faces.images import load_faces
from arcface_clients.people.cache import EmbeddingCache
from arcface_clients.people.consensus import ACCEPT_DISTANCE, MAX_DISTANCE, REJECT_DISTANCE, calibrate, find_consensus
from arcface_clients.people.persons import people_in
from arcface_clients.people.vectors import cosine_distance, cosine_distances

if TYPE_CHECKING:
    from arcface_clients.engines.protocol import EmbeddingEngine
    from arcface_clients.faces.detect import FaceDetector

EQUAL_CROWDS = ((2, 2), (2, 2, 2), (3, 3), (4, 4), (5, 5), (6, 6))  # photos of each of two or three people
TIMED_PEOPLE = 3  # whose pairs are verified one by one; more would take minutes and show the same


def run(
    folder: Path,
    engine: EmbeddingEngine,
    images: Path | None = None,
    detector: Path | None = None,
    rounds: int = 5,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Measure, report each figure as soon as it is known, and return all as JSON.

    Args:
        folder: FOLDER/PERSON/*.jpg, aligned crops; at least four people with three faces each.
        engine: embeds them; states a contract id.
        images: the same people's photos, FOLDER/PERSON/*, for detection and alignment.
        detector: YuNet's file.
        rounds: how often new strangers are drawn for everyone.
        seed: of the random choice.
        say: called with each line of output.

    Raises:
        WrongUse: too few people.
        ConfigError: `images` contains no folders, or `detector` is None.
        ArcFaceError: from the engine.
    """
    if images is not None:  # report a wrong path now, not after minutes
        from arcface_clients.faces.detect import FaceDetector

        FaceDetector(detector)
        people_in(images)
    people = {name: load_faces(files)[0] for name, files in people_in(folder).items()}
    people = {name: faces for name, faces in people.items() if len(faces) >= 3}
    if len(people) < 4:
        raise WrongUse(f"{folder} holds {len(people)} people with three faces or more; expected at least 4.")
    names = np.repeat(list(people), [len(faces) for faces in people.values()])
    say(f"{len(people)} people, {len(names)} faces, engine {getattr(engine, 'name', engine)!s}")
    report: dict[str, Any] = {
        "host": describe_host(),
        "people": len(people),
        "faces": len(names),
        "contract_id": engine.contract_id,
    }
    report["extraction"], embeddings = _extract(people, engine, say)
    report["distances"] = _all_pairs(embeddings, say)
    report["thresholds"] = _thresholds(embeddings, names, say)
    rng = np.random.default_rng(seed)
    report["strangers"] = find_strangers(embeddings, names, MAX_DISTANCE, rounds, rng)
    say(f"strangers mixed in, at {MAX_DISTANCE}: {_told(report['strangers'])}")
    report["mixtures"] = [find_mixtures(embeddings, names, crowd, 400 * rounds, seed) for crowd in EQUAL_CROWDS]
    for row in report["mixtures"]:
        photos = " + ".join(map(str, row["photos"]))
        say(f"{photos} photos of different people: {row['agreed']} of {row['draws']} agreed on")
    report["calibrated"] = _cross_calibrated(embeddings, names, rounds, rng, say)
    report["against_pairwise"] = _against_pairwise(people, engine, rng, say)
    if images is not None:
        report["images"] = _images(images, detector, engine, say)
    return report


def find_strangers(
    embeddings: np.ndarray, names: np.ndarray, max_distance: float, rounds: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Counts over `rounds`: each person's faces mixed with one to three faces of others, in random order."""
    strangers = found = own = alarms = undecided = 0
    start = time.perf_counter()
    for _ in range(rounds):
        for name in np.unique(names):
            mine, others = np.flatnonzero(names == name), np.flatnonzero(names != name)
            added = rng.choice(others, rng.integers(1, min(3, len(mine) - 1) + 1), replace=False)
            rows = rng.permutation(np.concatenate([mine, added]))
            result = find_consensus(embeddings[rows], max_distance)
            called = set(rows[[outlier.index for outlier in result.outliers]].tolist())
            strangers += len(added)
            own += len(mine)
            found += len(called & set(added.tolist()))
            alarms += len(called & set(mine.tolist()))
            undecided += not result.agreed
    calls = rounds * len(np.unique(names))
    return {
        "max_distance": max_distance,
        "strangers": strangers,
        "found": found,
        "found_share": found / strangers,
        "own_faces": own,
        "false_alarms": alarms,
        "false_alarm_share": alarms / own,
        "undecided": undecided,
        "ms_per_person": 1000 * (time.perf_counter() - start) / calls,
    }


def find_mixtures(
    embeddings: np.ndarray, names: np.ndarray, photos: tuple[int, ...], draws: int, seed: int
) -> dict[str, Any]:
    """How often as many photos each of different people are agreed on, which is wrong whomever it takes them for."""
    rng = np.random.default_rng(seed)
    people = [own for name in np.unique(names) if len(own := np.flatnonzero(names == name)) >= max(photos)]
    agreed, draws = 0, draws if len(people) >= len(photos) else 0
    for _ in range(draws):
        chosen = rng.choice(len(people), len(photos), replace=False)
        rows = [rng.choice(people[who], count, replace=False) for who, count in zip(chosen, photos, strict=True)]
        agreed += find_consensus(embeddings[np.concatenate(rows)]).agreed
    return {"photos": list(photos), "draws": draws, "agreed": agreed}


def _extract(
    people: dict[str, np.ndarray], engine: EmbeddingEngine, say: Callable[[str], object]
) -> tuple[dict[str, Any], np.ndarray]:
    """Embed everyone through a cache, twice."""
    engine.ensure_ready()
    engine.encode(next(iter(people.values())))  # warm-up
    seconds: list[float] = []
    with EmbeddingCache() as cache:
        for _ in range(2):
            start = time.perf_counter()
            rows = np.concatenate([cache.embed(engine, faces, person=name) for name, faces in people.items()])
            seconds.append(time.perf_counter() - start)
        stats = cache.stats
    figures = {"cold_s": seconds[0], "cached_s": seconds[1], "hits": stats.hits, "misses": stats.misses}
    say(
        f"extraction {seconds[0]:.2f} s ({len(rows) / seconds[0]:.0f} faces/s), again through the cache "
        f"{seconds[1]:.3f} s ({stats.hits} hits, {stats.misses} misses)"
    )
    return figures, unit_rows(rows)


def _all_pairs(embeddings: np.ndarray, say: Callable[[str], object]) -> dict[str, float]:
    count = len(embeddings) * (len(embeddings) - 1) // 2
    product = _median_ms(lambda: cosine_distances(embeddings), 9)
    calls = min(count, 5000)
    i, j = np.triu_indices(len(embeddings), 1)
    single = _median_ms(
        lambda: [cosine_distance(embeddings[a], embeddings[b]) for a, b in zip(i[:calls], j[:calls], strict=True)], 3
    )
    single *= count / calls
    say(f"{count} distances: {product:.2f} ms by product, {single:.0f} ms one by one ({single / product:.0f} ×)")
    return {"pairs": count, "product_ms": product, "single_calls_ms": single, "ratio": single / product}


def _thresholds(embeddings: np.ndarray, names: np.ndarray, say: Callable[[str], object]) -> dict[str, Any]:
    """The numbers of own and foreign faces on the wrong side of the package's three distances."""
    own: list[float] = []
    foreign: list[np.ndarray] = []
    for name in np.unique(names):
        mine = embeddings[names == name]
        total = mine.sum(axis=0)
        own += [float(cosine_distances(row[None], (total - row)[None])[0, 0]) for row in mine]
        foreign.append(cosine_distances(embeddings[names != name], total[None])[:, 0])
    others = np.concatenate(foreign)
    figures: dict[str, Any] = {"own": len(own), "foreign": len(others)}
    for limit in (ACCEPT_DISTANCE, MAX_DISTANCE, REJECT_DISTANCE):
        beyond, within = int((np.array(own) > limit).sum()), int((others <= limit).sum())
        figures[f"{limit:g}"] = {"own_beyond": beyond, "foreign_within": within}
        say(
            f"distance to a person's mean {limit:g}: {beyond} of {len(own)} own beyond, "
            f"{within} of {len(others)} foreign within"
        )
    return figures


def _cross_calibrated(
    embeddings: np.ndarray, names: np.ndarray, rounds: int, rng: np.random.Generator, say: Callable[[str], object]
) -> list[dict[str, Any]]:
    """Calibrate on one half of the people and count on the other, then swap the halves."""
    halves = np.array_split(rng.permutation(np.unique(names)), 2)
    figures = []
    for learned, counted in (halves, halves[::-1]):
        known, tested = np.isin(names, learned), np.isin(names, counted)
        limit = calibrate(embeddings[known], names[known])
        result = find_strangers(embeddings[tested], names[tested], min(limit, 1.0), rounds, rng)
        say(f"calibrated on one half ({limit:.3f}), counted on the other: {_told(result)}")
        figures.append(result)
    return figures


def _against_pairwise(
    people: dict[str, np.ndarray], engine: EmbeddingEngine, rng: np.random.Generator, say: Callable[[str], object]
) -> dict[str, float]:
    """A person's faces and a stranger's: with our code, and with one verification call (two faces) per pair."""
    chosen = rng.choice(list(people), TIMED_PEOPLE + 1, replace=False).tolist()
    once = one_by_one = 0.0
    pairs = 0
    for name, other in pairwise(chosen):
        faces = np.concatenate([people[name], people[other][:2]])
        start = time.perf_counter()
        find_consensus(engine.encode(faces))
        once += time.perf_counter() - start
        start = time.perf_counter()
        for i in range(len(faces)):
            for j in range(i):
                first, second = engine.encode(faces[[i]])[0], engine.encode(faces[[j]])[0]
                cosine_distance(first, second)
                pairs += 1
        one_by_one += time.perf_counter() - start
    say(
        f"{TIMED_PEOPLE} people, {pairs} pairs: {1000 * once:.0f} ms this way, {1000 * one_by_one:.0f} ms by "
        f"verification calls: {one_by_one / once:.1f} × as fast"
    )
    return {
        "people": TIMED_PEOPLE,
        "pairs": pairs,
        "consensus_s": once,
        "pairwise_s": one_by_one,
        "speed_up": one_by_one / once,
    }


def _images(
    folder: Path, detector: Path | None, engine: EmbeddingEngine, say: Callable[[str], object]
) -> dict[str, Any]:
    """Each photo's largest face, aligned with one look and with three: how well pairs are separated."""
    from arcface_clients.faces.detect import FaceDetector

    figures: dict[str, Any] = {}
    for label, refine in (("one look", False), ("three looks", True)):
        faces, names, missed, seconds = _largest_faces(folder, FaceDetector(detector, refine=refine))
        distances = cosine_distances(engine.encode(faces))
        i, j = np.triu_indices(len(names), 1)
        same = names[i] == names[j]
        pairs = distances[i, j]
        figures[label] = {
            "photos": len(names) + missed,
            "without_a_face": missed,
            "ms_per_photo": 1000 * seconds / (len(names) + missed),
            "genuine_mean_cosine": 1 - float(pairs[same].mean()),
            "eer": equal_error_rate(pairs[same], pairs[~same]),
        }
        told = figures[label]
        say(
            f"photos, {label}: {missed} of {told['photos']} without a face, {told['ms_per_photo']:.0f} ms per photo, "
            f"genuine mean cosine {told['genuine_mean_cosine']:.3f}, "
            f"EER {100 * told['eer']:.2f} % of {len(pairs)} pairs"
        )
    return figures


def _largest_faces(folder: Path, detector: FaceDetector) -> tuple[np.ndarray, np.ndarray, int, float]:
    from arcface_clients.faces.photos import read_photo

    faces: list[np.ndarray] = []
    names: list[str] = []
    missed = 0
    start = time.perf_counter()
    for name, files in people_in(folder).items():
        for file in files:
            found = detector.detect(read_photo(file))
            if not found:
                missed += 1
                continue
            faces.append(max(found, key=lambda face: face.box[2] * face.box[3]).face)
            names.append(name)
    return np.stack(faces), np.array(names), missed, time.perf_counter() - start


def equal_error_rate(genuine: np.ndarray, impostor: np.ndarray) -> float:
    """The equal error rate: as many genuine distances are above a limit as impostor distances at or below it."""
    limits = np.sort(np.concatenate([genuine, impostor]))
    missed = 1 - np.searchsorted(np.sort(genuine), limits, side="right") / len(genuine)
    passed = np.searchsorted(np.sort(impostor), limits, side="right") / len(impostor)
    nearest = int(np.argmin(np.abs(missed - passed)))
    return float((missed[nearest] + passed[nearest]) / 2)


def _told(figures: dict[str, Any]) -> str:
    return (
        f"{figures['found']} of {figures['strangers']} found ({100 * figures['found_share']:.1f} %), "
        f"{figures['false_alarms']} of {figures['own_faces']} own faces called strangers "
        f"({100 * figures['false_alarm_share']:.2f} %), {figures['undecided']} undecided, "
        f"{figures['ms_per_person']:.2f} ms a person"
    )


def _median_ms(way: Callable[[], object], times: int) -> float:
    samples = []
    for _ in range(times):
        start = time.perf_counter()
        way()
        samples.append(1000 * (time.perf_counter() - start))
    return statistics.median(samples)
