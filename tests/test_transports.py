"""Every transport to a real server gives one answer: gRPC and HTTP, wire and shared memory, threads and asyncio."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from arcface_clients import AsyncTritonEmbedder, TritonEmbedder
from arcface_clients.errors import (
    ClientUnusable,
    ConfigError,
    DeadlineExceeded,
    InferenceFailed,
    ModelNotReady,
    ServerUnreachable,
)
from arcface_clients.faces.synthetic import synthetic_faces
from deadlines import HANG_S
from fault_proxy import FaultProxy, Faults
from odd_models import MARKED

FACES = synthetic_faces(11)
TRANSPORTS = [("grpc", False), ("grpc", True), ("http", False), ("http", True)]
each_transport = pytest.mark.parametrize(
    ("protocol", "shared_memory"), TRANSPORTS, ids=["grpc", "grpc-shm", "http", "http-shm"]
)
each_protocol = pytest.mark.parametrize("protocol", ["grpc", "http"])


@pytest.fixture(scope="module")
def truth(odd_server) -> np.ndarray:
    with TritonEmbedder(odd_server.grpc_url, "good", shared_memory=False) as embedder:
        return np.concatenate([embedder.encode(face) for face in FACES])


def url(server, protocol: str) -> str:
    return f"grpc://{server.grpc_url}" if protocol == "grpc" else f"http://{server.http_url}"


@each_transport
@pytest.mark.parametrize("count", [0, 1, 8, 9, 50])
def test_all_transports_agree(odd_server, truth, protocol, shared_memory, count) -> None:
    order = np.arange(count) % len(FACES)
    with TritonEmbedder(url(odd_server, protocol), "good", shared_memory=shared_memory, in_flight=3) as embedder:
        embeddings = embedder.encode(FACES[order])
        assert (embedder.shared_memory.kind is not None) is shared_memory
    np.testing.assert_array_equal(embeddings.shape, (count, 64))
    np.testing.assert_allclose(embeddings, truth[order], atol=1e-6)
    assert embeddings.flags.writeable


@each_transport
def test_asyncio_agrees(odd_server, truth, protocol, shared_memory) -> None:
    async def work() -> list[np.ndarray]:
        async with AsyncTritonEmbedder(url(odd_server, protocol), "good", shared_memory=shared_memory) as embedder:
            assert (await embedder.ensure_ready()).contract_id == embedder.contract_id == "odd"
            many = [embedder.encode(FACES[i:]) for i in range(len(FACES))]
            return [*await asyncio.gather(*many), await embedder.encode(FACES[:0])]

    *answers, nothing = asyncio.run(work())
    for i, answer in enumerate(answers):
        np.testing.assert_allclose(answer, truth[i:], atol=1e-6)
    assert nothing.shape == (0, 64)


@each_transport
def test_model_that_fails_gives_its_own_words(odd_server, protocol, shared_memory) -> None:
    with (
        TritonEmbedder(url(odd_server, protocol), "failing", shared_memory=shared_memory) as embedder,
        pytest.raises(InferenceFailed, match="the network gave up on purpose"),
    ):
        embedder.encode(FACES)


@each_transport
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nan", r"1 of 5 embeddings that are not of unit length \(row 4: norm nan\)"),
        ("long", r"5 of 5 .*\(row 0: norm 3\).*arcface parity"),
    ],
)
def test_rows_that_are_no_unit_embeddings_are_refused(odd_server, protocol, shared_memory, model, words) -> None:
    with (
        TritonEmbedder(url(odd_server, protocol), model, shared_memory=shared_memory) as embedder,
        pytest.raises(InferenceFailed, match=words),
    ):
        embedder.encode(FACES[:5])


@each_transport
def test_late_answer_is_an_error_and_harms_no_later_one(
    odd_server, slow_is_held, truth, protocol, shared_memory
) -> None:
    with TritonEmbedder(url(odd_server, protocol), "slow", shared_memory=shared_memory, timeout_s=1) as embedder:
        embedder.ensure_ready()
        with (
            slow_is_held(),
            pytest.raises(DeadlineExceeded, match=r"no answer from 'slow' at .* within 1 s. Raise timeout_s"),
        ):
            embedder.encode(MARKED)
        for _ in range(20):  # while the server still works on the lost one, and writes its answer somewhere
            try:
                np.testing.assert_allclose(embedder.encode(FACES[:8]), truth[:8], atol=1e-6)
            except DeadlineExceeded:
                time.sleep(0.1)
            else:
                break
        else:
            pytest.fail("the server did not come back")
        for _ in range(5):
            np.testing.assert_allclose(embedder.encode(FACES[:8]), truth[:8], atol=1e-6)


@each_protocol
def test_cancelled_task_cancels_its_request_and_the_client_lives_on(odd_server, slow_is_held, truth, protocol) -> None:
    async def work() -> np.ndarray:
        async with AsyncTritonEmbedder(url(odd_server, protocol), "slow") as embedder:
            await embedder.ensure_ready()
            with slow_is_held(), pytest.raises(asyncio.TimeoutError):  # before there is an answer
                await asyncio.wait_for(embedder.encode(MARKED), 0.2)
            return await embedder.encode(FACES)

    np.testing.assert_allclose(asyncio.run(work()), truth, atol=1e-6)


@each_transport
def test_close_ends_requests_under_way(odd_server, slow_is_held, protocol, shared_memory) -> None:
    embedder = TritonEmbedder(url(odd_server, protocol), "slow", shared_memory=shared_memory)
    embedder.ensure_ready()
    raised: list[BaseException] = []

    def work() -> None:
        try:
            embedder.encode(MARKED)
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=work)
    with slow_is_held() as wait_until_begun:
        thread.start()
        wait_until_begun()
        embedder.close()
        thread.join(HANG_S)  # before there is an answer
    assert [type(exc) for exc in raised] == [ClientUnusable]


@each_protocol
def test_dead_server_and_unknown_model_are_told_apart(odd_server, protocol) -> None:
    async def ask(address: str) -> None:
        async with AsyncTritonEmbedder(address, "nosuch", retry_for_s=0) as embedder:
            await embedder.encode(FACES)

    for address, error in (
        (url(odd_server, protocol), ModelNotReady),
        (f"{protocol}://127.0.0.1:1", ServerUnreachable),
    ):
        with pytest.raises(error, match=f"at {address}|{address} does not serve 'nosuch'"):
            TritonEmbedder(address, "nosuch", retry_for_s=0).encode(FACES)
        with pytest.raises(error, match=f"at {address}|{address} does not serve 'nosuch'"):
            asyncio.run(ask(address))


@each_protocol
def test_server_that_is_slow_to_greet_is_connected_to_at_the_first_try(odd_server, truth, protocol) -> None:
    host, port = getattr(odd_server, f"{protocol}_url").split(":")
    proxy = FaultProxy((host, int(port)))
    proxy.faults = Faults(greeting_s=0.8)
    address = f"{protocol}://127.0.0.1:{proxy.port}"

    async def ask() -> np.ndarray:
        async with AsyncTritonEmbedder(address, "good", retry_for_s=0, shared_memory=False) as embedder:
            return await embedder.encode(FACES[:2])

    with TritonEmbedder(address, "good", retry_for_s=0, shared_memory=False) as embedder:
        np.testing.assert_allclose(embedder.encode(FACES[:2]), truth[:2], atol=1e-6)
    np.testing.assert_allclose(asyncio.run(ask()), truth[:2], atol=1e-6)
    proxy.close()


def test_grpc_port_is_recognised_by_http(odd_server) -> None:
    with (
        TritonEmbedder(f"http://{odd_server.grpc_url}", retry_for_s=0) as embedder,
        pytest.raises(ServerUnreachable, match=rf"is the gRPC port: grpc://{odd_server.grpc_url}"),
    ):
        embedder.ensure_ready()


def test_width_that_the_server_leaves_open_is_asked_for(odd_server) -> None:
    with TritonEmbedder(odd_server.grpc_url, "open") as embedder:
        assert embedder.embedding_dim == 64
        assert embedder.encode(FACES[:0]).shape == (0, 64)


def test_model_of_another_contract_is_refused_with_both_shapes(odd_server) -> None:
    with (
        TritonEmbedder(odd_server.grpc_url, "foreign") as embedder,
        pytest.raises(ConfigError, match=r"expected `face` TYPE_UINT8 .* got `face` TYPE_FP32 \[112, 112, 3\]"),
    ):
        embedder.encode(FACES)


@each_protocol
@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compression_changes_nothing(odd_server, truth, protocol, compression) -> None:
    with TritonEmbedder(url(odd_server, protocol), "good", compression=compression, shared_memory=False) as embedder:
        np.testing.assert_allclose(embedder.encode(FACES), truth, atol=1e-6)


def test_loop_and_client_belong_together(odd_server) -> None:
    embedder = AsyncTritonEmbedder(odd_server.grpc_url, "good")

    async def use() -> None:
        await embedder.encode(FACES[:1])

    async def use_and_close() -> None:
        await use()
        await embedder.close()

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(use())
        with pytest.raises(ClientUnusable, match="belongs to another event loop"):
            asyncio.run(use())
        loop.run_until_complete(use_and_close())
        with pytest.raises(ClientUnusable, match="closed"):
            loop.run_until_complete(use())
    finally:
        loop.close()


def test_pickled_client_arrives_as_one_of_its_own(odd_server, truth) -> None:
    import pickle

    with TritonEmbedder(odd_server.grpc_url, "good", in_flight=2) as embedder:
        embedder.encode(FACES)
        with pickle.loads(pickle.dumps(embedder)) as other:
            assert (other.options.in_flight, other.options.model) == (2, "good")
            np.testing.assert_allclose(other.encode(FACES), truth, atol=1e-6)
