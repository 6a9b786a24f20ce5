"""TritonEmbedder against a real tritonserver."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest

from arcface_clients import TritonEmbedder
from arcface_clients.errors import (
    ClientUnusable,
    ConfigError,
    ContractMismatch,
    InvalidFaces,
    ModelNotReady,
    ServerUnreachable,
)
from arcface_clients.faces.synthetic import synthetic_faces
from deadlines import HANG_S

FACES = synthetic_faces(16)


@pytest.fixture(scope="module")
def embedder(server):
    with TritonEmbedder(server.grpc_url) as embedder:
        yield embedder


@pytest.fixture(scope="module")
def singles(embedder) -> np.ndarray:
    """Each face embedded alone: what every batch must agree with."""
    return np.concatenate([embedder.encode(face[None]) for face in FACES])


@pytest.mark.parametrize("count", [1, 2, 64, 65, 130])
def test_any_number_of_faces_comes_back_in_order(embedder, singles, count: int) -> None:
    order = np.arange(count) % len(FACES)
    embeddings = embedder.encode(FACES[order])
    assert embeddings.shape == (count, embedder.embedding_dim)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, singles[order], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-4)


def test_different_faces_differ(singles) -> None:
    assert (singles @ singles.T - np.eye(len(singles))).max() < 0.999


def test_no_faces_give_no_rows_of_the_right_width(embedder) -> None:
    for nothing in (np.empty((0, 112, 112, 3), np.uint8), []):
        assert embedder.encode(nothing).shape == (0, embedder.embedding_dim)


def test_views_floats_and_lists_mean_the_same_faces(embedder, singles) -> None:
    for faces in (FACES[::-1][::-1], np.asfortranarray(FACES), FACES.astype(np.float32), list(FACES)):
        np.testing.assert_allclose(embedder.encode(faces), singles, atol=1e-5)
    mirrored = FACES[:, :, ::-1]
    np.testing.assert_allclose(embedder.encode(mirrored), embedder.encode(mirrored.copy()), atol=1e-6)


def test_bad_faces_are_refused_before_the_network() -> None:
    with TritonEmbedder("127.0.0.1:1") as nobody_there, pytest.raises(InvalidFaces, match=r"looks like NCHW"):
        nobody_there.encode(np.zeros((2, 3, 112, 112), np.uint8))


def test_dead_server_is_named_with_the_next_command() -> None:
    with (
        TritonEmbedder("127.0.0.1:1", retry_for_s=0) as embedder,
        pytest.raises(ServerUnreachable, match=r"no Triton server answers at grpc://127.0.0.1:1: .* arcface serve"),
    ):
        embedder.encode(FACES)


def test_unknown_model_is_not_a_dead_server(server) -> None:
    with (
        TritonEmbedder(server.grpc_url, model="nosuch") as embedder,
        pytest.raises(ModelNotReady, match=r"does not serve 'nosuch'"),
    ):
        embedder.encode(FACES)


def test_http_port_is_recognised(server) -> None:
    with (
        TritonEmbedder(server.http_url, retry_for_s=0) as embedder,
        pytest.raises(ServerUnreachable, match=rf"if port {server.ports.http} is HTTP: http://{server.http_url}"),
    ):
        embedder.ensure_ready()


def test_contract_of_the_leaf_is_seen_through_the_ensemble(embedder, server) -> None:
    with TritonEmbedder(server.grpc_url, embedder.served.leaf) as leaf:
        assert embedder.served.leaf != "arcface"
        assert leaf.contract_id == embedder.contract_id
        assert leaf.embedding_dim == embedder.embedding_dim


def test_what_is_served_fits_a_line_when_it_is_printed(embedder) -> None:
    assert embedder.served.golden and len(embedder.served.golden) > 1000
    assert len(repr(embedder.served)) < 400 and embedder.served.contract_id in repr(embedder.served)


def test_another_contract_is_refused_before_a_face_is_sent(server) -> None:
    with (
        TritonEmbedder(server.grpc_url, expected_contract="0" * 64) as embedder,
        pytest.raises(ContractMismatch, match=r"but expected_contract is 000000000000.*enrol every person again"),
    ):
        embedder.encode(FACES)


def test_many_threads_share_one_embedder(embedder, singles) -> None:
    wrong: list[int] = []

    def work(offset: int) -> None:
        order = (np.arange(24) + offset) % len(FACES)
        if not np.allclose(embedder.encode(FACES[order]), singles[order], atol=1e-5):
            wrong.append(offset)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_closed_embedder_says_so(server) -> None:
    embedder = TritonEmbedder(server.grpc_url)
    embedder.encode(FACES[:1])
    embedder.close()
    embedder.close()
    with pytest.raises(ClientUnusable, match="closed; make a new one"):
        embedder.encode(FACES[:1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout_s": 0},
        {"timeout_s": float("inf")},
        {"timeout_s": "5"},
        {"total_timeout_s": "5"},
        {"in_flight": 2.5},
        {"in_flight": 0},
        {"retry_for_s": -1},
        {"url": "ftp://x"},
        {"model": ""},
        {"headers": {"key": 1}},
        {"headers": ["key"]},
        {"headers": {"key": "secret\n"}},  # as read from a file
        {"headers": {"key": "secret\u2028ü"}},
        {"headers": {"a key": "secret"}},
        {"headers": {"": "secret"}},
        {"headers": {"key-bin": "secret"}},  # gRPC takes bytes there
    ],
)
def test_impossible_arguments_are_refused_at_once(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="xpected") as refused:
        TritonEmbedder(**wrong)
    assert "secret" not in str(refused.value)


def test_a_host_that_nobody_knows_is_unreachable() -> None:
    with pytest.raises(ServerUnreachable, match=r"no Triton server answers at grpc://nowhere\.invalid:8001"):
        TritonEmbedder("nowhere.invalid:8001", retry_for_s=0).ensure_ready()


def test_forked_child_refuses_instead_of_hanging(server) -> None:
    script = f"""
import os, numpy as np
from arcface_clients import TritonEmbedder
from arcface_clients.errors import ClientUnusable
embedder = TritonEmbedder({server.grpc_url!r})
face = np.zeros((1, 112, 112, 3), np.uint8)
embedder.encode(face)
if os.fork() == 0:
    try:
        embedder.encode(face)
    except ClientUnusable as exc:
        os._exit(7 if "Make one client in each process" in str(exc) else 8)
    os._exit(9)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
embedder.encode(face)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr


def test_threads_of_before_a_fork_are_refused_too() -> None:
    script = """
import os
from arcface_clients.errors import ClientUnusable
from arcface_clients.triton.live import Live
live = Live(lambda: None)
live.submit(1, int).result()
if os.fork() == 0:
    try:
        live.submit(1, int)
    except ClientUnusable:
        os._exit(7)
    os._exit(9)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr


def test_importing_the_clients_imports_no_driver() -> None:
    script = "import sys, arcface_clients.triton.embedder, arcface_clients.faces.images; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    heavy = {
        "tritonclient",
        "grpc",
        "google.protobuf",
        "cv2",
        "onnx",
        "onnxruntime",
        "tensorrt",
        "insightface",
        "boto3",
    }
    assert heavy.isdisjoint(loaded)
