"""What a variant is fitted to and what judges it are different faces; `--verify` judges it on others yet."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from arcface_build.commands.quantize import command
from arcface_build.errors import ProofFailed
from arcface_build.repository.assemble import assemble
from arcface_build.variants import make
from arcface_build.variants.calibrate import clipped_shares, conv_inputs
from arcface_build.variants.candidates import candidates
from arcface_build.variants.choose import VariantChoice
from arcface_build.variants.eval_set import FaceSet
from arcface_build.variants.gate import judge_variant
from arcface_build.variants.held_back import MIN_PEOPLE, likeness, part, without
from arcface_build.variants.make import Wish, load_named, make_variant
from arcface_build.variants.search import Attempt, SearchResult
from arcface_build.variants.sidecar import retired_since
from arcface_clients.engines import EngineRegistry
from arcface_clients.engines.runtimes import RUNTIMES
from arcface_clients.errors import Missing, ModelMissing, WrongUse
from arcface_clients.evidence.gate import judge_sidecar
from arcface_clients.faces.synthetic import synthetic_people
from conftest import copy_repository

ROUNDED = "onnxruntime with float16 rounding"  # where an int8 variant for TensorRT is judged


def people(count: int, views: int = 4, known: bool = True, origin: str = "crops", seed: int = 5) -> FaceSet:
    faces = synthetic_people(count, views, seed=seed).reshape(-1, 112, 112, 3)
    who = np.repeat(np.arange(count), views) if known else None
    return FaceSet(origin, faces, [str(i) for i in range(len(faces))], who)


def pixels(faces: FaceSet) -> set[bytes]:
    return {face.tobytes() for face in faces.faces}


def test_nobody_is_both_searched_on_and_judged_by():
    parts = part(people(12), 100)
    assert not set(parts.searched.identities) & set(parts.held_back.identities)
    assert (len(parts.searched.faces), len(parts.held_back.faces)) == (24, 24)
    assert parts.how == "by person: nobody is in both parts"


@pytest.mark.parametrize(("count", "known"), [(MIN_PEOPLE - 1, True), (12, False)])
def test_without_people_enough_single_faces_are_held_back(count, known):
    parts = part(people(count, known=known), 100)
    assert not pixels(parts.searched) & pixels(parts.held_back)
    assert abs(len(parts.searched.faces) - len(parts.held_back.faces)) <= 1
    assert parts.how.startswith("by face")
    if known:
        assert set(parts.searched.identities) == set(parts.held_back.identities)


def test_who_is_held_back_does_not_depend_on_how_many_faces_are_drawn():
    few, all_of_them = part(people(12), 10), part(people(12), 1000)
    assert len(few.searched.faces) + len(few.held_back.faces) == 10
    assert pixels(few.searched) <= pixels(all_of_them.searched)
    assert pixels(few.held_back) <= pixels(all_of_them.held_back)


def test_a_crop_that_is_there_twice_is_not_on_both_sides():
    once = people(6, known=False)
    twice = FaceSet("crops", np.concatenate([once.faces, once.faces]), once.names * 2, None)
    parts = part(twice, 1000)
    assert not pixels(parts.searched) & pixels(parts.held_back)


def test_faces_that_are_all_fitted_to_leave_nothing_to_judge_by():
    with pytest.raises(WrongUse, match=r"no face of crops is left to judge on.*--eval FOLDER"):
        without(people(2), people(2))


@pytest.mark.parametrize(
    ("fitted", "judged", "said"),
    [
        (people(3, origin="a"), people(3, origin="a"), "fitted to and judged on faces from one source (a)"),
        (people(3, origin="synthetic"), people(3, origin="synthetic"), "judged on synthetic faces"),
        (
            None,
            FaceSet("b", np.full((4, 112, 112, 3), 90, np.uint8), list("abcd"), None),
            "the faces have uniform lighting",
        ),
    ],
)
def test_faces_that_are_alike_are_warned_of_in_words(fitted, judged, said):
    warnings = likeness("mymodel", fitted, judged)
    assert any(warning.startswith(said) for warning in warnings)
    assert all("arcface quantize mymodel --verify FACES" in warning for warning in warnings)


def test_ranges_that_cut_off_what_the_judging_faces_need_are_refused():
    faces = people(2)
    rows = np.eye(8)
    verdict = judge_variant("onnxruntime", "int8", {"int8": 0.01}, rows, rows, faces)
    assert verdict.passed
    cut = replace(verdict, clipped={"a": 0.0001, "b": 0.02})
    assert cut.why.startswith("ranges cut off more than 0.10% of the values of 1 of 2 tensors (2.00% of b)")
    assert cut.to_json()["clipped"]["worst"] == 0.02


# What follows works on the mobile demo network.


@pytest.fixture(scope="module")
def model_dir(demo_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (imported,) = (p.parent for p in (demo_repository.parent / "models").glob("*/manifest.json"))
    return Path(shutil.copytree(imported, tmp_path_factory.mktemp("models") / "demo"))


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Wish:
    """int8 without a search, on 48 strangers, at a limit that anything passes."""
    file = tmp_path_factory.mktemp("faces") / "strangers.npz"
    np.savez(file, faces=people(12, seed=6).faces)
    return Wish("int8", target="tensorrt", eval_source=str(file), limits={"int8": 0.5}, search=False)


@pytest.fixture(scope="module")
def made(model_dir: Path, loose: Wish) -> dict:
    return make_variant(model_dir, loose)[0]


@pytest.fixture
def variant(model_dir: Path, made: dict, tmp_path: Path) -> Path:
    """A model folder with an int8 variant, to be changed by one test."""
    return Path(shutil.copytree(model_dir, tmp_path / "demo"))


def others(folder: Path) -> str:
    faces = people(6)
    np.savez(folder / "others.npz", faces=faces.faces)
    return str(folder / "others.npz")


def verify(model_dir: Path, faces: str, *options: str):
    arguments = [model_dir.name, "--precision", "int8", "--target", "tensorrt", "--models-dir", str(model_dir.parent)]
    return CliRunner().invoke(command, [*arguments, "--verify", faces, *options], standalone_mode=False)


def test_share_of_clipped_values_is_what_lies_outside_the_range(model_dir):
    serving = load_named(model_dir / "serving.onnx")
    name = conv_inputs(serving)[3]
    faces = people(2).faces
    assert clipped_shares(serving, {name: (-1e9, 1e9)}, faces) == {name: 0.0}
    assert clipped_shares(serving, {name: (1e9, 2e9)}, faces) == {name: 1.0}


def test_the_sidecar_tells_the_drift_on_both_parts_and_what_was_cut_off(made):
    (gate,) = made["gates"]
    assert gate["judged_on"] == "held back"
    assert (gate["drift"]["faces"], gate["searched"]["faces"]) == (24, 24)
    assert gate["searched"]["max_drift"] != gate["drift"]["max_drift"]
    assert gate["searched"]["limit"] == 0.25  # half of what is allowed
    assert 0 <= gate["clipped"]["worst"] <= gate["clipped"]["limit"]
    assert made["eval"]["sha256"] != made["searched"]["sha256"]
    assert made["warnings"][0].startswith("fitted to and judged on faces from one source (strangers.npz)")


def test_the_search_aims_at_half_of_the_limit(variant, loose):
    sidecar, _ = make_variant(variant, replace(loose, limits={"int8": 0.06}, search=True))
    (gate,) = sidecar["gates"]
    assert gate["searched"]["limit"] == 0.03
    assert gate["searched"]["max_drift"] <= 0.03
    assert [a["passed"] for a in sidecar["recipe"]["search"]["attempts"] if a["max_drift"] > 0.03] != []


def test_a_search_that_cannot_reach_its_aim_says_how_near_it_got(variant, loose, monkeypatch):
    nothing = SearchResult(None, (), (Attempt(50, 0.0, 0.004, 0.001, False), Attempt(1, 0.0, 0.1, 0.05, False)))
    monkeypatch.setattr(make, "smallest_passing_set", lambda *_: nothing)
    with pytest.raises(ProofFailed) as refused:
        make_variant(variant, replace(loose, limits={"int8": 0.006}, search=True))
    said = "drift 0.003 on the faces of the search (least: 0.004, 50 layers kept). Nothing was written."
    assert said in str(refused.value)


def test_a_variant_that_passes_on_other_faces_stays_and_its_sidecar_says_so(variant, tmp_path):
    done = verify(variant, others(tmp_path), "--max-drift", "0.5")
    assert done.exception is None, done.exception
    sidecar = json.loads((variant / "variants" / "int8-tensorrt.json").read_text())
    assert sidecar["verified"][0]["origin"] == "others.npz"
    assert sidecar["verified"][0]["gates"][0]["passed"] is True
    assert sidecar["gates"][0]["drift"]["max_drift"] >= sidecar["verified"][0]["gates"][0]["drift"]["max_drift"]


def test_a_variant_that_fails_on_other_faces_is_set_aside_and_no_door_serves_it(variant, tmp_path):
    before = json.loads((variant / "variants" / "int8-tensorrt.json").read_text())
    done = verify(variant, others(tmp_path), "--max-drift", "1e-6")
    assert isinstance(done.exception, ProofFailed)
    assert done.exception.exit_code == 1
    assert "fails in onnxruntime with float16 rounding on 24 faces of others.npz: drift" in str(done.exception)
    names = {p.name for p in (variant / "variants").glob("int8-tensorrt*")}
    assert names == {"int8-tensorrt.onnx.refused", "int8-tensorrt.json.refused"}
    refused = json.loads((variant / "variants" / "int8-tensorrt.json.refused").read_text())
    assert refused["passed"] is False
    assert not judge_sidecar(refused)[ROUNDED].passed
    with pytest.raises(ProofFailed, match="has not passed its gate: drift"):
        assemble(variant, copy_repository(tmp_path), VariantChoice(before["file"], "int8", ROUNDED, "", refused))
    with pytest.raises(Missing, match="no int8-tensorrt variant of demo-mobile: its gate refused it"):
        raise verify(variant, others(tmp_path)).exception


def test_weights_that_were_retired_are_refused_when_they_are_made_again_and_are_not_forgotten(variant, loose, tmp_path):
    assert isinstance(verify(variant, others(tmp_path), "--max-drift", "1e-6").exception, ProofFailed)
    refused = variant / "variants" / "int8-tensorrt.json.refused"
    told = json.loads(refused.read_text())
    (retired,) = told["retired"]
    assert retired["sha256"] == told["sha256"] and retired["faces"] == "24 faces of others.npz"
    assert 0 < retired["max_drift"] < 0.5
    refused.write_text(json.dumps({**told, "retired": [{**retired, "max_drift": 0.6}]}))  # as on harder faces
    before = refused.read_bytes()
    with pytest.raises(ProofFailed, match=r"of demo-mobile that were retired before: they fail in onnxruntime with"):
        make_variant(variant, loose)
    assert refused.read_bytes() == before and not refused.with_suffix("").exists()
    layers = [node.name for node in load_named(variant / "serving.onnx").graph.node if node.op_type == "Conv"]
    sidecar, _ = make_variant(variant, replace(loose, keep=tuple(layers[5:10])))
    assert sidecar["passed"] and sidecar["sha256"] != told["sha256"] and sidecar["retired"][0]["max_drift"] == 0.6
    assert "24 faces of others.npz" in retired_since(variant, told) and not retired_since(variant, sidecar)
    sidecar, _ = make_variant(variant, replace(loose, limits={"int8": 0.7}))  # more drift is allowed by now
    assert sidecar["sha256"] == told["sha256"] and not retired_since(variant, sidecar)


def test_a_variant_cannot_be_verified_by_the_faces_that_it_was_fitted_to(variant, tmp_path):
    path = variant / "variants" / "int8-tensorrt.json"
    sidecar = json.loads(path.read_text())
    faces = people(6)
    sidecar["searched"] = faces.to_json()
    path.write_text(json.dumps(sidecar))
    done = verify(variant, others(tmp_path))
    assert isinstance(done.exception, WrongUse)
    assert "contains the faces that the variant was fitted to: they prove nothing" in str(done.exception)


def test_fitted_faces_are_known_in_any_order_and_count_for_nothing_among_others(variant, made, tmp_path):
    assert len(set(made["searched"]["each"])) == made["searched"]["faces"]
    assert made["recipe"]["calibration"]["each"]
    path = variant / "variants" / "int8-tensorrt.json"
    sidecar, faces = json.loads(path.read_text()), people(6)
    sidecar["searched"] = {**faces.to_json(), "each": faces.each}
    path.write_text(json.dumps(sidecar))
    backwards, mixed = tmp_path / "backwards.npz", tmp_path / "mixed.npz"
    np.savez(backwards, faces=faces.faces[::-1])
    done = verify(variant, str(backwards), "--max-drift", "0.5")
    assert isinstance(done.exception, WrongUse), done.exception
    np.savez(mixed, faces=np.concatenate([faces.faces, people(2, seed=77).faces]))
    assert verify(variant, str(mixed), "--max-drift", "0.5").exception is None
    assert json.loads(path.read_text())["verified"][0]["faces"] == 8


def test_an_older_sidecar_is_read_but_not_served_until_it_is_verified(variant, tmp_path):
    path = variant / "variants" / "int8-tensorrt.json"
    sidecar = json.loads(path.read_text())
    for key in ("searched", "margin", "warnings"):
        del sidecar[key]
    for key in ("judged_on", "searched", "clipped", "why"):
        del sidecar["gates"][0][key]
    path.write_text(json.dumps(sidecar))
    assert judge_sidecar(sidecar)[ROUNDED].why.startswith("it was judged on the faces it was fitted to")
    assert verify(variant, others(tmp_path), "--max-drift", "0.5").exception is None
    assert judge_sidecar(json.loads(path.read_text()))[ROUNDED].passed


def test_bf16_that_is_set_aside_is_not_run_by_an_engine_in_this_process(variant):
    for old in (variant / "variants").glob("bf16-cpu.json*"):
        old.unlink()
    (variant / "variants" / "bf16-cpu.json.refused").write_text("{}")
    with pytest.raises(ModelMissing, match="the gate refused"):
        EngineRegistry.get("onnx", models_dir=variant.parent, model="demo", precision="bf16").ensure_ready()
    assert "bf16" not in {one.precision for one in candidates(variant, None, RUNTIMES)[0]}
