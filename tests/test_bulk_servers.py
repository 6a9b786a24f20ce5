"""A bulk job by threads whose tritonservers are killed, and come back, also with another model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result

from arcface_build.cli import cli
from arcface_build.repository.assemble import assemble
from arcface_build.serving.binary import TritonBinary
from arcface_build.serving.process import TritonProcess
from arcface_clients import TritonEmbedder
from arcface_clients.bulk.parts import read_embeddings
from arcface_clients.errors import ContractMismatch
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.people.persons import Journal, Limits
from arcface_clients.triton.embedder import named_contract
from arcface_tools.quick_server import OUR_CONTRACT, QuickServer
from conftest import copy_repository
from hurt_job import COUNT, HurtJob, exchange, hurt_by_kills, some_faces, two_servers
from tiny_model import write_model

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


def test_servers_that_state_no_contract_are_told_apart_by_the_contract_that_their_rows_name(
    start_triton: Callable[..., TritonProcess], tmp_path: Path
) -> None:
    np.save(tmp_path / "faces.npy", synthetic_faces(12))
    urls = []
    for seed in (0, 1):
        (folder := tmp_path / f"host{seed}").mkdir()
        assemble(write_model(folder / "models" / "tiny", seed=seed), repository := copy_repository(folder))
        urls.append(start_triton(repository, ["arcface"], config_name="").grpc_url)  # without the overlay

    def embed(*urls: str) -> Result:
        line = ["embed", f"{tmp_path}/faces.npy", "-o", f"{tmp_path}/out/", "--unit-rows", "4"]
        line += [word for url in urls for word in ("--url", url)]
        return CliRunner().invoke(cli, line, standalone_mode=False)

    both = embed(*urls)
    assert isinstance(both.exception, ContractMismatch), both.output
    assert "expected one model behind all URLs" in str(both.exception)
    other = embed(urls[1])
    assert isinstance(other.exception, ContractMismatch), other.output
    assert embed(urls[0]).exception is None
    with TritonEmbedder(urls[0]) as embedder:
        rows = np.concatenate([group[2] for group in read_embeddings(tmp_path / "out")])
        np.testing.assert_allclose(rows, embedder.encode(synthetic_faces(12)), atol=1e-5)
        contract = named_contract(embedder)

    (tmp_path / "people" / "Ann").mkdir(parents=True)
    for number, face in enumerate(synthetic_faces(4)):
        cv2.imwrite(f"{tmp_path}/people/Ann/{number}.png", face)
    Journal(tmp_path / "people.json.partial", contract, Limits()).close()  # of a run that was stopped

    def consensus(url: str) -> Result:
        line = ["consensus", f"{tmp_path}/people", "-o", f"{tmp_path}/people.json", "--url", url]
        return CliRunner().invoke(cli, line, standalone_mode=False)

    other = consensus(urls[1])
    assert isinstance(other.exception, ContractMismatch), other.output
    assert f"was started with contract {contract}, this model's is " in str(other.exception)
    assert consensus(urls[0]).exception is None
    told = json.loads((tmp_path / "people.json").read_text())
    assert told["contract_id"] is None and told["contract_prefix"] == contract and len(contract) == 32
