"""The fallback chain: what falls back, what never does, and the way back to the first engine."""

import logging
import threading

import numpy as np
import pytest

from arcface_clients.engines.fallback import FallbackEmbedder
from arcface_clients.engines.protocol import EmbeddingEngine
from arcface_clients.errors import (
    BackendUnavailable,
    ConfigError,
    ContractMismatch,
    DeadlineExceeded,
    DependencyMissing,
    GateFailed,
    InferenceFailed,
    InvalidFaces,
    ModelNotReady,
    ServerUnreachable,
)
from deadlines import HANG_S

FACES = np.zeros((3, 112, 112, 3), np.uint8)


class Engine:
    """A real engine of the simplest kind: a constant unit vector, and an error when it was told to have one."""

    def __init__(self, name, contract="c1", dim=4):
        self.name, self.contract, self.dim = name, contract, dim
        self.error: Exception | None = None
        self.calls = self.loads = 0
        self.closed = False

    def _check(self):
        if self.error is not None:
            raise self.error

    @property
    def embedding_dim(self):
        self._check()
        return self.dim

    @property
    def contract_id(self):
        self._check()
        return self.contract

    def ensure_ready(self):
        self.loads += 1
        self._check()

    def encode(self, faces):
        self.calls += 1
        self._check()
        return np.tile(np.eye(self.dim, dtype=np.float32)[0], (len(faces), 1))

    def close(self):
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pair(clock):
    first, second = Engine("triton"), Engine("onnx")
    return first, second, FallbackEmbedder([first, second], retry_after_s=5, retry_after_max_s=20, clock=clock)


def test_chain_is_an_engine_itself(pair):
    assert isinstance(pair[2], EmbeddingEngine)


def test_first_engine_answers_while_it_is_there(pair):
    _, second, chain = pair
    assert chain.encode(FACES).shape == (3, 4)
    assert (chain.last_engine, chain.reason, second.calls) == ("triton", "first of the chain", 0)


@pytest.mark.parametrize(
    "error", [BackendUnavailable, ServerUnreachable, ModelNotReady, DeadlineExceeded, DependencyMissing]
)
def test_an_engine_that_is_not_there_is_passed_over(pair, error):
    first, _, chain = pair
    first.error = error("gone")
    assert chain.encode(FACES).shape == (3, 4)
    assert (chain.last_engine, chain.reason) == ("onnx", f"triton: {error.__name__}: gone")


@pytest.mark.parametrize(
    "error", [InvalidFaces, ConfigError, ContractMismatch, InferenceFailed, GateFailed, MemoryError]
)
def test_other_errors_never_fall_back(pair, error):
    first, second, chain = pair
    chain.ensure_ready()
    first.error = error("yours")
    with pytest.raises(error, match="yours"):
        chain.encode(FACES)
    assert second.calls == 0


def test_bad_faces_are_refused_before_any_engine_is_asked(pair):
    first, second, chain = pair
    with pytest.raises(InvalidFaces):
        chain.encode(np.zeros((1, 3, 112, 112), np.uint8))
    assert (first.loads, second.loads) == (0, 0)


def test_fallback_is_logged_once_for_many_calls(pair, caplog):
    first, _, chain = pair
    first.error = ServerUnreachable("no server at localhost:8001")
    with caplog.at_level(logging.INFO):
        for _ in range(10):
            chain.encode(FACES)
    assert caplog.messages == [
        "triton is unavailable, will retry in 5 s: ServerUnreachable: no server at localhost:8001",
        "onnx answers (triton: ServerUnreachable: no server at localhost:8001)",
    ]


def test_circuit_breaker_backs_off_and_goes_back_to_the_first_engine(pair, clock):
    first, _, chain = pair
    first.error = ServerUnreachable("gone")
    asked_at = []
    for second_of_time in range(60):
        clock.now = float(second_of_time)
        before = first.loads + first.calls
        chain.encode(FACES)
        if first.loads + first.calls > before:
            asked_at.append(second_of_time)
    assert asked_at == [0, 5, 15, 35, 55]  # 5 s, doubled, at most 20 s
    first.error = None
    clock.now = 75.0
    chain.encode(FACES)
    assert (chain.last_engine, chain.reason) == ("triton", "first of the chain")
    first.error = ServerUnreachable("gone again")
    chain.encode(FACES)
    clock.now = 80.0  # the back-off began anew
    first.error = None
    chain.encode(FACES)
    assert chain.last_engine == "triton"


