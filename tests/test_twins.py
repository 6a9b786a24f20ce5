"""FakeEmbedder and AsyncTritonEmbedder are twins of TritonEmbedder: every public member does the same on all three."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from typing import Any

import numpy as np
import pytest

from arcface_clients import AsyncTritonEmbedder, FakeEmbedder, FallbackEmbedder, TritonEmbedder
from arcface_clients.errors import ClientUnusable, ConfigError, InvalidFaces, ServerUnreachable
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.triton.options import ClientOptions

FACES = synthetic_faces(11)
SIZE, WIDTH = 8, 64  # of the model `good` on odd_server, and of the fake
Make = Callable[..., TritonEmbedder]


def encodes(make: Make) -> None:
    with make() as embedder:
        rows = embedder.encode(FACES)
        assert (rows.shape, rows.dtype, rows.flags.writeable) == ((11, WIDTH), np.float32, True)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(np.concatenate([embedder.encode(face) for face in FACES]), rows, atol=1e-5)
        assert embedder.encode([]).shape == (0, WIDTH)
        with pytest.raises(InvalidFaces, match="looks like NCHW"):
            embedder.encode(np.zeros((1, 3, 112, 112), np.uint8))


def encodes_with_norms(make: Make) -> None:
    with make() as embedder:
        rows, norms = embedder.encode_with_norms(FACES)
        assert (norms.shape, norms.dtype, norms.flags.writeable) == ((11,), np.float32, True)
        assert (norms > 1).all()
        np.testing.assert_allclose(rows, embedder.encode(FACES), atol=1e-5)
        assert [part.shape for part in embedder.encode_with_norms([])] == [(0, WIDTH), (0,)]
        assert embedder.encode_with_norms(FACES[:2])[1].flags.writeable


def tells_what_rows_name_themselves(make: Make) -> None:
    with make() as embedder:
        assert embedder.contract_prefix is None
        embedder.encode(FACES)
        assert len(embedder.contract_prefix) == 32


def streams(make: Make) -> None:
    with make() as embedder:
        rows = embedder.encode(FACES)
        items = [FACES[:3], FACES[3], FACES[4:4], FACES[4:]]
        answers = list(embedder.encode_stream(iter(items), batch_size=4, retry_for_s=1))
        assert [answer.shape for answer in answers] == [(3, WIDTH), (WIDTH,), (0, WIDTH), (7, WIDTH)]
        np.testing.assert_allclose(np.concatenate([a.reshape(-1, WIDTH) for a in answers]), rows, atol=1e-5)
        raw, norms = next(iter(embedder.encode_stream([FACES], normalized=False))), embedder.encode_with_norms(FACES)[1]
        np.testing.assert_allclose(raw, rows * norms[:, None], rtol=1e-4, atol=1e-4)
        with pytest.raises(ConfigError, match=rf"batch_size is 9; expected 1\.\.{SIZE}"):
            embedder.encode_stream(items, batch_size=SIZE + 1)


def gets_ready(make: Make) -> None:
    with make() as embedder:
        assert embedder.ensure_ready() == embedder.served
    with FallbackEmbedder([("one", make)]) as chain:
        assert chain.ensure_ready() is None
        assert (chain.last_engine, chain.embedding_dim, chain.encode(FACES).shape) == ("one", WIDTH, (11, WIDTH))


def closes(make: Make) -> None:
    embedder = make()
    embedder.encode(FACES)
    embedder.close()
    embedder.close()
    for use in (lambda: embedder.encode(FACES), lambda: list(embedder.encode_stream([FACES])), embedder.ensure_ready):
        with pytest.raises(ClientUnusable, match="closed; make a new one"):
            use()


def tells(read: Callable[[TritonEmbedder], object], expected: object) -> Callable[[Make], None]:
    def check(make: Make) -> None:
        with make() as embedder:
            assert read(embedder) == expected

    return check


def tells_what_is_served(make: Make) -> None:
    with make() as embedder:
        served = embedder.served
        assert (served.max_batch_size, served.embedding_dim, served.gpu) == (SIZE, WIDTH, None)
        assert served.contract_id == embedder.contract_id is not None
        assert served.name == embedder.options.model


def tells_its_shared_memory(make: Make) -> None:
    with make() as embedder:
        assert str(embedder.shared_memory) == "the wire: not connected yet"
        embedder.encode(FACES)
        assert str(embedder.shared_memory) == "the wire: shared memory is switched off"


def tells_its_options(make: Make) -> None:
    with make() as embedder:
        assert isinstance(embedder.options, ClientOptions)
        assert str(embedder.address) in repr(embedder)


MEMBERS: dict[str, Callable[[Make], None]] = {
    "address": tells_its_options,
    "close": closes,
    "contract_id": tells_what_is_served,
    "contract_prefix": tells_what_rows_name_themselves,
    "embedding_dim": tells(lambda embedder: embedder.embedding_dim, WIDTH),
    "encode": encodes,
    "encode_stream": streams,
    "encode_with_norms": encodes_with_norms,
    "ensure_ready": gets_ready,
    "gpu_shared_memory": tells(lambda embedder: embedder.gpu_shared_memory, None),
    "max_batch_size": tells(lambda embedder: embedder.max_batch_size, SIZE),
    "options": tells_its_options,
    "served": tells_what_is_served,
    "shared_memory": tells_its_shared_memory,
    "takes_gpu_faces": tells(lambda embedder: embedder.takes_gpu_faces, True),
}


class Awaited:
    """An AsyncTritonEmbedder with each call awaited in an event loop of its own: what a plain one's tests can use."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._inner = AsyncTritonEmbedder(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        if name in ("served", "embedding_dim", "contract_id", "max_batch_size"):
            self._loop.run_until_complete(self._inner.ensure_ready())
        member = getattr(self._inner, name)
        if inspect.iscoroutinefunction(member):
            return lambda *a, **k: self._loop.run_until_complete(member(*a, **k))
        return member

    def encode_stream(self, items: Any, **options: Any) -> Any:
        async def collect() -> list[np.ndarray]:
            return [row async for row in self._inner.encode_stream(items, **options)]

        return self._loop.run_until_complete(collect())

    def close(self) -> None:
        self._loop.run_until_complete(self._inner.close())

    def __enter__(self) -> Awaited:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._inner)


