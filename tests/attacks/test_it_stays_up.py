"""A server that is made to crash or to hang under `arcface serve` is back soon, says so, and clients ride over it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from arcface_build.errors import ServerFailed
from arcface_build.serving.watch import RESTARTS, Pulse, Restarts, patience_s
from arcface_clients import TritonEmbedder
from arcface_clients.faces.synthetic import synthetic_faces
from serve_process import Serving

FACES = synthetic_faces(2)
DEADLY = {
    "200,000 opening brackets": b"[" * 200_000,
    "a shape of 2^31": b'{"inputs":[{"name":"face","datatype":"UINT8","shape":[2147483648,112,112,3],"data":[1]}]}',
}


@pytest.fixture
def serving(triton_binary, demo_repository, tmp_path):
    serving = Serving(Path(shutil.copytree(demo_repository, tmp_path / "model_repository")), "--no-reference")
    yield serving
    serving.stop()


def test_bodies_that_kill_the_server_are_survived_and_streams_ride_over_them(serving):
    import urllib.request

    with TritonEmbedder(f"localhost:{serving.ports.grpc}") as embedder:
        truth = embedder.encode(FACES)
        for number, body in enumerate(DEADLY.values(), 1):
            with pytest.raises(OSError):  # the connection ends with the server
                urllib.request.urlopen(
                    f"http://127.0.0.1:{serving.ports.http}/v2/models/arcface/infer", body, timeout=20
                )
            for rows, wanted in zip(embedder.encode_stream(iter(FACES)), truth, strict=True):
                np.testing.assert_allclose(rows, wanted, atol=1e-5)
            serving.wait_for("RESTART in", number)
            serving.wait_for("Ctrl-C stops it.", number + 1)
        assert embedder.shared_memory.kind == "system"  # with the key of the new life


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "stopped"])
def test_a_stub_that_died_or_stands_still_is_noticed_within_five_seconds_and_replaced(serving, number):
    os.kill(serving.stub(), number)
    started = time.monotonic()
    serving.wait_for("RESTART in 1 s: the server ")  # answers no face, or computes nothing
    assert time.monotonic() - started < 5
    serving.wait_for("Ctrl-C stops it.", 2)
    with TritonEmbedder(f"localhost:{serving.ports.grpc}") as embedder:
        assert embedder.encode(FACES).shape == (2, 512)


class Silent:
    """A server that answers no request in time, and says how much it has computed."""

    own_url = "127.0.0.1:9"  # nothing listens there
    finished = 5

    def ask(self, path: str, timeout_s: float) -> dict:
        return {"model_stats": [{"inference_stats": {"success": {"count": count}}} for count in (self.finished, 1)]}


def test_a_hang_is_told_from_a_long_queue_by_what_was_computed_meanwhile():
    server = Silent()
    pulse = Pulse(server, FACES[:1], patience_s=0.5)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        assert not pulse.beats()  # late, and at work
        server.finished += 1
        time.sleep(0.05)
    started = time.monotonic()
    with pytest.raises(ServerFailed, match=r"the server hangs: nothing was computed for 0\.\d s"):
        while time.monotonic() < started + 10:
            pulse.beats()
    pulse.close()


def test_patience_grows_with_the_time_that_a_batch_takes():
    assert patience_s(200) == 3
    assert patience_s(8) == 32
    assert patience_s(0) == 3


def test_a_server_that_ends_again_and_again_is_given_up():
    restarts = Restarts()
    assert [restarts.pause_s(now_s=float(i)) for i in range(RESTARTS + 1)] == [1, 2, 4, 8, 16, None]
    assert restarts.pause_s(now_s=700.0) == 1
