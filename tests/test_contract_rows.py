"""Every answer names its weights: a model exchanged under its clients never gives them rows of two contracts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arcface_build.repository.assemble import assemble
from arcface_build.serving.process import TritonProcess
from arcface_clients import AsyncTritonEmbedder, FallbackEmbedder, TritonEmbedder
from arcface_clients.checks.parity import measure_parity
from arcface_clients.engines.onnx import OnnxEngine
from arcface_clients.errors import ArcFaceError, BackendUnavailable, ContractMismatch, WrongUse
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.triton.address import Address
from arcface_clients.triton.admin_key import GRPC_HEADER, find_key
from conftest import copy_repository
from deadlines import HANG_S
from odd_models import LEFT, RIGHT, write_model
from tiny_model import write_model as write_folder

FACES = synthetic_faces(24)
MODEL = "swapped"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_model(tmp_path / "repository", MODEL, contract=LEFT)
    return tmp_path / "repository"


@pytest.fixture
def server(repository: Path, start_triton: Callable[..., TritonProcess]) -> TritonProcess:
    return start_triton(repository, [MODEL], config_name="")


def load(server: TritonProcess, repository: Path, contract: str) -> None:
    """Have the server exchange the model, as an operator does through the model-control API."""
    from tritonclient.grpc import InferenceServerClient

    write_model(repository, MODEL, contract=contract)
    with InferenceServerClient(server.grpc_url) as control:
        control.load_model(MODEL, headers=admin(server))


def admin(server: TritonProcess) -> dict[str, str]:
    """What lets an operator control models."""
    return {GRPC_HEADER: find_key(Address.parse(server.grpc_url)) or ""}


def rows_of(server: TritonProcess) -> np.ndarray:
    with TritonEmbedder(server.grpc_url, MODEL, shared_memory=False) as embedder:
        return np.concatenate([embedder.encode(face) for face in FACES])


def client(server: TritonProcess, way: str, **options: Any) -> TritonEmbedder:
    url = f"http://{server.http_url}" if way.startswith("http") else server.grpc_url
    return TritonEmbedder(url, MODEL, shared_memory=way.endswith("shm"), **options)


WAYS = ["grpc", "grpc-shm", "http", "http-shm"]


def test_busy_clients_never_see_rows_of_two_contracts_while_the_model_is_exchanged(repository, server) -> None:
    left = rows_of(server)
    counts = dict.fromkeys([*WAYS, "stream", "fallback", "asyncio"], 0)
    wrong: list[str] = []
    ended: dict[str, ArcFaceError] = {}

    def check(name: str, rows: np.ndarray, first: int) -> None:
        if not np.allclose(rows, left[first : first + len(rows)], atol=1e-5):
            wrong.append(name)
        counts[name] += len(rows)

    def encode(name: str, engine: Any) -> None:
        with engine:
            try:
                while not wrong:
                    for first in range(0, len(FACES), 4):
                        check(name, engine.encode(FACES[first : first + 4]), first)
            except ArcFaceError as exc:
                ended[name] = exc

    def stream(name: str) -> None:
        with client(server, "grpc") as engine:
            try:
                source = (FACES[i % len(FACES)] for i in range(10**9))
                for i, row in enumerate(engine.encode_stream(source, batch_size=4)):
                    check(name, row[None], i % len(FACES))
            except ArcFaceError as exc:
                ended[name] = exc

    async def ask() -> None:
        async with AsyncTritonEmbedder(server.grpc_url, MODEL, shared_memory=False) as engine:
            try:
                while True:
                    check("asyncio", await engine.encode(FACES), 0)
            except ArcFaceError as exc:
                ended["asyncio"] = exc

    threads = [threading.Thread(target=encode, args=(way, client(server, way))) for way in WAYS]
    threads.append(threading.Thread(target=encode, args=("fallback", FallbackEmbedder([client(server, "grpc")]))))
    threads.append(threading.Thread(target=stream, args=("stream",)))
    threads.append(threading.Thread(target=lambda: asyncio.run(ask())))
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + HANG_S
    while min(counts.values()) < 400 and time.monotonic() < deadline_s:
        time.sleep(0.02)
    load(server, repository, RIGHT)
    for thread in threads:
        thread.join(HANG_S)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert min(counts.values()) >= 400
    assert {name: type(exc) for name, exc in ended.items()} == dict.fromkeys(counts, ContractMismatch)
    assert not np.allclose(rows_of(server), left, atol=1e-2)  # the exchange did change the weights


@pytest.mark.parametrize("way", WAYS)
def test_rows_name_what_made_them_and_a_client_without_answers_learns_the_new_model(repository, server, way) -> None:
    with (
        client(server, way) as fresh,
        client(server, way) as told,
        client(server, way, expected_contract=LEFT) as bound,
    ):
        for embedder in (fresh, bound):
            assert embedder.encode(FACES[:0]).shape == (0, 64)  # connected, and told nobody anything
        assert told.contract_id == LEFT
        load(server, repository, RIGHT)
        right = rows_of(server)
        np.testing.assert_allclose(fresh.encode(FACES[:4]), right[:4], atol=1e-5)
        assert fresh.contract_id == RIGHT
        assert fresh.contract_prefix == RIGHT[:32]
        for embedder in (told, bound):
            with pytest.raises(ContractMismatch, match="111111111111"):
                embedder.encode(FACES[:4])


def test_weights_that_are_not_those_of_the_overlay_are_refused(repository, server) -> None:
    stale = repository / MODEL / "1" / "model.py"
    stale.write_text(stale.read_text().replace('["string_value"]\n', '["string_value"].replace("2", "1")\n'))
    text = stale.read_text()
    load(server, repository, RIGHT)
    stale.write_text(text)
    from tritonclient.grpc import InferenceServerClient

    with InferenceServerClient(server.grpc_url) as control:
        control.unload_model(MODEL, headers=admin(server))
        control.load_model(MODEL, headers=admin(server))
    with (
        client(server, "grpc") as embedder,
        pytest.raises(ContractMismatch, match=r"rows of contract 111111111111; expected 222222222222"),
    ):
        embedder.encode(FACES[:4])
    with pytest.raises(ContractMismatch):
        measure_parity(server.grpc_url, FACES[:4], [MODEL], limits={"fp32": 1e-5})


def test_model_without_the_outputs_works_and_refuses_norms(repository, start_triton) -> None:
    write_model(repository, "old")
    server = start_triton(repository, ["old"], config_name="")
    with TritonEmbedder(server.grpc_url, "old") as embedder:
        assert embedder.encode(FACES).shape == (24, 64)
        assert embedder.contract_prefix is None
        with pytest.raises(WrongUse, match="has no output `norm`"):
            embedder.encode_with_norms(FACES)


def test_a_chain_does_not_mix_a_server_without_overlays_with_another_model(
    start_triton: Callable[..., TritonProcess], tmp_path: Path
) -> None:
    served, other = (write_folder(tmp_path / name / "tiny", seed=seed) for seed, name in enumerate(("served", "other")))
    assemble(served, repository := copy_repository(tmp_path))
    bare = start_triton(repository, ["arcface"], config_name="")
    local = {folder: OnnxEngine(models_dir=folder.parent, device="cpu") for folder in (served, other)}
    with TritonEmbedder(bare.grpc_url) as embedder:
        assert embedder.contract_id is None
        with pytest.raises(ContractMismatch, match="a chain must not mix them"):
            FallbackEmbedder([embedder, local[other]]).encode(FACES)
        rows = FallbackEmbedder([embedder, local[served]]).encode(FACES)
    np.testing.assert_allclose(rows, local[served].encode(FACES), atol=1e-5)


def test_mismatch_never_falls_back(repository, server) -> None:
    with FallbackEmbedder([client(server, "grpc"), ("spare", _no_spare)]) as chain:
        chain.encode(FACES[:4])
        load(server, repository, RIGHT)
        with pytest.raises(ContractMismatch):
            chain.encode(FACES[:4])


def _no_spare() -> TritonEmbedder:
    raise BackendUnavailable("nobody is to ask the spare")
