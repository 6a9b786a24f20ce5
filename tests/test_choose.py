"""Which backend is served: the rule as a table, most of it negative."""

from __future__ import annotations

import pytest

from arcface_build.serving.choose import choose_backend, order_of_backends
from arcface_build.serving.served_plans import ServedPlans
from arcface_clients.config.schema import Fallback
from arcface_clients.errors import Missing, PlanRefused


def good(sms: set[str]) -> ServedPlans:
    return ServedPlans(frozenset(sms), {})


@pytest.mark.parametrize(
    ("gpu", "plans", "onnx", "reference", "backend", "reason"),
    [
        ("8.6", {"8.6", "9.0"}, True, True, "tensorrt", "GPU of SM 8.6 and a verified plan for it"),
        ("8.9", {"8.6"}, True, True, "onnx", "no plan for SM 8.9 (plans: 8.6)"),
        (None, {"8.6"}, True, True, "onnx", "no GPU here (plans: 8.6)"),
        (None, set(), True, False, "onnx", "no GPU here (plans: none)"),
        (None, set(), False, True, "reference", "no GPU here (plans: none), and arcface_onnx has no weights"),
    ],
)
def test_auto_takes_the_best_that_is_there_and_says_why(gpu, plans, onnx, reference, backend, reason):
    choice = choose_backend("auto", gpu, good(plans), onnx, reference)
    assert (choice.backend, choice.reason) == (backend, reason)


@pytest.mark.parametrize(
    ("asked", "gpu", "plans", "message"),
    [
        ("tensorrt", None, {"8.6"}, "cannot serve tensorrt: no GPU here (plans: 8.6). Next: arcface plan build"),
        (
            "tensorrt",
            "12.0",
            {"8.6"},
            "cannot serve tensorrt: no plan for SM 12.0 (plans: 8.6). Next: arcface plan build",
        ),
        ("onnx", None, set(), "cannot serve onnx: arcface_onnx has no weights. Next: arcface import"),
        ("reference", None, set(), "cannot serve reference: arcface_reference has no weights, or insightface is not"),
        ("auto", None, set(), "no weights in the model repository. Next: arcface import demo"),
    ],
)
def test_what_is_not_there_is_refused_with_the_next_command(asked, gpu, plans, message):
    with pytest.raises(Missing) as caught:
        choose_backend(asked, gpu, good(plans), onnx=False, reference=False)
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == 3


BOTH = {"onnx", "reference"}


def test_a_backend_that_was_asked_for_is_never_replaced_by_a_better_one():
    assert choose_backend("reference", "8.6", good({"8.6"}), onnx=True, reference=True).backend == "reference"


@pytest.mark.parametrize(
    ("first", "chain", "enabled", "there", "order"),
    [
        ("tensorrt", ("onnx", "insightface"), True, BOTH, ["tensorrt", "onnx", "reference"]),
        ("tensorrt", ("onnx", "insightface"), True, {"onnx"}, ["tensorrt", "onnx"]),  # --no-reference
        ("tensorrt", ("onnx", "insightface"), True, {"reference"}, ["tensorrt", "reference"]),
        ("onnx", ("onnx", "insightface"), True, BOTH, ["onnx", "reference"]),
        ("onnx", ("triton",), True, BOTH, ["onnx"]),
        ("reference", ("onnx", "insightface"), True, BOTH, ["reference"]),
        ("tensorrt", ("onnx", "insightface"), False, BOTH, ["tensorrt"]),
    ],
)
def test_what_is_served_after_a_failed_validation_comes_from_the_configuration(first, chain, enabled, there, order):
    assert order_of_backends(first, Fallback(chain=chain, enabled=enabled), there) == order


def test_a_refused_plan_is_not_served_and_the_reason_is_said():
    plans = ServedPlans(frozenset({"9.0"}), {"8.6": "plan sm86.plan is corrupted"})
    choice = choose_backend("auto", "8.6", plans, onnx=True, reference=True)
    assert (choice.backend, choice.reason) == ("onnx", "plan sm86.plan is corrupted")
    with pytest.raises(PlanRefused, match=r"^cannot serve tensorrt: plan sm86\.plan is corrupted$"):
        choose_backend("tensorrt", "8.6", plans, onnx=True, reference=True)
    assert choose_backend("auto", "9.0", plans, onnx=True, reference=True).backend == "tensorrt"