def test_when_all_are_left_alone_they_are_all_asked(pair):
    first, second, chain = pair
    first.error, second.error = ServerUnreachable("a"), DependencyMissing("b")
    with pytest.raises(BackendUnavailable) as caught:
        chain.encode(FACES)
    assert str(caught.value) == "no engine of the chain is available.\ntriton: a\nonnx: b"
    second.error = None
    assert len(chain.encode(FACES)) == 3


def test_two_contracts_in_one_chain_are_refused_at_first_use_not_in_an_outage():
    chain = FallbackEmbedder([Engine("triton", "a" * 64), Engine("onnx", "b" * 64)])
    with pytest.raises(ContractMismatch) as caught:
        chain.encode(FACES)
    assert str(caught.value).startswith(
        "engine onnx produces embeddings of contract bbbbbbbbbbbb…, engine triton of aaaaaaaaaaaa…: "
        "a chain must not mix them."
    )


def test_engine_that_comes_back_with_another_contract_is_refused(pair, clock):
    first, _, chain = pair
    chain.encode(FACES)
    first.error = ServerUnreachable("restarting")
    chain.encode(FACES)
    first.error, first.contract, clock.now = None, "c2", 100.0
    with pytest.raises(ContractMismatch):
        chain.encode(FACES)


def test_widths_are_compared_where_contracts_are_unknown():
    first, second = Engine("triton", None, dim=4), Engine("onnx", None, dim=8)
    chain = FallbackEmbedder([first, second])
    chain.encode(FACES)
    first.error = ServerUnreachable("gone")
    with pytest.raises(ContractMismatch, match="width 8, engine triton of 4"):
        chain.encode(FACES)


def test_an_unknown_contract_is_said_once(caplog):
    chain = FallbackEmbedder([Engine("triton", None), Engine("onnx")])
    for _ in range(3):
        chain.encode(FACES)
    assert caplog.messages == [
        "triton does not state its contract: only its width is compared with the rest of the chain"
    ]


def test_engine_that_fails_its_validation_is_put_out_of_the_chain_loudly(caplog):
    def validate(name, engine):
        if name == "triton":
            raise GateFailed("drift too large")

    first, second = Engine("triton"), Engine("onnx")
    chain = FallbackEmbedder([first, second], validate=validate)
    chain.encode(FACES)
    chain.encode(FACES)
    assert (chain.last_engine, chain.reason, first.calls) == ("onnx", "triton: drift too large", 0)
    assert [r.message for r in caplog.records if r.levelno == logging.ERROR] == [
        "triton failed its validation and is not used: drift too large"
    ]


def test_gate_fails_when_nothing_else_is_left():
    def validate(name, engine):
        raise GateFailed("drift too large")

    with pytest.raises(GateFailed, match="drift too large"):
        FallbackEmbedder([Engine("triton")], validate=validate).ensure_ready()


def test_engines_can_be_made_when_they_are_first_needed():
    made = []

    def make():
        made.append(1)
        if len(made) == 1:
            raise DependencyMissing("not installed")
        return Engine("late")

    first = Engine("triton")
    first.error = ServerUnreachable("gone")
    chain = FallbackEmbedder([first, ("late", make)])
    assert not made
    with pytest.raises(BackendUnavailable):
        chain.encode(FACES)
    assert len(chain.encode(FACES)) == 3


@pytest.mark.parametrize("chain", [[], [Engine("a"), Engine("a")]])
def test_impossible_chains_are_refused(chain):
    with pytest.raises(ConfigError):
        FallbackEmbedder(chain)


def test_many_threads_get_all_their_answers_while_the_first_engine_comes_and_goes(pair, clock):
    first, second, chain = pair
    wrong = []

    def work():
        for _ in range(200):
            if chain.encode(FACES).shape != (3, 4):
                wrong.append(1)

    def flap():
        for i in range(200):
            first.error = ServerUnreachable("gone") if i % 2 else None
            clock.now += 7

    threads = [threading.Thread(target=work) for _ in range(6)] + [threading.Thread(target=flap)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    assert first.calls + second.calls >= 1200


def test_failures_at_the_same_time_count_as_one(clock):
    barrier = threading.Barrier(4)

    class Slow(Engine):
        def encode(self, faces):
            barrier.wait(HANG_S)
            raise ServerUnreachable("gone")

    chain = FallbackEmbedder([Slow("triton"), Engine("onnx")], retry_after_s=5, clock=clock)
    chain.ensure_ready()
    threads = [threading.Thread(target=chain.encode, args=(FACES,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    clock.now = 4.9
    assert not chain._may_ask(chain._states[0], last_resort=False)
    clock.now = 5.0
    assert chain._may_ask(chain._states[0], last_resort=False)


def test_closing_closes_every_engine(pair):
    with pair[2] as chain:
        chain.encode(FACES)
    assert pair[0].closed and pair[1].closed
