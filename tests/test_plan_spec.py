"""The rules for SM, version, sizes, keys and file names, as tables; most cases are refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arcface_build.plans.gpu import find_gpus, load_gpus_yaml, parse_gpus
from arcface_clients.errors import Missing, WrongUse
from arcface_clients.plans.fit import misfit
from arcface_clients.plans.manifest import PlanManifest
from arcface_clients.plans.spec import BuilderOptions, PlanSpec, parse_bytes, parse_sm, parse_version, sm_tag
from plan_samples import SPEC, spec

REPO = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("text", "sm"),
    [("8.6", "8.6"), ("86", "8.6"), ("sm86", "8.6"), ("SM_86", "8.6"), ("sm 8.6", "8.6"), (8.6, "8.6"),
     (" 9.0 ", "9.0"), ("120", "12.0"), ("12.0", "12.0"), ("sm100", "10.0"), ("10.3", "10.3"), ("75", "7.5")],
)  # fmt: skip
def test_an_sm_is_read_in_every_usual_spelling(text: object, sm: str) -> None:
    assert parse_sm(text) == sm
    assert parse_sm(sm_tag(sm)) == sm


@pytest.mark.parametrize(
    "text",
    ["", "8", "86x", "8.61", "8,6", "sm", "sm8", "-8.6", "0.0", "00", "4.9", "99.9", "8.6.0", "auto", "ampere", None],
)
def test_what_is_no_compute_capability_is_refused(text: object) -> None:
    with pytest.raises(WrongUse, match=r"expected a compute capability such as 8\.6, 86 or sm86"):
        parse_sm(text)


@pytest.mark.parametrize(
    ("text", "version"), [("8.6.0", (8, 6, 0)), ("10.13.3.9", (10, 13, 3, 9)), ("11.0.0.post1", (11, 0, 0))]
)
def test_a_tensorrt_version_is_read(text: str, version: tuple[int, ...]) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["", "8", "8.5.3", "7.2", "ten", "v10.3", None])
def test_a_version_that_is_too_old_or_none_is_refused(text: str) -> None:
    with pytest.raises(WrongUse, match=r"expected 8\.6 or newer"):
        parse_version(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 << 30),
        ("2048MB", 2 << 30),
        ("2048 mib", 2 << 30),
        ("1.5GB", 3 << 29),
        ("1048576", 1 << 20),
        (1 << 30, 1 << 30),
    ],
)
def test_a_workspace_is_read_in_gb_and_in_mb(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2TB", "-1GB", "0", "0MB", "2 G B", "two", "1e9", "nan"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(WrongUse, match="expected a number with a unit, such as 2GB or 2048MB"):
        parse_bytes(text)


def test_the_file_name_tells_model_precision_and_sm() -> None:
    assert SPEC.file_name == "tiny-fp16-sm86.plan"
    assert spec(model="buffalo_l", precision="int8", sm="120").file_name == "buffalo_l-int8-sm120.plan"


@pytest.mark.parametrize(
    "change",
    [{"onnx_sha256": "cd" * 32}, {"precision": "fp32"}, {"sm": "8.9"}, {"tensorrt": "10.3.1"}, {"min_batch": 2},
     {"opt_batch": 16}, {"max_batch": 128}, {"options": BuilderOptions(workspace_bytes=2 << 30)},
     {"options": BuilderOptions(external_tactics=False)}, {"options": BuilderOptions(hardware_compatible=True)},
     {"options": BuilderOptions(tf32=True)}, {"options": BuilderOptions(optimization_level=5)}],
)  # fmt: skip
def test_each_part_changes_the_key(change: dict[str, object]) -> None:
    assert spec(**change).key != SPEC.key


def test_the_name_of_the_model_and_the_spelling_of_the_sm_do_not_change_the_key() -> None:
    assert spec(model="other", sm="sm_86").key == SPEC.key


def test_a_spec_survives_json() -> None:
    built = spec(options=BuilderOptions(workspace_bytes=3 << 30, optimization_level=4))
    assert PlanSpec.from_json(built.to_json()) == built


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model": "../x"}, "model name"), ({"model": ""}, "model name"), ({"onnx_sha256": "abc"}, "64 hexadecimal"),
     ({"precision": "fp8"}, "expected one of fp32, fp16, bf16, int8"), ({"sm": "ampere"}, "compute capability"),
     ({"tensorrt": "8.4"}, "8.6 or newer"), ({"min_batch": 0}, "1 ≤ min ≤ opt ≤ max"),
     ({"opt_batch": 65}, "1 ≤ min ≤ opt ≤ max"), ({"max_batch": 8}, "1 ≤ min ≤ opt ≤ max")],
)  # fmt: skip
def test_a_spec_that_cannot_be_built_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(WrongUse, match=message):
        spec(**change)


@pytest.mark.parametrize(
    "wrong",
    [{"workspace_bytes": 2}, {"optimization_level": 6}, {"hardware_compatible": True, "same_compute_capability": True}],
)
def test_options_that_no_builder_takes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(WrongUse, match=r"expected (at least 1 MB|0\.\.5)|leave one out"):
        BuilderOptions(**wrong)


def test_the_card_is_in_the_key_and_a_plan_for_all_cards_needs_tensorrt_10_9() -> None:
    assert len({spec(gpu=name).key for name in (None, "NVIDIA A10", "NVIDIA A40")}) == 3
    every_card = BuilderOptions(same_compute_capability=True)
    assert PlanSpec.from_json(json.loads(json.dumps(spec(gpu="NVIDIA A10").to_json()))) == spec(gpu="NVIDIA A10")
    assert spec(options=every_card, tensorrt="10.9.0").key != spec(tensorrt="10.9.0").key
    with pytest.raises(WrongUse, match=r"TensorRT 10\.8\.0 tunes a plan for one card only: expected 10\.9"):
        spec(options=every_card, tensorrt="10.8.0")


def test_keys_from_before_cards_were_in_them_stay_what_they_were() -> None:
    assert SPEC.key == "9363ac3dd29e834490955cc0a6857214eba9f51a58a997baefe98bbf0e438c29"


def test_json_that_is_no_spec_is_refused() -> None:
    with pytest.raises(WrongUse, match="not a plan spec"):
        PlanSpec.from_json({**SPEC.to_json(), "colour": "red"})


def manifest(**changes: object) -> PlanManifest:
    return PlanManifest(spec=spec(**changes), sha256="0" * 64, size_bytes=1, contract_id="c" * 64)


HARDWARE = {"options": BuilderOptions(hardware_compatible=True)}


@pytest.mark.parametrize(
    ("built", "sm", "tensorrt", "wanted", "why"),
    [({}, "8.6", "10.3.0", {}, None),
     ({}, "sm86", "10.3.0.26+cuda12", {"precision": "fp16", "model": "tiny", "contract_id": "c" * 64}, None),
     ({}, None, None, {}, None),
     ({}, "8.6", None, {}, None),
     ({}, "8.9", "10.3.0", {}, "built for SM 8.6, this GPU is SM 8.9"),
     ({}, "8.0", None, {}, "built for SM 8.6, this GPU is SM 8.0"),
     ({}, "8.6", "10.3.1", {}, "built with TensorRT 10.3.0, this host has 10.3.1"),
     ({}, "8.6", "11.0.0", {}, "built with TensorRT 10.3.0, this host has 11.0.0"),
     ({}, "8.6", "8.6.1", {}, "built with TensorRT 10.3.0, this host has 8.6.1"),
     ({"precision": "int8"}, "8.6", "10.3.0", {"precision": "fp32"}, "of precision int8, expected fp32"),
     ({}, "8.6", "10.3.0", {"precision": "fp32"}, "of precision fp16, expected fp32"),
     ({}, "8.6", "10.3.0", {"model": "r50"}, "a plan of tiny, expected r50"),
     ({}, "8.6", "10.3.0", {"contract_id": "d" * 64}, "of contract cccccccccccc…, expected dddddddddddd…"),
     (HARDWARE, "12.0", "10.3.0", {}, None),
     (HARDWARE, "8.0", "10.3.0", {}, None),
     (HARDWARE, "7.5", "10.3.0", {},
      "hardware-compatible from SM 8.0 on, built for SM 8.6, this GPU is SM 7.5"),
     ({**HARDWARE, "sm": "7.5"}, "8.6", "10.3.0", {},
      "hardware-compatible from SM 8.0 on, built for SM 7.5, this GPU is SM 8.6"),
     (HARDWARE, "8.9", "10.4.0", {}, "built with TensorRT 10.3.0, this host has 10.4.0"),
     (HARDWARE, "8.9", "10.3.0", {"precision": "fp32"}, "of precision fp16, expected fp32")],
)  # fmt: skip
def test_which_plan_fits(built: dict, sm: str | None, tensorrt: str | None, wanted: dict, why: str | None) -> None:
    assert misfit(manifest(**built), sm, tensorrt, **wanted) == why


def test_nvidia_smi_is_read() -> None:
    banner = "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: 12.4     |"
    csv = "0, NVIDIA A10, 8.6, 550.54.15, 23028, 312\n1, NVIDIA H200, 9.0, 550.54.15, 143771, [N/A]\n"
    a10, h200 = parse_gpus(csv, banner)
    assert (a10.name, a10.sm, a10.cuda, a10.memory_bytes) == ("NVIDIA A10", "8.6", "12.4", 23028 << 20)
    assert (h200.index, h200.sm, h200.memory_used_bytes) == (1, "9.0", 0)


def test_a_host_without_a_gpu_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Missing, match="nvidia-smi is not installed"):
        find_gpus()
    broken = tmp_path / "nvidia-smi"
    broken.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not talk to the driver'; exit 9\n")
    broken.chmod(0o755)
    with pytest.raises(Missing, match="NVIDIA-SMI has failed"):
        find_gpus()


def test_the_shipped_gpu_table_is_read_and_a_wrong_one_named(tmp_path: Path) -> None:
    table = load_gpus_yaml(REPO / "config" / "gpus.yaml")
    assert "A100" in table["8.0"].cards
    assert table["9.0"].architecture == "Hopper"
    wrong = tmp_path / "gpus.yaml"
    wrong.write_text('sms: { "8.6": { architecture: Ampere, cards: [], plans: [fp8] } }')
    with pytest.raises(WrongUse, match="expected some of fp32, fp16, bf16, int8"):
        load_gpus_yaml(wrong)
    wrong.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WrongUse, match="is not YAML"):
        load_gpus_yaml(wrong)
    wrong.write_text("[]")
    with pytest.raises(WrongUse, match="expected the form"):
        load_gpus_yaml(wrong)


def test_a_plan_set_is_in_the_key_and_its_widest_profile_comes_first() -> None:
    tuned = spec(tuned_batches=(8, 1))
    assert tuned.key != SPEC.key
    assert tuned.profiles == [(1, 32, 64), (1, 8, 8), (1, 1, 1)]
    assert PlanSpec.from_json(json.loads(json.dumps(tuned.to_json()))) == tuned
    assert "tuned_batches" not in SPEC.to_json() and SPEC.profiles == [(1, 32, 64)]


@pytest.mark.parametrize("sizes", [(1, 8), (8, 8), (32,), (65,), (0,), (True,), ("8",), (8, 32, 1)])
def test_batches_that_no_plan_set_can_have_are_refused(sizes: tuple[object, ...]) -> None:
    with pytest.raises(WrongUse, match=r"expected different ones from 1 to 64, the largest first, without 32"):
        spec(tuned_batches=sizes)
