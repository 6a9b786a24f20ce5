"""Startup validation on real engines: what passes, what is refused, and what happens then."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from onnx import load, save

from arcface_build.graph.serving import serving_form
from arcface_clients import get_embedding_backend
from arcface_clients.config.schema import EmbeddingConfig, LocalModel, Validation
from arcface_clients.contract import Preprocessing
from arcface_clients.engines import EngineRegistry
from arcface_clients.engines.validation import StoredReference, reference_from, validate_engine
from arcface_clients.errors import ConfigError, ContractMismatch, GateFailed
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.plans.manifest import file_sha256
from damaged_arrays import DAMAGED_ARRAYS, write_damaged
from tiny_model import write_model

FACES = synthetic_faces(6)


def config(folder: Path, **keys: object) -> EmbeddingConfig:
    local = LocalModel(models_dir=folder.parent, model=folder.name, threads=1)
    keys.setdefault("validation", Validation(eval_set_size=4))
    return EmbeddingConfig(backend="onnx", device="cpu", local=local, **keys)


def reference(folder: Path) -> StoredReference:
    with EngineRegistry.get("insightface", file=folder / "source.onnx", threads=1) as engine:
        return reference_from(engine, FACES)


def onnx(folder: Path):
    return EngineRegistry.get("onnx", file=folder / "serving.onnx", device="cpu", threads=1)


def test_engine_that_equals_the_reference_passes(tmp_path):
    folder = write_model(tmp_path / "good")
    report = validate_engine(onnx(folder), reference(folder), "fp32", {"fp32": 1e-5}, "onnx")
    assert (report.status, report.faces) == ("passed", 6)
    assert 0 <= report.max_drift < 1e-6


def test_engine_that_drifts_is_refused_with_figures(tmp_path):
    folder = write_model(tmp_path / "bad", error=0.3)
    with pytest.raises(GateFailed) as caught:
        validate_engine(onnx(folder), reference(folder), "fp32", {"fp32": 1e-3}, "onnx")
    said = str(caught.value)
    assert "× the limit 0.001 for fp32, on 6 of 6 faces" in said and "Look closer: arcface parity" in said


def test_wrong_channel_order_is_refused(tmp_path):
    folder = write_model(tmp_path / "rgb")
    swapped = write_model(tmp_path / "bgr", Preprocessing("bgr"))
    (folder / "serving.onnx").write_bytes((swapped / "serving.onnx").read_bytes())
    with pytest.raises(ContractMismatch, match="names contract"):
        validate_engine(onnx(folder), reference(folder), "fp32", {"fp32": 1e-2}, "onnx")
    network, contract = load(folder / "source.onnx"), json.loads((folder / "manifest.json").read_text())["contract_id"]
    save(serving_form(network, Preprocessing("bgr"), 64, contract).model, folder / "serving.onnx")  # under our name
    with pytest.raises(GateFailed):
        validate_engine(onnx(folder), reference(folder), "fp32", {"fp32": 1e-2}, "onnx")


def test_another_models_reference_is_a_mismatch_not_a_drift(tmp_path):
    one, other = write_model(tmp_path / "one"), write_model(tmp_path / "other", seed=1)
    with pytest.raises(ContractMismatch, match="they are different models"):
        validate_engine(onnx(one), reference(other), "fp32", {"fp32": 1e-3}, "onnx")


def test_drift_of_an_engine_of_unknown_contract_is_not_fallen_back_from(tmp_path):
    folder = write_model(tmp_path / "bad", error=0.3)
    expected = reference(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ContractMismatch, match="so it may be another model"):
        validate_engine(onnx(folder), expected, "fp32", {"fp32": 1e-3}, "onnx")


def test_model_that_overflows_is_refused(tmp_path):
    folder = write_model(tmp_path / "nan", error=float("inf"))
    with pytest.raises(GateFailed, match="onnx cannot embed the 6 faces of its validation"):
        validate_engine(onnx(folder), reference(folder), "fp32", {"fp32": 1e-3}, "onnx")


def test_refused_backend_is_replaced_by_the_fallback_loudly(tmp_path, caplog):
    with get_embedding_backend(config=config(write_model(tmp_path / "bad", error=0.3))) as engine:
        embeddings = engine.encode(FACES)
        assert engine.last_engine == "insightface"
        assert "onnx: drift" in engine.reason
        assert engine.validations["insightface"].status == "skipped"
    assert np.allclose(embeddings, reference(tmp_path / "bad").embeddings, atol=1e-6)
    assert [r.levelname for r in caplog.records if "failed its validation" in r.message] == ["ERROR"]


def test_limit_is_that_of_the_precision(tmp_path):
    folder = write_model(tmp_path / "close", error=0.02)
    drift = validate_engine(onnx(folder), reference(folder), "fp32", {"fp32": 2.0}, "onnx").max_drift
    assert 1e-5 < drift < 1e-2
    with get_embedding_backend(config=config(folder)) as engine:
        engine.ensure_ready()
        assert engine.last_engine == "insightface"
    relaxed = {"max_drift": {"fp32": 1e-2}}
    with get_embedding_backend(config=config(folder, comparison=relaxed)) as engine:
        engine.ensure_ready()
        assert (engine.last_engine, engine.validations["onnx"].limit) == ("onnx", 1e-2)


def test_validation_can_be_switched_off(tmp_path):
    folder = write_model(tmp_path / "bad", error=0.3)
    with get_embedding_backend(config=config(folder, validation=Validation(run_on_startup=False))) as engine:
        engine.encode(FACES)
        assert (engine.last_engine, engine.validations) == ("onnx", {})


def test_stored_reference_needs_no_insightface(tmp_path):
    folder = write_model(tmp_path / "bad", error=0.3)
    stored = tmp_path / "reference.npz"
    reference(folder).save(stored)
    (folder / "source.onnx").unlink()
    settings = config(folder, validation=Validation(reference=stored), fallback={"enabled": False})
    with get_embedding_backend(config=settings) as engine, pytest.raises(GateFailed, match="of 6 faces"):
        engine.encode(FACES)


def test_without_a_reference_the_engine_is_used_and_that_is_said(tmp_path, caplog):
    folder = write_model(tmp_path / "alone")
    (folder / "source.onnx").unlink()
    with caplog.at_level(logging.WARNING), get_embedding_backend(config=config(folder)) as engine:
        engine.encode(FACES)
        assert (engine.last_engine, engine.validations["onnx"].status) == ("onnx", "skipped")
    assert "onnx is used without validation: there is no reference on this host" in caplog.text


def test_a_reference_that_was_replaced_neither_judges_an_engine_nor_takes_its_place(tmp_path, caplog):
    folder = write_model(tmp_path / "models" / "tiny")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["source"]["copy"] = {"file": "source.onnx", "sha256": file_sha256(folder / "source.onnx")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "source.onnx").write_bytes((write_model(tmp_path / "other", seed=1) / "source.onnx").read_bytes())
    with caplog.at_level(logging.WARNING), get_embedding_backend(config=config(folder)) as engine:
        engine.encode(FACES)
        assert (engine.last_engine, engine.validations["onnx"].status) == ("onnx", "skipped")
    assert "source.onnx is not the file that was proved" in caplog.text


def test_code_in_the_documentation_runs(tmp_path, monkeypatch):
    page = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
    switch, store_reference = (part.split("```")[0] for part in page.read_text().split("```python")[1:])
    write_model(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    exec(store_reference, {})
    monkeypatch.setenv("ARCFACE_VALIDATION__REFERENCE", "reference.npz")
    monkeypatch.setenv("ARCFACE_BACKEND", "onnx")
    names = {"faces": FACES}
    exec(switch, names)
    assert names["embeddings"].shape == (6, 64)
    assert names["backend"].validations["onnx"].why == "compared with reference.npz"


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"faces": FACES}, "expected an .npz with faces, embeddings and contract_id"),
        ({"faces": FACES, "embeddings": np.zeros((2, 8))}, "got 6 faces and embeddings of shape (2, 8)"),
        ({"faces": FACES[:, :50], "embeddings": np.zeros((6, 8))}, "expected faces of shape"),
    ],
)
def test_stored_reference_that_does_not_fit_is_refused(tmp_path, arrays, expected):
    file = tmp_path / "reference.npz"
    np.savez(file, **arrays)
    with pytest.raises(ConfigError) as caught:
        StoredReference.load(file, 16)
    assert expected in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGED_ARRAYS)
def test_file_that_is_no_npz_is_refused(tmp_path, damage):
    write_damaged(tmp_path / "reference.npz", damage)
    with pytest.raises(ConfigError, match=r"expected an \.npz"):
        StoredReference.load(tmp_path / "reference.npz", 16)
