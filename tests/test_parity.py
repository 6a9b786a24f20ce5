"""Parity of a real server's backends, its table and its exit codes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from arcface_build.commands.parity import command
from arcface_clients.checks.parity import REFERENCE, BackendParity, ParityReport, measure_parity, render_table
from arcface_clients.errors import GateFailed, InvalidFaces, ModelNotReady, ServerUnreachable


@pytest.fixture(scope="module")
def report(server) -> ParityReport:
    return measure_parity(server.grpc_url)


def test_every_loaded_backend_agrees_with_the_reference(report: ParityReport) -> None:
    rows = {row.model: row for row in report.rows}
    assert {REFERENCE, "arcface_onnx", "arcface"} <= set(rows)
    assert rows[REFERENCE].gate == "reference"
    for model in ("arcface_onnx", "arcface"):
        assert rows[model].min_cosine >= 1 - rows[model].limit, model
        assert rows[model].passed
    assert report.passed
    report.require()


def test_models_that_are_not_loaded_are_skipped_with_the_reason(server) -> None:
    report = measure_parity(server.grpc_url, models=(REFERENCE, "nosuch"))
    assert list(report.skipped) == ["nosuch"]
    assert "does not serve 'nosuch'" in report.skipped["nosuch"]


def test_without_a_reference_golden_rows_are_compared_and_no_parity_is_claimed(server) -> None:
    report = measure_parity(server.grpc_url, models=("arcface",))
    assert report.rows[0].min_cosine is None
    assert report.rows[0].gate.startswith("golden rows (fp32: drift ")
    without = replace(report, skipped={REFERENCE: "not loaded"})
    with pytest.raises(ModelNotReady, match="only the golden rows of the import were compared: not loaded"):
        without.require()


def test_drift_above_the_limit_fails_with_its_figure(report: ParityReport) -> None:
    drifted = BackendParity(
        "arcface_onnx", "arcface_onnx", "onnx", "fp32", 8.4, 0.99999, 0.9999, 3, 1e-5, "drift 0.0001, 10.0 × the limit"
    )
    failed = replace(report, rows=(*report.rows[:1], drifted))
    with pytest.raises(GateFailed, match=r"arcface_onnx FAILED \(fp32: drift 0.0001, 10.*arcface compare"):
        failed.require()
    assert not failed.passed
    assert "FAILED" in render_table(failed)


def test_table_lines_up_and_fits_a_terminal(report: ParityReport) -> None:
    lines = render_table(report).splitlines()
    assert len(lines) == len(report.rows) + 2
    assert lines[0].split("  ")[0] == "backend"
    assert max(map(len, lines)) <= 100


def test_command_prints_json_with_what_it_measured(server) -> None:
    done = CliRunner().invoke(command, ["--url", server.grpc_url, "--json"], standalone_mode=False)
    assert done.exception is None
    told = json.loads(done.stdout)
    assert told["passed"] is True
    assert {row["model"] for row in told["rows"]} >= {REFERENCE, "arcface"}


def test_no_faces_and_no_server_are_errors_of_their_own(server) -> None:
    with pytest.raises(InvalidFaces, match="at least one"):
        measure_parity(server.grpc_url, np.empty((0, 112, 112, 3), np.uint8))
    with pytest.raises(ServerUnreachable):
        measure_parity("127.0.0.1:1")
