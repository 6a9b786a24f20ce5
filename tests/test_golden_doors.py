"""A runtime that computes a proved file wrongly on this host is refused at every door, by the import's golden rows."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from arcface_build.cli import cli
from arcface_build.repository.assemble import assemble
from arcface_build.variants.choose import Wanted, choose
from arcface_build.variants.measure import measure
from arcface_build.variants.session_process import SessionProcess
from arcface_clients.checks.parity import measure_parity
from arcface_clients.engines.fallback import FallbackEmbedder
from arcface_clients.engines.onnx import OnnxEngine
from arcface_clients.engines.runtimes import open_session
from arcface_clients.errors import GateFailed
from arcface_clients.evidence.drift import DRIFT_LIMITS
from arcface_clients.evidence.golden import golden_faces, golden_record
from conftest import copy_repository
from test_cpu_path import BF16, FP32, ORT, model_dir
from tiny_model import write_model

JUDGED = {"int8": {BF16: 0.008, FP32: 0.008}, "bf16": {BF16: 0.0008}}
choose = partial(choose, limits=DRIFT_LIMITS, here=(ORT, FP32, BF16))


def with_golden_rows(folder: Path) -> Path:
    """The model folder, with the rows that ONNX Runtime gives for its serving ONNX in the manifest."""
    rows = open_session(folder / "serving.onnx").run(["embedding"], {"face": golden_faces()})[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "golden": golden_record(rows)}))
    return folder


@pytest.fixture
def judged(tmp_path):
    return with_golden_rows(model_dir(tmp_path, **JUDGED))


@pytest.fixture
def openvino_is_wrong(tmp_path, monkeypatch):
    """OpenVINO gives what a network with other weights would; the rest is right. Empty the set to mend it."""
    wrong = write_model(tmp_path / "wrong", error=1.0) / "serving.onnx"
    runtimes = {FP32, BF16}

    def opener(real):
        def opened(model, runtime, *arguments, **options):
            return real(wrong if runtime in runtimes else model, ORT, *arguments, **options)

        return opened

    monkeypatch.setattr(sys.modules[measure.__module__], "SessionProcess", opener(SessionProcess))
    monkeypatch.setattr(sys.modules[OnnxEngine.__module__], "open_session", opener(open_session))
    return runtimes


def test_the_measured_choice_takes_what_is_right_here_and_says_why_not_the_rest(judged, openvino_is_wrong):
    taken = choose(judged)
    assert (taken.precision, taken.runtime) == ("fp32", ORT)
    for name in ("fp32 in openvino-fp32", "bf16 in openvino-bf16", "int8 in openvino-bf16", "int8 in openvino-fp32"):
        assert f"not {name}: this CPU computes something else (drift" in taken.reason
    openvino_is_wrong.clear()
    assert "something else" not in choose(judged, wanted=Wanted(remeasure=True)).reason


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_precision_asked_for_by_name_is_refused_where_it_is_wrong_here(judged, openvino_is_wrong, precision):
    with pytest.raises(GateFailed, match=f"{precision} of tiny is not served: this CPU computes something else"):
        choose(judged, wanted=Wanted(precision=precision))
    openvino_is_wrong.discard(BF16)
    assert choose(judged, wanted=Wanted(precision=precision)).runtime == BF16


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_assemble_by_name_refuses_what_is_wrong_here(judged, openvino_is_wrong, precision, tmp_path):
    openvino_is_wrong.add(ORT)
    repository = copy_repository(tmp_path)
    line = ["assemble", "tiny", "--variant", precision, "--models-dir", str(judged.parent)]
    done = CliRunner().invoke(cli, [*line, "--model-repository", str(repository)], standalone_mode=False)
    assert isinstance(done.exception, GateFailed), done.output
    assert f"{precision} of tiny is not served: " in str(done.exception)
    assert not list(repository.glob("arcface_onnx/*/manifest.json"))


def test_the_only_candidate_is_judged_too_and_one_that_does_not_open_is_not_chosen(judged, openvino_is_wrong):
    openvino_is_wrong.add(ORT)
    with pytest.raises(GateFailed, match="fp32 in onnxruntime: this CPU computes something else"):
        choose(judged, here=(ORT,), told_precision=False)
    (judged / "serving.onnx").write_bytes(b"no graph")
    openvino_is_wrong.clear()
    with pytest.raises(
        GateFailed, match=r"tiny is not served: .*fp32 in onnxruntime: serving.onnx: ONNX Runtime cannot"
    ):
        choose(judged, here=(ORT,))


def test_of_two_runtimes_a_precision_asked_for_is_served_in_the_one_that_is_right(judged, openvino_is_wrong):
    openvino_is_wrong.remove(BF16)
    taken = choose(judged, wanted=Wanted(precision="int8"))
    assert taken.runtime == BF16 and "not int8 in openvino-fp32: this CPU computes something else" in taken.reason


def test_weights_that_this_host_computes_wrongly_in_every_way_are_not_served(judged, openvino_is_wrong):
    openvino_is_wrong.add(ORT)
    with pytest.raises(GateFailed, match=r"tiny is not served: .*fp32 in onnxruntime: this CPU computes"):
        choose(judged)


def test_an_import_without_golden_rows_is_compared_with_its_fp32(tmp_path, openvino_is_wrong):
    taken = choose(model_dir(tmp_path, **JUDGED))
    assert (taken.precision, taken.runtime) == ("fp32", ORT)
    assert "not int8 in openvino-fp32: this CPU computes something else" in taken.reason


def test_the_engine_in_the_process_refuses_what_is_wrong_here_and_gives_no_vector(tmp_path, openvino_is_wrong):
    folder, faces = with_golden_rows(write_model(tmp_path / "models" / "tiny")), golden_faces()
    openvino_is_wrong.add(ORT)
    engine = OnnxEngine(models_dir=folder.parent, device="cpu", max_batch=1)
    for _ in range(2):  # refused again, not taken for loaded
        with pytest.raises(
            GateFailed, match=r"serving.onnx in onnxruntime computes something else on this host.*two golden"
        ):
            engine.encode(faces)
    openvino_is_wrong.clear()
    assert engine.encode(faces).shape == (2, 64)


def test_a_chain_goes_on_with_the_next_engine_and_does_not_ask_the_wrong_one_again(tmp_path, openvino_is_wrong):
    folder, faces = with_golden_rows(write_model(tmp_path / "models" / "tiny")), golden_faces()
    right = OnnxEngine(models_dir=folder.parent, device="cpu", max_batch=1).encode(faces)
    openvino_is_wrong.add(ORT)
    wrong = OnnxEngine(models_dir=folder.parent, device="cpu")
    good = SimpleNamespace(name="good", encode=lambda faces: right, embedding_dim=64, contract_id=wrong.contract_id)
    good.ensure_ready = good.close = lambda: None
    chain = FallbackEmbedder([wrong, good])
    for _ in range(2):
        np.testing.assert_array_equal(chain.encode(faces), right)
    assert chain.last_engine == "good" and "computes something else on this host" in chain.reason
    with pytest.raises(GateFailed, match="every engine of the chain failed its validation"):
        FallbackEmbedder([wrong]).encode(faces)


def test_what_a_gate_allowed_on_purpose_is_not_called_wrong(tmp_path):
    folder = with_golden_rows(model_dir(tmp_path, int8={ORT: 0.3}))
    write_model(tmp_path / "drifting", error=0.5)
    int8 = folder / "variants" / "int8-cpu.onnx"
    int8.write_bytes((tmp_path / "drifting" / "serving.onnx").read_bytes())
    sidecar = json.loads(int8.with_suffix(".json").read_text())
    sidecar["gates"][0]["limit"] = 0.35
    int8.with_suffix(".json").write_text(json.dumps(sidecar))
    engine = partial(OnnxEngine, models_dir=folder.parent, precision="int8", device="cpu")
    assert engine().encode(golden_faces()).shape == (2, 64)
    with pytest.raises(GateFailed, match=r"the limit 0\.05 for int8"):
        engine(int8, max_drift={"int8": 0.05}, models_dir=None)._check_golden(open_session(int8), int8, "int8", ORT)


def test_an_own_limit_counts_in_the_process_too(tmp_path):
    folder = with_golden_rows(write_model(tmp_path / "models" / "tiny"))
    write_model(tmp_path / "drifting", error=1e-2)
    (folder / "serving.onnx").write_bytes((tmp_path / "drifting" / "serving.onnx").read_bytes())
    with pytest.raises(GateFailed, match="the limit 1e-05 for fp32"):
        OnnxEngine(models_dir=folder.parent, device="cpu").encode(golden_faces())
    assert len(OnnxEngine(models_dir=folder.parent, device="cpu", max_drift={"fp32": 0.1}).encode(golden_faces())) == 2


def test_a_server_without_a_reference_is_judged_by_its_golden_rows(tmp_path, start_triton):
    repository, folder = copy_repository(tmp_path), write_model(tmp_path / "models" / "tiny")
    manifest = json.loads((folder / "manifest.json").read_text())
    rows = np.random.default_rng(0).normal(size=(2, 64))
    (folder / "manifest.json").write_text(json.dumps({**manifest, "golden": golden_record(rows)}))
    assemble(folder, repository)
    report = measure_parity(start_triton(repository, ["arcface"]).grpc_url)
    assert not report.passed
    assert {row.min_cosine for row in report.rows} == {None}
    assert all("the limit 1e-05 for fp32" in row.gate for row in report.rows)
