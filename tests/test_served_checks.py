"""`arcface doctor URL`: drift from the golden rows that the server carries, its queue, its answers, its processes."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from arcface_build.cli import cli
from arcface_build.repository.assemble import assemble
from arcface_clients.checks.served_checks import served_checks
from arcface_clients.config.schema import EmbeddingConfig
from arcface_clients.evidence.golden import golden_faces, golden_record, golden_rows, is_golden
from conftest import copy_repository
from tiny_model import write_model


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_shows_its_drift_from_golden_rows_its_queue_and_its_answers(server, protocol):
    url = f"{protocol}://{getattr(server, f'{protocol}_url')}"
    told = {check.name: check for check in served_checks(EmbeddingConfig(triton={"url": url}))}
    assert {check.status for check in told.values()} == {"ok"}, told
    assert re.fullmatch(r"2 golden rows of the reference: drift \d\.\de-\d\d ≤ 1e-05 \(fp32\)", told["drift"].found)
    assert told["queue"].found.startswith("requests wait for arcface_onnx without a bound on their number")
    assert re.match(
        r"2 faces in \d+ ms; (none before|\d+ before, the last \d+ s ago, \d+ failed)", told["answers"].found
    )


def test_the_command_tells_it_of_the_server_that_is_named(server):
    done = CliRunner().invoke(cli, ["doctor", server.grpc_url, "--json"])
    told = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert told["drift"]["status"] == told["queue"]["status"] == told["answers"]["status"] == "ok"
    assert f"process {server.pid} listens at grpc://{server.grpc_url}" in told["processes"]["found"]
    assert re.search(r"Python backends: arcface_onnx for \d+ (s|min|h)", told["processes"]["found"])


def test_weights_that_drift_are_found_without_a_reference(tmp_path, start_triton):
    """The golden rows are those of another network, as if the weights had gone bad since."""
    repository, other = copy_repository(tmp_path), write_model(tmp_path / "models" / "tiny")
    rows = np.random.default_rng(0).normal(size=(2, 64))
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "golden": golden_record(rows)}))
    assemble(other, repository)
    server = start_triton(repository, ["arcface"])
    drift, *_ = served_checks(EmbeddingConfig(triton={"url": server.grpc_url}))
    assert drift.status == "problem"
    assert "golden rows of the reference: drift" in drift.found and "the limit 1e-05 for fp32" in drift.found


def test_a_model_without_golden_rows_is_told_so(odd_server):
    settings = EmbeddingConfig(triton={"url": odd_server.grpc_url, "model": "good"})
    drift, queue, answers = served_checks(settings)
    assert (drift.status, queue.status, answers.status) == ("absent", "ok", "ok")
    assert "has no golden rows" in drift.found


def test_a_bound_of_the_queue_that_somebody_chose_is_told_with_its_price(tmp_path, start_triton):
    repository = copy_repository(tmp_path)
    config = repository / "arcface_onnx" / "config.pbtxt"
    bound = "dynamic_batching { default_queue_policy { max_queue_size: 5 }"
    config.write_text(config.read_text().replace("dynamic_batching {", bound))
    assemble(write_model(tmp_path / "models" / "tiny"), repository)
    server = start_triton(repository, ["arcface"])
    _, queue, _ = served_checks(EmbeddingConfig(triton={"url": server.grpc_url}))
    assert queue.found.startswith("at most 5 requests wait for arcface_onnx; a lone call may wait 0.5 s")


def test_no_server_is_not_asked():
    checks = served_checks(EmbeddingConfig(triton={"url": "127.0.0.1:1"}))
    assert [(check.name, check.status) for check in checks] == [(n, "absent") for n in ("drift", "queue", "answers")]


def test_golden_rows_survive_their_text_and_anything_else_is_none():
    rows = np.random.default_rng(0).normal(size=(2, 512)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    back = golden_rows(golden_record(rows))
    cosine = (back * unit).sum(axis=1) / np.linalg.norm(back, axis=1)
    assert (1 - cosine < 2e-7).all()
    for bad in (None, "", "faces-0:AAAA", "faces-1:", "faces-1:?", "faces-1:AAA=", golden_record(rows)[:-3]):
        assert not is_golden(bad), bad


def test_the_golden_faces_are_those_that_the_records_were_made_of():
    """They may differ in the rounding of a pixel between hosts, not in what is drawn: else change `_DRAWN`."""
    means = golden_faces().mean(axis=(1, 2))
    np.testing.assert_allclose(means, MEANS, atol=0.05)


MEANS = [[82.92, 106.26, 130.05], [94.44, 110.52, 115.86]]
