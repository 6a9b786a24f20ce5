"""A runtime that computes a proved file wrongly on this host is refused at every door, by the import's golden rows."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from arcface_build.repository.assemble import assemble
from arcface_build.variants.choose import Wanted, choose
from arcface_build.variants.measure import measure
from arcface_clients.checks.parity import measure_parity
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

    def opened(model, runtime, *arguments, **options):
        return open_session(wrong if runtime in runtimes else model, ORT, *arguments, **options)

    for module in (measure.__module__, OnnxEngine.__module__):
        monkeypatch.setattr(sys.modules[module], "open_session", opened)
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
        with pytest.raises(GateFailed, match=r"computes something else on this host \(onnxruntime\).*two golden faces"):
            engine.encode(faces)
    openvino_is_wrong.clear()
    assert engine.encode(faces).shape == (2, 64)


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
