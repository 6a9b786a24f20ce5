"""Whatever a server answers, only documented errors leave `encode`, and a chain falls back where it should."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import pytest

from arcface_clients import AsyncTritonEmbedder, FakeEmbedder, FallbackEmbedder, TritonEmbedder
from arcface_clients.errors import (
    ArcFaceError,
    BackendUnavailable,
    ConfigError,
    ContractMismatch,
    InferenceFailed,
    InvalidAnswer,
    ModelNotReady,
    Overloaded,
    ServerUnreachable,
)
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.triton.address import Address
from lying_server import CONFIG, WORDS, LyingServer, http, outputs, truth
from odd_models import LEFT

FACES = synthetic_faces(4)
ROWS = np.eye(4, 64, dtype=np.float32)
FOUR = np.tile(WORDS, (4, 1))
Lie = Callable[[int, str], bytes]


def changed(**keys: object) -> Lie:
    return lambda count, request_id: truth(count, request_id, **keys)


def says(reply: bytes) -> Lie:
    return lambda count, request_id: reply


def answers(rows: np.ndarray, words: np.ndarray = FOUR) -> Lie:
    return lambda count, request_id: outputs(rows, words, request_id)


def words(text: str, status: str = "500 Internal Server Error") -> Lie:
    return says(http(json.dumps({"error": text}).encode(), status=status))


ASKED = {"binary_data_size": 1024}
LIES: dict[str, tuple[Lie, type[ArcFaceError]]] = {
    "HTML": (says(http(b"<html><body>It works!</body></html>")), InvalidAnswer),
    "nothing": (says(http(b"")), InvalidAnswer),
    "no JSON": (says(http(b"{")), InvalidAnswer),
    "a number": (says(http(b"1")), InvalidAnswer),
    "a list": (says(http(b"[]")), InvalidAnswer),
    "null outputs": (says(http(b'{"outputs": null}')), InvalidAnswer),
    "nested without end": (says(http(b"[" * 200_000)), InvalidAnswer),
    "not UTF-8": (says(http(b'{"outputs": "\xff\xfe"}')), InvalidAnswer),
    "output that is text": (says(http(b'{"outputs": ["embedding"]}')), InvalidAnswer),
    "output without a shape": (says(http(b'{"outputs": [{"name": "embedding", "datatype": "FP32"}]}')), InvalidAnswer),
    "another's id": (changed(id="another"), InvalidAnswer),
    "no id": (changed(id=None), InvalidAnswer),
    "negative size": (changed(parameters={"binary_data_size": -1}), InvalidAnswer),
    "size beyond the end": (changed(parameters={"binary_data_size": 10**12}), InvalidAnswer),
    "size that is text": (changed(parameters={"binary_data_size": "many"}), InvalidAnswer),
    "parameters that are a list": (changed(parameters=[1]), InvalidAnswer),
    "endless size": (changed(parameters={"binary_data_size": float("inf")}), InvalidAnswer),
    "shape of text": (changed(shape=["four", "wide"]), InvalidAnswer),
    "header length of text": (
        says(http(b"{}", head="Inference-Header-Content-Length: long\r\n")),
        InvalidAnswer,
    ),
    "huge Content-Length": (says(http(b"{}", length=999999 * 10**15)), InvalidAnswer),
    "cut short": (says(http(b"{}", length=999999)), ServerUnreachable),
    "garbage for a status": (says(b"\x00\x01\x02\x03\r\n\r\n"), ServerUnreachable),
    "chunks of garbage": (says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), ServerUnreachable),
    "wrong dtype": (changed(datatype="FP64"), InferenceFailed),
    "negative shape": (changed(shape=[-4, -64]), InferenceFailed),
    "three dimensions": (changed(shape=[4, 8, 8]), InferenceFailed),
    "other name": (changed(name="features"), InferenceFailed),
    "too few rows": (answers(ROWS[:3]), InferenceFailed),
    "another width": (answers(np.eye(4, 32, dtype=np.float32)), InferenceFailed),
    "NaN": (answers(ROWS * np.float32("nan")), InferenceFailed),
    "infinite": (answers(ROWS + np.float32("inf")), InferenceFailed),
    "not of unit length": (answers(ROWS * 2), InferenceFailed),
    "rows that name nobody": (answers(ROWS, FOUR[:0]), InferenceFailed),
    "rows of another contract": (answers(ROWS, FOUR + 1), ContractMismatch),
    "rows of two contracts": (answers(ROWS, FOUR + np.eye(4, dtype=np.int32)), ContractMismatch),
    "an error": (words("the network gave up"), InferenceFailed),
    "an error of HTML": (says(http(b"<html>", status="500 Oops")), InferenceFailed),
    "an error that is a list": (says(http(b"[1]", status="400 Bad Request")), InferenceFailed),
    "a gateway without its server": (says(http(b"Bad Gateway", status="502 Bad Gateway")), ModelNotReady),
    "a stub that died": (words("Stub process 'liar_0_0' is not healthy."), ModelNotReady),
    "a full queue": (words("Exceeds maximum queue size", "503 Service Unavailable"), Overloaded),
    "dropped from the queue": (words("Request timeout expired", "503 Service Unavailable"), Overloaded),
}


@pytest.fixture
def liar() -> Iterator[LyingServer]:
    server = LyingServer()
    yield server
    server.close()


def client(liar: LyingServer) -> TritonEmbedder:
    return TritonEmbedder(liar.url, "liar", retry_for_s=0, timeout_s=5, shared_memory=False)


def encode_async(liar: LyingServer) -> np.ndarray:
    async def ask() -> np.ndarray:
        options = {"retry_for_s": 0, "timeout_s": 5, "shared_memory": False}
        async with AsyncTritonEmbedder(liar.url, "liar", **options) as embedder:
            return await embedder.encode(FACES)

    return asyncio.run(ask())


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_a_documented_error_and_the_chain_does_what_the_error_says(liar, name) -> None:
    lie, error = LIES[name]
    with (
        client(liar) as embedder,
        FallbackEmbedder([client(liar), ("spare", lambda: FakeEmbedder(64, contract_id=LEFT))]) as chain,
    ):
        np.testing.assert_array_equal(embedder.encode(FACES), ROWS)
        liar.lie = lie
        with pytest.raises(ArcFaceError) as caught:
            embedder.encode(FACES)
        assert type(caught.value) is error, caught.value
        with pytest.raises(ArcFaceError) as caught:
            encode_async(liar)
        unreachable = (ServerUnreachable, InvalidAnswer)  # aiohttp tells fewer of them apart
        assert isinstance(caught.value, unreachable if error in unreachable else error), caught.value
        if issubclass(error, BackendUnavailable):
            assert chain.encode(FACES).shape == (4, 64)
            assert chain.last_engine == "spare"
        else:
            with pytest.raises(error):
                chain.encode(FACES)
        liar.lie = truth
        np.testing.assert_array_equal(embedder.encode(FACES), ROWS)  # the lie has left nothing behind


@pytest.mark.parametrize(
    "config",
    [b"<html>", b"[]", b"{}", b'"text"', b"[" * 200_000, json.dumps({**CONFIG, "name": "other"}).encode()],
)
def test_a_configuration_that_is_none_is_an_invalid_answer(liar, config) -> None:
    liar.config = http(config)
    with client(liar) as embedder, pytest.raises(InvalidAnswer, match="expected a Triton server's answer"):
        embedder.encode(FACES)


@pytest.mark.parametrize("key", ["input", "output", "parameters", "max_batch_size", "ensemble_scheduling"])
@pytest.mark.parametrize("value", [1, "text", [1], {"a": 1}, None])
def test_a_configuration_of_the_wrong_shape_is_a_documented_error(liar, key, value) -> None:
    liar.config = http(json.dumps({**CONFIG, key: value}).encode())
    with client(liar) as embedder, suppress(ArcFaceError):  # whatever else would leave is the fault
        embedder.encode(FACES)


@pytest.mark.parametrize(("width", "batch"), [(10**12, 8), (64, -8), (64, 10**12)])
def test_sizes_that_no_model_has_are_refused_before_memory_is_reserved(liar, width, batch) -> None:
    output = [{"name": "embedding", "data_type": "TYPE_FP32", "dims": [width]}]
    liar.config = http(json.dumps({**CONFIG, "max_batch_size": batch, "output": output}).encode())
    with client(liar) as embedder, pytest.raises(ConfigError, match="expected neither to be above 65536"):
        embedder.encode(FACES)


@pytest.mark.parametrize("reply", [b"\xff" * 40, b"", b"<html>"])
def test_garbage_over_grpc_is_a_documented_error(reply) -> None:
    import grpc
    from tritonclient.grpc import model_config_pb2, service_pb2

    inputs = [model_config_pb2.ModelInput(name="face", data_type="TYPE_UINT8", dims=[112, 112, 3])]
    embedding = model_config_pb2.ModelOutput(name="embedding", data_type="TYPE_FP32", dims=[64])
    config = model_config_pb2.ModelConfig(name="liar", max_batch_size=8, input=inputs, output=[embedding])
    methods = {
        "ModelConfig": service_pb2.ModelConfigResponse(config=config).SerializeToString(),
        "ModelInfer": reply,
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(lambda request, context, answer=answer: answer)
        for name, answer in methods.items()
    }
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    async def ask() -> None:
        async with AsyncTritonEmbedder(f"127.0.0.1:{port}", "liar", retry_for_s=0, shared_memory=False) as embedder:
            await embedder.encode(FACES)

    try:
        with (
            TritonEmbedder(f"127.0.0.1:{port}", "liar", retry_for_s=0, shared_memory=False) as embedder,
            pytest.raises(InvalidAnswer if reply else InferenceFailed),
        ):
            embedder.encode(FACES)
        with pytest.raises(InvalidAnswer if reply else InferenceFailed):
            asyncio.run(ask())
    finally:
        server.stop(None)


def test_an_answer_that_is_delivered_twice_shifts_no_later_one(liar) -> None:
    former = [b""]

    def twice(count: int, request_id: str) -> bytes:
        again, former[0] = former[0], truth(count, request_id)
        return (again if liar.asked % 5 == 0 else b"") + former[0]

    liar.lie = twice
    with TritonEmbedder(liar.url, "liar", retry_for_s=5, shared_memory=False) as embedder:
        for i in range(100):
            np.testing.assert_array_equal(embedder.encode(FACES[: 1 + i % 4]), ROWS[: 1 + i % 4])

    async def ask() -> None:
        async with AsyncTritonEmbedder(liar.url, "liar", retry_for_s=5, shared_memory=False) as embedder:
            for i in range(100):
                np.testing.assert_array_equal(await embedder.encode(FACES[: 1 + i % 4]), ROWS[: 1 + i % 4])

    asyncio.run(ask())


def test_faces_and_keys_follow_no_redirection(liar) -> None:
    elsewhere = LyingServer()
    location = f"Location: {elsewhere.url}/v2/models/liar/infer\r\n"
    liar.lie = says(http(b"", status="307 Temporary Redirect", head=location))
    try:
        with client(liar) as embedder, pytest.raises(InferenceFailed, match="HTTP 307"):
            embedder.encode(FACES)
        with pytest.raises(InferenceFailed, match="HTTP 307"):
            encode_async(liar)
        assert elsewhere.asked == 0
    finally:
        elsewhere.close()


def test_one_deadline_holds_for_all_addresses_of_a_name_and_a_dead_one_is_passed_over(liar, monkeypatch) -> None:
    with ExitStack() as stack:
        dead = [stack.enter_context(_full_listener()) for _ in range(5)]
        places, look_up = [], socket.getaddrinfo

        def many(host, *rest, **options):
            if host != "many.example":
                return look_up(host, *rest, **options)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]

        monkeypatch.setattr(socket, "getaddrinfo", many)
        options = {"retry_for_s": 0, "timeout_s": 2, "shared_memory": False}
        with TritonEmbedder("http://many.example:8000", "liar", **options) as embedder:
            places[:] = dead
            started = time.monotonic()
            with pytest.raises(ServerUnreachable, match="no connection"):  # a job then goes to its next server
                embedder.encode(FACES)
            assert time.monotonic() - started < 8  # 2 s for all five, not for each
            places.append(("127.0.0.1", Address.parse(liar.url).port))
            np.testing.assert_array_equal(embedder.encode(FACES), ROWS)


def test_a_host_that_is_down_is_unreachable_and_not_busy() -> None:
    """Also over asyncio; what is only busy is asked again, what is away is not while there are others."""

    async def ask(url: str) -> None:
        async with AsyncTritonEmbedder(url, "liar", retry_for_s=0, timeout_s=2, shared_memory=False) as embedder:
            await embedder.encode(FACES)

    with _full_listener() as (host, port), pytest.raises(ServerUnreachable, match="no connection within 2 s"):
        asyncio.run(ask(f"http://{host}:{port}"))


@contextmanager
def _full_listener() -> Iterator[tuple[str, int]]:
    """The address of a socket that lets nobody in any more and says nothing, as a host that is down."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        place = listener.getsockname()
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(place)
        time.sleep(0.1)
        yield place


def test_total_timeout_bounds_all_attempts_of_a_call_and_an_overload_is_tried_again(liar) -> None:
    liar.lie = LIES["a full queue"][0]
    options = {"retry_for_s": 60, "timeout_s": 30, "total_timeout_s": 1.0, "shared_memory": False}
    with TritonEmbedder(liar.url, "liar", **options) as embedder:
        started = time.monotonic()
        with pytest.raises(BackendUnavailable, match=r"total_timeout_s = 1 s|too much to do"):
            embedder.encode(FACES)
        assert time.monotonic() - started < 5
        assert liar.asked > 2
        liar.lie = truth
        np.testing.assert_array_equal(embedder.encode(FACES), ROWS)
