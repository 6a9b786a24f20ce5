"""Streams: what goes in comes out in its own shape and order, with bounded memory, from a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from arcface_clients import AsyncPhotoEmbedder, AsyncTritonEmbedder, PhotoEmbedder, TritonEmbedder
from arcface_clients.errors import ConfigError, InvalidFaces
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.triton.streaming import Stream

FACES = synthetic_faces(10)
SHAPES = [None, 3, 0, 70, None, 1, 130, None, 0]  # faces in each item; None: one face without a batch axis


def items(shapes: list[int | None] = SHAPES) -> Iterator[np.ndarray]:
    start = 0
    for count in shapes:
        order = (start + np.arange(count or 1)) % len(FACES)
        yield FACES[order[0]] if count is None else FACES[order][:count]
        start += count or (count is None)


@pytest.fixture(scope="module")
def embedder(odd_server):
    with TritonEmbedder(odd_server.grpc_url, "good") as embedder:
        yield embedder


@pytest.fixture(scope="module")
def expected(embedder) -> list[np.ndarray]:
    alone = embedder.encode(FACES)
    rows, start = [], 0
    for count in SHAPES:
        order = (start + np.arange(count or 1)) % len(FACES)
        rows.append(alone[order[0]] if count is None else alone[order][:count])
        start += count or (count is None)
    return rows


def check(answers: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert [a.shape for a in answers] == [e.shape for e in expected]
    for answer, right in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer, right, atol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_faces_and_batches_come_back_as_they_went_in(embedder, expected, batch_size) -> None:
    shapes = SHAPES if batch_size != 1 else SHAPES[:3]
    check(list(embedder.encode_stream(items(shapes), batch_size=batch_size)), expected[: len(shapes)])


def test_asyncio_takes_both_kinds_of_source(odd_server, expected) -> None:
    async def source() -> AsyncIterator[np.ndarray]:
        for item in items():
            await asyncio.sleep(0)
            yield item

    async def work() -> list[list[np.ndarray]]:
        async with AsyncTritonEmbedder(odd_server.grpc_url, "good") as embedder:
            given = [row async for row in embedder.encode_stream(source())]
            return [given, [row async for row in embedder.encode_stream(items())]]

    for answers in asyncio.run(work()):
        check(answers, expected)


def test_source_may_reuse_its_memory(embedder) -> None:
    def source() -> Iterator[np.ndarray]:
        buffer, face = np.empty((5, 112, 112, 3), np.uint8), np.empty((112, 112, 3), np.uint8)
        for i in range(40):
            buffer[:] = FACES[i % 10]
            yield buffer
            face[:] = FACES[(i + 3) % 10]
            yield face

    alone = embedder.encode(FACES)
    for i, rows in enumerate(embedder.encode_stream(source(), batch_size=8)):
        right = alone[(i // 2 + 3) % 10] if i % 2 else np.repeat(alone[[i // 2 % 10]], 5, axis=0)
        np.testing.assert_allclose(rows, right, atol=1e-5)
    assert i == 79


def test_source_is_read_no_further_than_the_requests_in_flight(embedder) -> None:
    taken = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield FACES[taken % 10]

    answers = embedder.encode_stream(source(), batch_size=4)
    for given, _ in zip(range(1, 101), answers, strict=False):
        # full requests in flight, one being handed out, one being filled
        assert taken - given < 4 * (embedder.options.in_flight + 2)
    answers.close()
    np.testing.assert_allclose(embedder.encode(FACES), embedder.encode(FACES), atol=1e-6)


def test_bad_item_is_refused_when_its_turn_comes(embedder) -> None:
    answers = embedder.encode_stream([FACES, np.zeros((2, 3, 112, 112), np.uint8)], batch_size=4)
    with pytest.raises(InvalidFaces, match="looks like NCHW"):
        list(answers)


@pytest.mark.parametrize("size", [9, 0, "8", 2.5])
def test_batches_that_the_server_does_not_take_are_refused_at_once(embedder, size) -> None:
    with pytest.raises(ConfigError, match=rf"batch_size is {size!r}; expected 1..8"):
        embedder.encode_stream(items(), batch_size=size)


@pytest.mark.parametrize(("time_s", "expected"), [("x", "seconds"), (None, "seconds"), (-1, "0 or more")])
def test_a_time_that_is_none_is_refused_before_anything_is_asked(time_s, expected) -> None:
    nowhere = "127.0.0.1:9"

    async def follow(answers: AsyncIterable[Any]) -> None:
        async with aclosing(answers):
            async for _ in answers:
                pass

    with TritonEmbedder(nowhere) as embedder, PhotoEmbedder(nowhere) as photos:
        streams = {
            "faces": lambda: embedder.encode_stream([], retry_for_s=time_s),
            "photos": lambda: photos.faces_stream([], retry_for_s=time_s),
            "asyncio": lambda: asyncio.run(follow(AsyncTritonEmbedder(nowhere).encode_stream([], retry_for_s=time_s))),
            "photos asyncio": lambda: asyncio.run(
                follow(AsyncPhotoEmbedder(nowhere).faces_stream([], retry_for_s=time_s))
            ),
            "client": lambda: TritonEmbedder(nowhere, retry_for_s=time_s),
        }
        for stream in streams.values():
            with pytest.raises(ConfigError, match=f"retry_for_s is {time_s!r}; expected {expected}"):
                stream()


@pytest.mark.parametrize("shapes", [[], [0], [0, 0, 2], [None] * 9, [9], [4, 4], [1, 8, 1], SHAPES])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_any_cut_of_any_stream_comes_out_whole(shapes, size) -> None:
    stream = Stream(size, 1)
    number = iter(range(10_000))
    chunks: list[np.ndarray] = []
    for count in shapes:
        faces = np.zeros((1 if count is None else count, 112, 112, 3), np.uint8)
        for face in faces:
            face[:] = next(number)
        chunks += [np.concatenate(parts) for parts in stream.take(faces[0] if count is None else faces)]
    assert all(len(chunk) == size for chunk in chunks)
    chunks += [np.concatenate(parts) for parts in stream.rest()]
    answers = [
        item for chunk in chunks for item in stream.give(chunk[:, 0, 0, :1].astype(np.float32))
    ] + stream.finished()
    assert [a.shape for a in answers] == [(1,) if count is None else (count, 1) for count in shapes]
    assert [float(x) for answer in answers for x in np.ravel(answer)] == list(range(next(number)))
