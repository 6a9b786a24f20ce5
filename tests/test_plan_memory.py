"""How many instances of a plan fit on a card: a table, most of it refusals and the edges between two answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcface_build.plans.memory import PlanMemory, advise
from arcface_clients.contract import FACE_BYTES
from arcface_clients.errors import Missing
from plan_samples import spec, write_plan

MB, GB = 1 << 20, 1 << 30
BUFFERS = 2 * 64 * (FACE_BYTES + 4 * 517)
PLAN = PlanMemory(loaded_bytes=100 * MB, context_bytes=640 * MB, max_batch=64, dim=512)
EACH = 740 * MB + BUFFERS


def smaller(batch: int) -> int:
    return 100 * MB + 10 * MB * batch + 2 * batch * (FACE_BYTES + 4 * 517)


@pytest.mark.parametrize(
    ("free_bytes", "wanted", "instances", "max_batch"),
    [
        (24 * GB, None, 2, 64),  # more than two would help nobody
        (24 * GB, 4, 4, 64),
        (GB + 2 * EACH, None, 2, 64),
        (GB + 2 * EACH - 1, None, 1, 64),  # a byte less
        (GB + EACH, None, 1, 64),
        (GB + EACH - 1, None, 1, 32),
        (GB + EACH - 1, 2, 2, 16),
        (GB + smaller(8), None, 1, 8),
        (GB + smaller(1), None, 1, 1),
        (GB + 2 * smaller(1), 2, 2, 1),
    ],
)
def test_instances_and_largest_batch_fit_into_what_is_free(
    free_bytes: int, wanted: int | None, instances: int, max_batch: int
) -> None:
    advice = advise(PLAN, free_bytes, wanted)
    assert (advice.instances, advice.max_batch) == (instances, max_batch)
    assert advice.rebuilt == (max_batch != 64)
    assert advice.instances * advice.instance_bytes <= advice.room_bytes == free_bytes - GB


@pytest.mark.parametrize(
    ("free_bytes", "wanted"), [(GB + smaller(1) - 1, None), (GB + 2 * smaller(1) - 1, 2), (GB, None), (0, 1)]
)
def test_what_does_not_fit_is_not_suggested(free_bytes: int, wanted: int | None) -> None:
    with pytest.raises(Missing, match=r"even for one face at a time \(1\.0 GB of it kept free\): expected at most"):
        advise(PLAN, free_bytes, wanted)


def test_a_largest_batch_between_powers_of_two_is_tried_before_them() -> None:
    plan = PlanMemory(100 * MB, 480 * MB, 48, 512)
    assert advise(plan, 24 * GB).max_batch == 48
    assert advise(plan, GB + 500 * MB).max_batch == 32


def test_an_instance_has_a_context_for_every_profile_and_at_least_the_weights_in_the_file(tmp_path: Path) -> None:
    told = {"memory": {"loaded_bytes": 5, "context_bytes": [64 * MB, 8 * MB, MB]}}
    manifest = write_plan(tmp_path / "x.plan", spec(tuned_batches=(8, 1)), size=1000, build=told, dim=128)
    assert PlanMemory.of(manifest) == PlanMemory(1000, 73 * MB, 64, 128)


@pytest.mark.parametrize(
    "told", [{}, {"memory": None}, {"memory": {"loaded_bytes": 1}}, {"memory": {"loaded_bytes": "x"}}]
)
def test_a_plan_that_was_not_measured_gets_no_advice(tmp_path: Path, told: dict[str, object]) -> None:
    with pytest.raises(Missing, match=r"does not say what the plan takes on a GPU: .* arcface plan build --force"):
        PlanMemory.of(write_plan(tmp_path / "x.plan", size=10, build=told))
