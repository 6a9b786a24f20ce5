"""A bulk job by threads whose tritonservers are killed, and come back, also with another model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from arcface_build.serving.binary import TritonBinary
from arcface_tools.quick_server import OUR_CONTRACT, QuickServer
from hurt_job import COUNT, HurtJob, exchange, hurt_by_kills, some_faces, two_servers

pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def servers(triton_binary: TritonBinary) -> Iterator[list[QuickServer]]:
    with two_servers() as servers:
        yield servers


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    return some_faces()


@pytest.fixture
def job(servers: list[QuickServer], faces: np.ndarray, tmp_path: Path) -> Iterator[HurtJob]:
    np.save(tmp_path / "faces.npy", faces)
    job = HurtJob(servers, "threads+", f"{tmp_path}/out/", str(tmp_path / "faces.npy"), tmp_path)
    job.start()
    yield job
    job.driver.kill()
    job.driver.communicate()


def test_servers_that_are_killed_in_turn_and_together_cost_no_face(job: HurtJob, faces: np.ndarray) -> None:
    hurt_by_kills(job)
    counts = job.counts()
    assert (counts["rows"], counts["refused"], counts["advanced"]) == (COUNT, 0, COUNT)
    job.check_rows(faces)


def test_a_server_that_comes_back_with_another_model_ends_the_job_and_none_of_its_rows_is_kept(
    job: HurtJob, faces: np.ndarray
) -> None:
    job.goes_on()
    exchange(job.servers[1])
    code, _, errors = job.ends()
    assert code != 0
    assert "ContractMismatch" in errors
    exchange(job.servers[1], OUR_CONTRACT)
    job.start()
    counts = job.counts()
    assert (counts["rows"], counts["before"] + counts["advanced"]) == (COUNT, COUNT)
    job.check_rows(faces)
