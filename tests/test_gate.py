"""One gate, many doors: whatever makes, installs or loads an artefact refuses the same candidates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from arcface_build.errors import ProofFailed
from arcface_build.graph.tensorrt_form import UNTOUCHED
from arcface_build.imports.proof import prove
from arcface_build.plans import build as plan_build
from arcface_build.plans.source import find_source
from arcface_build.repository.assemble import assemble, assemble_plans
from arcface_build.repository.versions import served_manifest
from arcface_build.serving.server_runtimes import ServerRuntimes
from arcface_build.serving.variant import check_installed, take_best_variant
from arcface_build.variants import choose as choosing
from arcface_build.variants.candidates import Candidate
from arcface_build.variants.choose import VariantChoice, choose
from arcface_build.variants.eval_set import FaceSet
from arcface_build.variants.gate import judge_variant
from arcface_build.variants.make import Wish, make_variant
from arcface_build.variants.speeds import Speed, SpeedTable
from arcface_build.variants.verify import verify_variant
from arcface_clients.checks import parity
from arcface_clients.contract import Preprocessing, contract_id
from arcface_clients.engines import EngineRegistry
from arcface_clients.engines.validation import StoredReference, validate_engine
from arcface_clients.errors import ConfigError, ContractMismatch, GateFailed, InferenceFailed, Missing, PlanRefused
from arcface_clients.evidence.drift import compare_embeddings
from arcface_clients.evidence.gate import judge_embeddings, judge_record, judge_sidecar, run_embedding_regression_tests
from arcface_clients.plans.manifest import file_sha256, manifest_bytes, manifest_path
from conftest import copy_repository
from plan_samples import spec, write_plan
from tiny_model import write_manifest, write_model

LIMIT = 0.01
LIMITS = dict.fromkeys(("fp32", "fp16", "bf16", "int8"), LIMIT)
DIM = 8
FACES = np.broadcast_to(np.arange(0, 80, 20, dtype=np.uint8)[:, None, None, None], (4, 112, 112, 3)).copy()
REFERENCE = np.eye(4, DIM, dtype=np.float32)


def drifted(drift: float) -> np.ndarray:
    """The reference, face 2 at this drift."""
    candidate = REFERENCE.copy()
    candidate[2, 2], candidate[2, 7] = 1 - drift, np.sqrt(1 - (1 - drift) ** 2)
    return candidate


def with_row(value: float) -> np.ndarray:
    candidate = REFERENCE.copy()
    candidate[1] = value
    return candidate


CANDIDATES = {
    "just inside": (drifted(0.0099), True),
    "just outside": (drifted(0.0101), False),
    "NaN": (with_row(np.nan), False),
    "a zero row": (with_row(0.0), False),
    "a row that is not of unit length": (1.01 * REFERENCE, False),
    "another width": (np.eye(4, DIM + 1, dtype=np.float32), False),
}


def table_model(path: Path, rows: np.ndarray) -> Path:
    """A serving ONNX that answers row i for a face of grey value 20 · i."""
    tensors = {"table": rows.astype(np.float32), "step": np.float32(20), "low": np.int64(0), "high": np.int64(3)}
    nodes = [
        helper.make_node("Cast", ["face"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["grey"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Div", ["grey", "step"], ["number"]),
        helper.make_node("Round", ["number"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["any"], to=TensorProto.INT64),
        helper.make_node("Clip", ["any", "low", "high"], ["row"]),
        helper.make_node("Gather", ["table", "row"], ["embedding"]),
    ]
    ends = [
        [helper.make_tensor_value_info("face", TensorProto.UINT8, ["N", 112, 112, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", rows.shape[1]])],
    ]
    graph = helper.make_graph(nodes, "t", *ends, [numpy_helper.from_array(np.array(v), k) for k, v in tensors.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def at_import(folder: Path, candidate: np.ndarray, monkeypatch) -> None:
    reference = SimpleNamespace(name="InsightFace", why="")
    prove(table_model(folder / "serving.onnx", candidate), FACES, 7 * REFERENCE, reference, "synthetic", limits=LIMITS)


def in_a_regression_test(folder: Path, candidate: np.ndarray, monkeypatch) -> None:
    run_embedding_regression_tests(FACES, REFERENCE, candidate, LIMIT)


def at_startup(folder: Path, candidate: np.ndarray, monkeypatch) -> None:
    file = table_model(folder / "serving.onnx", candidate)
    write_manifest(folder, "0" * 64, Preprocessing(), DIM)
    contract = contract_id("0" * 64, Preprocessing(), DIM)
    engine = EngineRegistry.get("onnx", file=file, device="cpu", threads=1)
    validate_engine(engine, StoredReference(FACES, REFERENCE, contract, "a file"), "int8", LIMITS, "onnx")


def in_quantize(folder: Path, candidate: np.ndarray, monkeypatch) -> None:
    faces = FaceSet("t", FACES, list("abcd"), np.array(list("xxyy")))
    verdict = judge_variant("onnxruntime", "int8", LIMITS, REFERENCE, candidate, faces)
    if not verdict.passed:
        raise ProofFailed(verdict.why)


def at_plan_build(folder: Path, candidate: np.ndarray, monkeypatch) -> None:
    def child(scratch: Path, timeout_s: float, on_phase: object) -> None:
        (scratch / "plan").write_bytes(b"plan")
        (scratch / "result.json").write_text(
            json.dumps({"tensorrt": "10.3.0", "seconds": 1.0, "memory": {"loaded_bytes": 1, "context_bytes": [1]}})
        )
        (scratch / "inspector.json").write_text("{}")
        np.save(scratch / "embeddings.npy", candidate[None])  # of one profile

    gpu = SimpleNamespace(index=0, name="A10", driver="1", cuda="12", memory_bytes=1, memory_used_bytes=0)
    counts = plan_build.PrecisionProof({"int8": 1}, {}, 0)
    for name, stub in {
        "_run_child": child,
        "find_gpus": lambda: [gpu],
        "check_buildable": lambda *_: None,
        "count_precisions": lambda text: counts,
        "check_precision": lambda *_: None,
    }.items():
        monkeypatch.setattr(plan_build, name, stub)
    typed = SimpleNamespace(path=folder / "x.onnx", layers={"int8": 1}, dim=DIM, sha256="ab" * 32, form=UNTOUCHED)
    proof = plan_build.PlanProof(FACES, REFERENCE, LIMITS)
    plan_build.build_plan(typed, spec(precision="int8"), folder / "out" / "x.plan", proof)


def record_of(candidate: np.ndarray) -> dict | None:
    """What a build would have written into a manifest or a sidecar."""
    return compare_embeddings(REFERENCE, candidate).to_json() if candidate.shape == REFERENCE.shape else None


def at_assembly_of_a_plan(folder: Path, candidate: np.ndarray, monkeypatch) -> None:
    model_dir = write_model(folder / "models" / "tiny")
    contract = json.loads((model_dir / "manifest.json").read_text())["contract_id"]
    of = spec(precision="int8")
    manifest = replace(write_plan(folder / of.file_name, of), contract_id=contract, drift=record_of(candidate))
    manifest_path(folder / of.file_name).write_bytes(manifest_bytes(manifest))
    assemble_plans(model_dir, [folder / of.file_name], copy_repository(folder), limits=LIMITS)


def at_assembly_of_a_variant(folder: Path, candidate: np.ndarray, monkeypatch) -> None:
    model_dir = write_model(folder / "models" / "tiny")
    gate = {"runtime": "onnxruntime", "passed": True, "limit": 2.0, "judged_on": "held back"}
    gate["drift"] = record_of(candidate)
    sidecar = {"precision": "int8", "passed": True, "gates": [gate]}
    choice = VariantChoice("serving.onnx", "int8", "onnxruntime", "", sidecar)
    assemble(model_dir, copy_repository(folder), choice, limits=LIMITS)


def in_parity(folder: Path, candidate: np.ndarray, monkeypatch) -> None:
    monkeypatch.setattr(parity, "TritonEmbedder", served({"arcface_reference": REFERENCE, "arcface_onnx": candidate}))
    parity.measure_parity("here", FACES, ["arcface_reference", "arcface_onnx"], limits=LIMITS).require()


def served(models: dict[str, np.ndarray]):
    """A TritonEmbedder that answers these rows, and refuses NaN as the real one does."""

    class Embedder:
        contract_prefix = "c" * 32

        def __init__(self, url, model, **_):
            self.model = model

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def ensure_ready(self):
            return SimpleNamespace(
                contract_id="c" * 64, precision="fp32", leaf=self.model, backend="onnxruntime", demo=False
            )

        def encode(self, faces):
            if np.isnan(models[self.model]).any():
                raise InferenceFailed("1 of 4 embeddings are not of unit length")
            return models[self.model][: len(faces)]

    return Embedder


DOORS = [
    at_import,
    in_a_regression_test,
    at_startup,
    in_quantize,
    at_plan_build,
    at_assembly_of_a_plan,
    at_assembly_of_a_variant,
    in_parity,
]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_every_door_lets_the_same_candidates_in(door, candidate, tmp_path, monkeypatch):
    rows, passes = CANDIDATES[candidate]
    if passes:
        door(tmp_path, rows, monkeypatch)
    else:
        with pytest.raises((GateFailed, ProofFailed, PlanRefused, ContractMismatch)):
            door(tmp_path, rows, monkeypatch)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (drifted(0.02), "drift 0.02, 2.0 × the limit 0.01 for int8, on 1 of 4 faces; worst: c.jpg (0.02)"),
        (with_row(0.0), "1 of 4 embeddings are zero or contain NaN; drift 1, 100.0 × the limit 0.01"),
        (1.01 * REFERENCE, "embeddings of length 1.01 to 1.01, expected 1"),
        (REFERENCE[:3], "it gives float32 (3, 8) for 4 faces, expected floats (4, 8)"),
        (REFERENCE.astype(object), "it gives object (4, 8) for 4 faces, expected floats (4, 8)"),
    ],
)
def test_a_refusal_says_what_is_wrong_and_where(rows, why):
    verdict = judge_embeddings(REFERENCE, rows, "int8", LIMITS, [f"{name}.jpg" for name in "abcd"])
    assert verdict.why.startswith(why)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (None, "its drift was never measured"),
        ({}, "its record states a drift of None, expected a number"),
        ({"max_drift": float("nan")}, "its record states a drift of nan, expected a number"),
        ({"max_drift": "0.001"}, "its record states a drift of 0.001, expected a number"),
        ({"max_drift": True}, "its record states a drift of True, expected a number"),
        ({"max_drift": -0.5}, "its record states a drift of -0.5, expected a number"),
        ({"max_drift": 0.02}, "drift 0.02, 2.0 × the limit 0.01 for int8"),
        ({"max_drift": 0.001, "bad_rows": 2}, "2 of its embeddings are zero or contain NaN"),
        ({"max_drift": 0.001, "faces": 0}, "its record states 0 faces, expected at least one"),
        ({"max_drift": 0.001, "faces": True}, "its record states True faces, expected at least one"),
        ({"max_drift": 0.001, "norms": None}, "its record states lengths of None, expected numbers"),
        (
            {"max_drift": 0.001, "norms": {"candidate": {"min": float("nan"), "max": 1}}},
            "its record states lengths of {'candidate': {'min': nan, 'max': 1}}, expected numbers",
        ),
        ({"max_drift": 0.001}, ""),
        ({"max_drift": -1e-16}, ""),
    ],
)
def test_what_a_record_does_not_say_counts_against_it(record, why):
    assert judge_record(record, "int8", LIMITS).why == why


def test_a_precision_without_a_limit_is_named():
    with pytest.raises(ConfigError, match="no drift limit for precision 'int4': expected one of fp32, fp16"):
        judge_embeddings(REFERENCE, REFERENCE, "int4", LIMITS)


def test_a_stricter_limit_in_the_configuration_acts_in_parity(monkeypatch):
    monkeypatch.setattr(parity, "TritonEmbedder", served({"arcface_reference": REFERENCE, "arcface": drifted(5e-6)}))
    assert parity.measure_parity("here", FACES, ["arcface_reference", "arcface"]).passed
    monkeypatch.setenv("ARCFACE_COMPARISON__MAX_DRIFT__FP32", "1e-6")
    assert not parity.measure_parity("here", FACES, ["arcface_reference", "arcface"]).passed


def test_a_stricter_limit_in_the_configuration_acts_in_assemble(tmp_path, monkeypatch):
    from arcface_build.commands.assemble import command

    model_dir, of = write_model(tmp_path / "models" / "tiny"), spec()
    contract = json.loads((model_dir / "manifest.json").read_text())["contract_id"]
    manifest = replace(write_plan(tmp_path / of.file_name, of), contract_id=contract, drift={"max_drift": 5e-4})
    manifest_path(tmp_path / of.file_name).write_bytes(manifest_bytes(manifest))
    arguments = ["tiny", "--plan", str(tmp_path / of.file_name), "--models-dir", str(tmp_path / "models")]
    arguments += ["--model-repository", str(copy_repository(tmp_path))]
    assert CliRunner().invoke(command, arguments, standalone_mode=False).exception is None
    monkeypatch.setenv("ARCFACE_COMPARISON__MAX_DRIFT__FP16", "1e-4")
    refused = CliRunner().invoke(command, arguments, standalone_mode=False).exception
    assert isinstance(refused, PlanRefused)
    assert "drift 0.0005, 5.0 × the limit 0.0001 for fp16" in str(refused)


def test_a_stricter_limit_in_a_named_configuration_acts_in_import(tmp_path):
    """Both in a fresh import and where an earlier one would be kept."""
    folder, strict = write_model(tmp_path / "made"), tmp_path / "strict.yaml"
    strict.write_text("comparison: {max_drift: {fp32: 1.0e-20}}\n")
    command = ["import", str(folder / "source.onnx"), "--no-assemble", "--models-dir", str(tmp_path / "models")]
    with pytest.raises(ProofFailed, match="× the limit 1e-20 for fp32"):
        invoke([*command, "--config", str(strict)])
    assert not list((tmp_path / "models").iterdir())
    assert invoke(command)["proof"]["min_cosine"] > 0.99999
    with pytest.raises(ProofFailed, match="× the limit 1e-20 for fp32"):
        invoke([*command, "--config", str(strict)])


def invoke(arguments: list[str]) -> dict:
    """What `arcface … --json` prints, or the exception that it raises."""
    from arcface_build.cli import cli

    done = CliRunner().invoke(cli, [*arguments, "--json"], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout)


@pytest.mark.parametrize("limit, installed", [(0.01, True), (0.001, False)])
def test_a_stricter_limit_acts_in_what_serve_installs_and_keeps(limit, installed, tmp_path, monkeypatch):
    gate = {"runtime": "onnxruntime", "passed": True, "limit": 0.01, "judged_on": "held back"}
    sidecar = {"precision": "int8", "passed": True, "gates": [gate | {"drift": {"max_drift": 0.005}}]}
    served = {"name": "tiny", "variant": {"precision": "int8", "runtime": "onnxruntime", "sidecar": sidecar}}
    if installed:
        check_installed(served, lambda: ServerRuntimes(("onnxruntime",)), LIMITS | {"int8": limit})
    else:
        with pytest.raises(Missing, match="int8 passed its gate in no runtime"):
            check_installed(served, lambda: ServerRuntimes(("onnxruntime",)), LIMITS | {"int8": limit})
    model_dir = sidecar_of(tmp_path, gate | {"drift": {"max_drift": 0.005}}).parent.parent
    repository = copy_repository(tmp_path)
    assemble(model_dir, repository)
    monkeypatch.setattr(choosing, "measure", int8_twice_as_fast)
    here = ServerRuntimes(("onnxruntime",))
    taken = take_best_variant(repository, model_dir.parent, 3, LIMITS | {"int8": limit}, lambda: here)
    assert served_manifest(repository).get("precision", "fp32") == ("int8" if installed else "fp32"), taken


def int8_twice_as_fast(model_dir: Path, found: Sequence[Candidate], *_: object) -> SpeedTable:
    rates = {"fp32": (10.0,), "int8": (20.0,)}
    return SpeedTable(4, tuple(Speed(*one.key, rates[one.precision], rates[one.precision], drift=0.0) for one in found))


def sidecar_of(folder: Path, *gates: dict, **changed: object) -> Path:
    """An int8 variant of a tiny model that passed its gate, its serving ONNX renamed to it."""
    model_dir = write_model(folder / "models" / "tiny")
    (model_dir / "variants").mkdir()
    file = model_dir / "variants" / "int8-cpu.onnx"
    file.write_bytes((model_dir / "serving.onnx").read_bytes())
    passed = {"runtime": "onnxruntime", "passed": True, "limit": 0.01, "judged_on": "held back"}
    passed["drift"] = {"max_drift": 0.001}
    told = {"format": 1, "name": "tiny", "precision": "int8", "target": "cpu", "file": "variants/int8-cpu.onnx"}
    told |= {"sha256": file_sha256(file), "serving_sha256": "5" * 64, "passed": True, "recipe": None}
    told |= {"gates": list(gates) or [passed], **changed}
    file.with_suffix(".json").write_text(json.dumps(told))
    return file


def by_assemble(file: Path) -> None:
    sidecar = json.loads(file.with_suffix(".json").read_text())
    choice = VariantChoice("variants/int8-cpu.onnx", "int8", "onnxruntime", "", sidecar)
    assemble(file.parent.parent, copy_repository(file.parent.parent.parent.parent), choice, limits=LIMITS)


def by_engine_with_a_name(file: Path) -> None:
    models = file.parent.parent.parent
    EngineRegistry.get("onnx", models_dir=models, precision="int8", device="cpu", threads=1).ensure_ready()


def by_engine_with_a_file(file: Path) -> None:
    EngineRegistry.get("onnx", file=file, precision="int8", device="cpu", threads=1).ensure_ready()


def by_verify(file: Path) -> None:
    verify_variant(file.parent.parent, "int8", "cpu", "synthetic", 8, LIMITS)


def by_auto(file: Path) -> None:
    choice = choose(file.parent.parent, LIMITS, ("onnxruntime",))
    assert choice.precision == "fp32"
    raise GateFailed(choice.reason)


VARIANT_DOORS = [by_assemble, by_engine_with_a_name, by_engine_with_a_file, by_verify, by_auto]


@pytest.mark.parametrize("door", VARIANT_DOORS, ids=lambda door: door.__name__)
def test_a_variant_swapped_after_it_was_judged_is_served_by_no_door(door, tmp_path):
    file = sidecar_of(tmp_path)
    write_model(tmp_path / "other", seed=1)
    file.write_bytes((tmp_path / "other" / "serving.onnx").read_bytes())
    with pytest.raises(GateFailed, match=r"int8-cpu\.onnx is not the file that was proved: expected sha256"):
        door(file)


@pytest.mark.parametrize("door", VARIANT_DOORS, ids=lambda door: door.__name__)
def test_a_variant_of_another_import_is_served_by_no_door(door, tmp_path):
    file = sidecar_of(tmp_path)
    with_digests(file.parent.parent)
    with pytest.raises(GateFailed, match=r"was made from another serving ONNX \(555555555555…\)"):
        door(file)


def with_digests(model_dir: Path) -> None:
    """The manifest as an import writes it, with the digests of its files."""
    manifest = json.loads((model_dir / "manifest.json").read_text())
    manifest["serving"]["sha256"] = file_sha256(model_dir / "serving.onnx")
    manifest["source"]["copy"] = {"file": "source.onnx", "sha256": file_sha256(model_dir / "source.onnx")}
    (model_dir / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["serving.onnx", "source.onnx"])
def test_a_file_replaced_after_its_import_is_not_installed(name, tmp_path):
    model_dir = write_model(tmp_path / "models" / "tiny")
    with_digests(model_dir)
    write_model(tmp_path / "other", seed=1)
    (model_dir / name).write_bytes((tmp_path / "other" / name).read_bytes())
    repository = copy_repository(tmp_path)
    with pytest.raises(GateFailed, match=f"{name} is not the file that was proved"):
        assemble(model_dir, repository)
    assert not list(repository.glob("arcface_*/*/*.onnx"))


@pytest.mark.parametrize("name", ["serving.onnx", "source.onnx"])
def test_a_file_that_is_gone_is_named_with_the_command_that_makes_it(name, tmp_path):
    model_dir = write_model(tmp_path / "models" / "tiny")
    with_digests(model_dir)
    (model_dir / name).unlink()
    with pytest.raises(Missing, match=f"{name} is gone, though its manifest names it. Make it again: arcface import"):
        assemble(model_dir, copy_repository(tmp_path))


@pytest.mark.parametrize(
    ("name", "file", "options"), [("onnx", "serving.onnx", {"device": "cpu"}), ("insightface", "source.onnx", {})]
)
def test_a_file_replaced_after_its_import_is_not_loaded(name, file, options, tmp_path):
    model_dir = write_model(tmp_path / "models" / "tiny")
    with_digests(model_dir)
    engine = EngineRegistry.get(name, models_dir=tmp_path / "models", threads=1, **options)
    engine.ensure_ready()
    engine.close()
    write_model(tmp_path / "other", seed=1)
    (model_dir / file).write_bytes((tmp_path / "other" / file).read_bytes())
    with pytest.raises(GateFailed, match=f"{file} is not the file that was proved"):
        engine.ensure_ready()


def quantized(models_dir: Path) -> None:
    make_variant(models_dir / "tiny", Wish("fp16", eval_faces=8))


def planned_from_the_import(models_dir: Path) -> None:
    find_source("tiny", "fp32", models_dir)


def planned_from_a_variant(models_dir: Path) -> None:
    variants = models_dir / "tiny" / "variants"
    variants.mkdir()
    (variants / "fp16-tensorrt.onnx").write_bytes(b"made before")
    find_source("tiny", "fp16", models_dir)


@pytest.mark.parametrize("door", [quantized, planned_from_the_import, planned_from_a_variant])
def test_nothing_is_made_from_a_serving_onnx_that_was_replaced(door, tmp_path):
    model_dir = write_model(tmp_path / "models" / "tiny")
    with_digests(model_dir)
    write_model(tmp_path / "other", seed=1)
    (model_dir / "serving.onnx").write_bytes((tmp_path / "other" / "serving.onnx").read_bytes())
    with pytest.raises(GateFailed, match=r"serving\.onnx is not the file that was proved"):
        door(tmp_path / "models")


def test_a_plan_is_not_built_from_a_variant_that_was_replaced(tmp_path):
    model_dir = write_model(tmp_path / "models" / "tiny")
    with_digests(model_dir)
    (model_dir / "variants").mkdir()
    file = model_dir / "variants" / "fp16-tensorrt.onnx"
    file.write_bytes((model_dir / "serving.onnx").read_bytes())
    file.with_suffix(".json").write_text(json.dumps({"sha256": file_sha256(file)}))
    assert find_source("tiny", "fp16", tmp_path / "models").onnx == file
    file.write_bytes(b"another")
    with pytest.raises(GateFailed, match=r"fp16-tensorrt\.onnx is not the file that was proved"):
        find_source("tiny", "fp16", tmp_path / "models")


def test_an_int8_file_is_not_run_as_fp32_and_a_refused_one_not_at_all(tmp_path):
    file = sidecar_of(tmp_path)
    with pytest.raises(ConfigError, match="is int8 by its sidecar: expected that precision, got fp32"):
        EngineRegistry.get("onnx", file=file, device="cpu").ensure_ready()
    refused = file.rename(file.with_name(f"{file.name}.refused"))
    with pytest.raises(GateFailed, match="its gate refused it"):
        EngineRegistry.get("onnx", file=refused, precision="int8", device="cpu").ensure_ready()


def test_of_two_verdicts_in_one_runtime_the_refusal_counts():
    good = {"runtime": "onnxruntime", "passed": True, "limit": 0.01, "judged_on": "all", "drift": {"max_drift": 0.001}}
    bad = {**good, "drift": {"max_drift": 0.5}}
    no_limit = {key: value for key, value in good.items() if key != "limit"}
    for gates, passed in (([good], True), ([bad, good], False), ([good, bad], False), ([no_limit], False)):
        verdict = judge_sidecar({"precision": "int8", "passed": True, "gates": gates})["onnxruntime"]
        assert verdict.passed is passed