@pytest.fixture(params=["real", "fake", "asyncio"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[], Any]]:
    if request.param == "fake":
        yield lambda: FakeEmbedder(WIDTH, max_batch_size=SIZE)
        return
    server = request.getfixturevalue("odd_server")
    made: list[Awaited] = []

    def new() -> Any:
        if request.param == "real":
            return TritonEmbedder(server.grpc_url, "named", shared_memory=False)
        made.append(Awaited(server.grpc_url, "named", shared_memory=False))
        return made[-1]

    yield new
    for one in made:
        one.close()
        one._loop.close()


@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_does_the_same_on_the_twins(make: Make, member: str) -> None:
    MEMBERS[member](make)


@pytest.mark.parametrize("kind", [TritonEmbedder, FakeEmbedder, AsyncTritonEmbedder])
def test_every_public_member_has_its_test_and_its_twins(kind: type) -> None:
    extra = {"calls"} if kind is FakeEmbedder else set()
    assert {name for name in {*dir(kind), *vars(kind())} if not name.startswith("_")} == set(MEMBERS) | extra


def test_the_fake_is_deterministic_and_tells_faces_apart() -> None:
    with FakeEmbedder(WIDTH, max_batch_size=SIZE) as one, FakeEmbedder(WIDTH) as other:
        rows = one.encode(FACES)
        np.testing.assert_array_equal(rows, other.encode(FACES))
        assert np.abs(rows @ rows.T - np.eye(11)).max() < 0.6
        assert (one.calls, other.calls) == ([8, 3], [11])


def test_the_fake_fails_as_it_is_told_and_a_chain_falls_back() -> None:
    fake = FakeEmbedder(fails=[None, ConfigError("on purpose"), ServerUnreachable("gone")])
    first = fake.encode(FACES)
    with pytest.raises(ConfigError, match="on purpose"):
        fake.encode(FACES)
    with FallbackEmbedder([("fake", lambda: fake), ("spare", FakeEmbedder)]) as chain:
        np.testing.assert_array_equal(chain.encode(FACES), first)
        assert (chain.last_engine, chain.reason) == ("spare", "fake: ServerUnreachable: gone")
    assert fake.calls == [11, 11, 11]


def test_the_constructors_keywords_are_the_options_with_the_same_defaults() -> None:
    parameters = dict(inspect.signature(TritonEmbedder).parameters)
    assert inspect.signature(AsyncTritonEmbedder) == inspect.signature(TritonEmbedder)
    assert list(parameters) == [option.name for option in fields(ClientOptions)]
    for option in fields(ClientOptions):
        if option.default is not MISSING:
            assert parameters[option.name].default == option.default, option.name
    assert TritonEmbedder().options == ClientOptions()


def test_an_embedder_is_pickled_as_its_options_and_its_secrets_are_not_shown() -> None:
    for kind in (TritonEmbedder, AsyncTritonEmbedder):
        embedder = kind("grpc://somewhere:1", headers={"authorization": "secret"}, timeout_s=3)
        again = pickle.loads(pickle.dumps(embedder))
        assert type(again) is kind
        assert again.options == embedder.options
        assert "secret" not in repr(embedder) + repr(embedder.options)


def test_what_asyncio_has_not_asked_yet_is_not_made_up() -> None:
    embedder = AsyncTritonEmbedder("nowhere:1")
    for name in ("served", "embedding_dim", "contract_id", "max_batch_size"):
        with pytest.raises(ClientUnusable, match=r"await ensure_ready\(\) first"):
            getattr(embedder, name)
