"""The client's own bench, in small: it measures what it says, and proves what it says of restarts."""

from __future__ import annotations

import shutil

import pytest

from arcface_clients.errors import Missing, WrongUse
from arcface_tools import bulk
from arcface_tools.clients import restarts, run, run_quick, stream_memory


def test_every_transport_is_measured_against_a_running_server(odd_server) -> None:
    result = run(
        None, odd_server.grpc_url, odd_server.http_url, model="good", batch=8, in_flight=(2,), rounds=1, sample_s=0.05
    )
    rows = {row["name"]: row for row in result["variants"]}
    assert list(rows) == [f"client {transport} in flight 2" for transport in ("grpc", "grpc-shm", "http", "http-shm")]
    assert all(row["faces_per_s"]["median"] > 0 for row in rows.values())
    assert "system shared memory" in str(rows["client grpc-shm in flight 2"])


def test_a_transport_over_the_gpu_is_never_measured_as_another_one(odd_server) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this host has a GPU")
    with pytest.raises(Missing, match=r"grpc-cudashm cannot be measured: .* is not possible: .*Next: --transport "):
        run(None, odd_server.grpc_url, odd_server.http_url, model="good", transports=("grpc-cudashm",), rounds=1)


def test_a_transport_that_does_not_exist_is_refused() -> None:
    with pytest.raises(WrongUse, match="unknown transport 'smoke': expected one of grpc, grpc-shm, http"):
        run(None, "localhost:1", "localhost:1", transports=("smoke",))


def test_requests_in_flight_are_compared_on_a_model_that_costs_nothing() -> None:
    result = run_quick((1, 4), ("grpc-shm",), batch=8, rounds=1, sample_s=0.05)
    assert [row["in_flight"] for row in result["variants"]] == [1, 4]


def test_stream_keeps_its_memory() -> None:
    result = stream_memory(8_000)
    assert result["faces"] == 8_000
    assert result["rss_highest_mb"] - result["rss_before_mb"] < 60  # the faces alone are 300 MB


def test_restart_loses_no_request() -> None:
    result = restarts(400, rounds=1)
    events = [result[name] for name in ("kills", "stub_kills", "exchanges")]
    assert (events, result["wrong"]) == ([1, 1, 1], 0)
    assert result["faces"] >= 1600


def test_bulk_job_writes_every_row_in_bounded_memory(tmp_path) -> None:
    result = bulk.run(5_000, dim=64, folder=tmp_path)
    assert (result["rows"], result["refused"]) == (5_000, 0)
    assert result["output_mb"] > 5_000 * 64 * 4 / 2**20
    assert result["peak_mb"] < 500
