"""The bench of safe serving, in small: its contestants differ in what it says they differ in."""

from __future__ import annotations

import pytest

from arcface_tools.served import BARE, BOUNDED, SAFE, SETUPS, copy_for, run


def test_both_ways_of_serving_are_measured_in_turns_with_their_ratio(triton_binary, demo_repository) -> None:
    result = run(demo_repository, batches=(1, 2), rounds=1, sample_s=0.05)
    assert [row["name"] for row in result["variants"]] == [f"{n} b{b}" for n in (BARE, SAFE, BOUNDED) for b in (1, 2)]
    pairs = [(row["variant"], row["base"]) for row in result["ratios"]]
    assert pairs == [(f"{name} b{batch}", f"without b{batch}") for batch in (1, 2) for name in (SAFE, BOUNDED)]
    assert all(row["median"] > 0 for row in result["ratios"])


@pytest.mark.parametrize("name", SETUPS)
def test_a_contestant_has_what_it_is_called_after(demo_repository, tmp_path, name) -> None:
    setup = SETUPS[name]
    copy_for(setup, demo_repository, tmp_path / "copy")
    leaf = (tmp_path / "copy" / "arcface_onnx" / "configs" / "onnx.pbtxt").read_text()
    ensemble = (tmp_path / "copy" / "arcface" / "configs" / "onnx.pbtxt").read_text()
    assert ("max_queue_size" in leaf) == setup.policy
    assert ensemble.count('"contract"') == (3 if setup.outputs else 0)
    assert ('name: "contract"' in leaf) == setup.outputs
    assert ensemble.count("embedding") == 3
