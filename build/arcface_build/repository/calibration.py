"""The distance at which `photo_verify` decides, measured for each model by `arcface compare --pairs --calibrate`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arcface_build.repository.detector import VERIFY_MODEL
from arcface_build.repository.lock import locked
from arcface_clients.atomic import write_json
from arcface_clients.contract import contract_words
from arcface_clients.errors import Missing, WrongUse

FEWEST_PAIRS = 100  # of each kind; with fewer the threshold is chance
_MEASURED = ("genuine", "impostor", "fold_accuracy", "fold_standard_error")
_FILE = Path(VERIFY_MODEL) / "1" / "calibration.json"


def calibrate_verify(repository: Path, report: Mapping[str, Any]) -> float:
    """Have `photo_verify` decide at the threshold that a comparison measured for B; returns it as 1 − cosine.

    What was measured for other models stays, for a rollback. A running server goes on with what it read at its start.

    Raises:
        WrongUse: the comparison has no accuracy, too few pairs, or no contract for B.
        Missing: the repository has no `photo_verify`, or its calibration cannot be read.
    """
    accuracy, contract_id = report["accuracy"], report["b"]["contract_id"]
    if not accuracy:
        raise WrongUse("calibration needs labelled pairs: add --pairs pairs.csv, or --identities")
    if not contract_id:
        raise WrongUse(
            f"{report['b']['label']} does not say which contract it serves. Give an engine or a server: "
            "arcface compare insightface onnx --pairs pairs.csv --calibrate"
        )
    measured = accuracy["b"]
    if min(measured["genuine"], measured["impostor"]) < FEWEST_PAIRS:
        raise WrongUse(
            f"calibration needs {FEWEST_PAIRS} pairs of one person and as many of two; got {measured['genuine']} and "
            f"{measured['impostor']}. Add labelled pairs"
        )
    if not (repository / VERIFY_MODEL / "config.pbtxt").is_file():
        raise Missing(f"{repository} has no model {VERIFY_MODEL}: expected that of this version of arcface-triton")
    max_distance = 1 - measured["fold_threshold"]
    kept = {name: measured[name] for name in _MEASURED}
    row = {"contract_id": contract_id, "contract": contract_words(contract_id).tolist(), "max_distance": max_distance}
    with locked(repository):
        others = [known for known in _read(repository) if known["contract_id"] != contract_id]
        write_json(repository / _FILE, {"models": [*others, row | kept]})
    return max_distance


def calibration_of(repository: Path, contract_id: str | None) -> dict[str, Any] | None:
    """What was measured for a model: max_distance, genuine, impostor, fold_accuracy …; None if nothing was.

    Raises:
        Missing: it cannot be read.
    """
    return next((row for row in _read(repository) if row["contract_id"] == contract_id), None)


def told_of(repository: Path, contract_id: str | None) -> str:
    """A line that says where `photo_verify` will decide, and whether that was measured."""
    try:
        found = calibration_of(repository, contract_id)
    except Missing as exc:  # faces are served without it
        return f"{VERIFY_MODEL}: {exc}"
    if found is None:
        return f"{VERIFY_MODEL}: uncalibrated. Next: arcface compare insightface onnx --pairs pairs.csv --calibrate"
    pairs = found["genuine"] + found["impostor"]
    return (
        f"{VERIFY_MODEL}: calibrated on {pairs:,} pairs, decides at distance {found['max_distance']:.3f} "
        f"(accuracy {100 * found['fold_accuracy']:.2f} %)"
    )


def _read(repository: Path) -> list[dict[str, Any]]:
    path = repository / _FILE
    if not path.is_file():
        return []
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())["models"]
        for row in rows:
            if row["contract"] != contract_words(row["contract_id"]).tolist() or not 0 <= row["max_distance"] <= 2:
                raise ValueError("a distance outside 0..2, or another contract")
            if not all(row[name] >= 0 for name in _MEASURED):
                raise ValueError("a count below 0")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise Missing(
            f"{path} cannot be read ({type(exc).__name__}: {exc}). Delete it, and calibrate again: arcface compare"
        ) from exc
    return rows
