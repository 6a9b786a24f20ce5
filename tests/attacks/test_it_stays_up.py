"""A server that is made to crash or to hang under `arcface serve` is back soon, says so, and clients ride over it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_build.errors import ServerFailed
from arcface_build.repository.detector import install_detector
from arcface_build.repository.versions import served_folder
from arcface_build.serving.host_checks import check_processes
from arcface_build.serving.ports import free_ports
from arcface_build.serving.process import TritonProcess
from arcface_build.serving.stubs import GRACE_S, StubWatch, stubs_of
from arcface_build.serving.watch import RESTARTS, Pulse, Restarts, finished, patience_s
from arcface_clients import PhotoEmbedder, TritonEmbedder
from arcface_clients.checks.served_checks import check_photos
from arcface_clients.config.schema import EmbeddingConfig
from arcface_clients.errors import ArcFaceError, DeadlineExceeded
from arcface_clients.faces.synthetic import synthetic_faces
from serve_process import Serving, control

FACES = synthetic_faces(2)
SOON_S, TRIES = 5, 3  # what else runs on the host only adds to the time, so the best try counts
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
            with pytest.raises(ConnectionError):  # it ends with the server, before that takes the host's memory
                urllib.request.urlopen(
                    f"http://127.0.0.1:{serving.ports.http}/v2/models/arcface/infer", body, timeout=20
                )
            for rows, wanted in zip(embedder.encode_stream(iter(FACES)), truth, strict=True):
                np.testing.assert_allclose(rows, wanted, atol=1e-5)
            serving.wait_for("RESTART in", number)
            serving.wait_for("Ctrl-C stops it.", number + 1)
        assert embedder.shared_memory.kind == "system"  # with the key of the new life


def noticed_soon(serving, number, model, words):
    """A process of `model` gets a signal; `words` are said within SOON_S, and the server is there again."""
    took_s = []
    while not took_s or (took_s[-1] >= SOON_S and len(took_s) < TRIES):
        os.kill(serving.stub(model), number)
        started = time.monotonic()
        serving.wait_for("RESTART in ", len(took_s) + 1)
        took_s.append(time.monotonic() - started)
        assert [words in line for line in serving.said if "RESTART in " in line] == [True] * len(took_s)
        serving.wait_for("Ctrl-C stops it.", len(took_s) + 1)
    assert min(took_s) < SOON_S


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "stopped"])
def test_a_stub_that_died_or_stands_still_is_noticed_within_five_seconds_and_replaced(serving, number):
    noticed_soon(serving, number, "arcface_onnx", ": the server ")  # answers no face, or computes nothing
    with TritonEmbedder(f"localhost:{serving.ports.grpc}") as embedder:
        assert embedder.encode(FACES).shape == (2, 512)


@pytest.fixture
def repository_with_photos(triton_binary, demo_repository, assets, tmp_path):
    repository = Path(shutil.copytree(demo_repository, tmp_path / "model_repository"))
    install_detector(next((assets / "detectors").glob("*yunet*.onnx")), repository)
    return repository


@pytest.fixture
def serving_photos(repository_with_photos):
    serving = Serving(repository_with_photos, "--no-reference")
    yield serving
    serving.stop()


@pytest.fixture
def server_of_photos(triton_binary, repository_with_photos, tmp_path):
    with bare_server(triton_binary, repository_with_photos, tmp_path) as server:
        yield server


@contextmanager
def bare_server(triton_binary, repository, tmp_path):
    """A tritonserver that nobody starts again."""
    models = ["arcface", "photo_faces"]
    with TritonProcess(
        triton_binary, repository, models, log_path=tmp_path / "log", ports=free_ports(), exit_timeout_s=2
    ) as server:
        server.wait_ready()
        yield server


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "stopped"])
def test_one_of_the_processes_of_photos_is_lost_and_all_photos_are_answered_each_with_its_own_faces(
    serving_photos, assets, number
):
    portraits = [min(folder.iterdir()) for folder in sorted((assets / "faces" / "raw250").iterdir())[:4]]
    with PhotoEmbedder(f"localhost:{serving_photos.ports.grpc}", timeout_s=5, retry_for_s=60) as photos:
        alone = [[face.box for face in photos.faces(portrait)] for portrait in portraits]
        found, late = [], 0
        time.sleep(1)  # the metrics are half a second behind
        told = metric(serving_photos, 'arcface_photos{outcome="answered"}')
        lost = serving_photos.stub("photo_faces")
        os.kill(lost, number)
        started = time.monotonic()
        for turn in range(40):
            try:
                found.append((turn % 4, [face.box for face in photos.faces(portraits[turn % 4])]))
            except DeadlineExceeded:  # it was with the process that stands still
                late += 1
            if time.monotonic() > started + 20:
                break
        serving_photos.wait_for(f"RESTART in 1 s: the server lost a process: {lost}, which ")
        serving_photos.wait_for("Ctrl-C stops it.", 2)
        found += [(i, [face.box for face in photos.faces(portrait)]) for i, portrait in enumerate(portraits)]
    assert late <= 1
    assert len(found) > 4
    assert all(boxes == alone[which] for which, boxes in found)
    assert told == 4  # being asked every second whether they are there does not count as photos


def test_doctor_names_a_server_of_photos_that_lost_a_process(server_of_photos):
    config = EmbeddingConfig(triton={"url": server_of_photos.grpc_url})
    found = check_photos(config)
    assert found.status == "ok"
    assert "; yunet sha256=8f2383e4dd3cfbb4553ea8718107fc04" in found.found
    os.kill(a_process_of(server_of_photos, "photo_faces"), signal.SIGKILL)
    lost = check_photos(config)
    assert lost.status == "problem"
    assert "of 16 requests to photo_faces were not answered: " in lost.found
    here = check_processes(config)
    assert here.status == "problem" and "which died, of " in here.found
    control(server_of_photos, "unload", "photo_faces")
    assert check_photos(config).status == "absent"


def a_process_of(server, model):
    return next(stub.pid for stub in stubs_of(server.pid) if stub.model == model)


def test_a_process_of_photos_that_loops_over_one_says_where_and_ends(
    triton_binary, repository_with_photos, assets, tmp_path
):
    config = repository_with_photos / "photo_faces" / "config.pbtxt"
    config.write_text(re.sub(r'("stuck_after_s" .*)"60"', r'\1"2"', config.read_text()))
    detect = served_folder(repository_with_photos, "photo_faces") / "detect.py"
    detect.write_text(detect.read_text() + LOOPS)
    portrait = min((assets / "faces" / "raw250").rglob("*.jpg"))
    with bare_server(triton_binary, repository_with_photos, tmp_path) as server:
        watched = StubWatch(server, ["photo_faces"])
        with PhotoEmbedder(server.grpc_url, timeout_s=20, retry_for_s=0) as photos:
            assert photos.faces(portrait)
            time.sleep(2.5)  # the limit holds for each photo alone, and ends with it
            assert photos.faces(portrait)
            with pytest.raises(ArcFaceError):
                photos.faces(cv2.imencode(".png", np.zeros((77, 77, 3), np.uint8))[1].tobytes())
            assert photos.faces(portrait)
        with pytest.raises(ServerFailed, match="which died, of photo_faces"):
            until = time.monotonic() + 10
            while time.monotonic() < until:
                watched.beats()
                time.sleep(0.05)
        assert re.search(r'File ".*/detect.py", line \d+ in find_faces', server.log_path.read_text())


LOOPS = """
really_find_faces = find_faces


def find_faces(look, pixels, *rest, **limits):
    while pixels.shape[:2] == (77, 77):
        pass
    return really_find_faces(look, pixels, *rest, **limits)
"""


def metric(serving, name):
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{serving.ports.metrics}/metrics", timeout=10) as answer:
        (line,) = [line for line in answer.read().decode().splitlines() if line.startswith(name)]
    return float(line.rsplit(" ", 1)[1])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "stopped"])
def test_a_lost_process_of_photos_that_nobody_asks_is_noticed_within_five_seconds(serving_photos, number):
    noticed_soon(serving_photos, number, "photo_faces", "of photo_faces")
    with PhotoEmbedder(f"localhost:{serving_photos.ports.grpc}") as photos:
        photos.probe()


@pytest.mark.parametrize(
    ("verbs", "victim"), [(["unload", "load", "unload"], "arcface_onnx"), (["unload", "load"], "photo_faces")]
)
def test_a_model_unloaded_or_loaded_anew_is_no_lost_process_and_its_new_ones_are_watched(
    server_of_photos, verbs, victim
):
    watched = StubWatch(server_of_photos, ["arcface_onnx", "photo_faces"])
    assert sorted({stub.model for stub in stubs_of(server_of_photos.pid)}) == ["arcface_onnx", "photo_faces"]
    for verb in verbs:
        control(server_of_photos, verb, "photo_faces")
        until = time.monotonic() + 2 * GRACE_S
        while time.monotonic() < until:
            watched.beats()
            time.sleep(0.05)
    os.kill(a_process_of(server_of_photos, victim), signal.SIGKILL)
    with pytest.raises(ServerFailed, match=rf"lost a process: \d+, which died, of {victim}"):
        while time.monotonic() < until + 10:
            watched.beats()
            time.sleep(0.05)


class Silent:
    """A server that answers no request in time, and says how much it has computed."""

    own_url = "127.0.0.1:9"  # nothing listens there
    finished = 5

    def ask(self, path: str, timeout_s: float) -> dict:
        counts = {"arcface": self.finished, "arcface_onnx": 1, "photo_faces": time.monotonic_ns()}
        stats = [{"name": name, "inference_stats": {"success": {"count": n}}} for name, n in counts.items()]
        return {"model_stats": stats}


def test_a_hang_is_told_from_a_long_queue_by_what_was_computed_meanwhile():
    server = Silent()
    with TritonEmbedder(server.own_url, retry_for_s=0, shared_memory=False) as embedder:
        pulse = Pulse(partial(embedder.encode, FACES[:1]), partial(finished, server), patience_s=1.5)
        follow(pulse, server)


def follow(pulse: Pulse, server: Silent) -> None:
    until = time.monotonic() + 4
    while time.monotonic() < until:
        assert not pulse.beats()  # late, and at work
        server.finished += 1
        time.sleep(0.05)
    started = time.monotonic()
    with pytest.raises(ServerFailed, match=r"the server hangs: nothing was computed for [1-9]\.\d s"):
        while time.monotonic() < started + 10:
            pulse.beats()


def test_patience_grows_with_the_time_that_a_batch_takes():
    assert patience_s(200) == 3
    assert patience_s(8) == 32
    assert patience_s(0) == 3


def test_a_server_that_ends_again_and_again_is_given_up():
    restarts = Restarts()
    assert [restarts.pause_s(now_s=float(i)) for i in range(RESTARTS + 1)] == [1, 2, 4, 8, 16, None]
    assert restarts.pause_s(now_s=700.0) == 1
