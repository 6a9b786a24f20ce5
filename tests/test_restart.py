"""A server that is killed and restarted under its clients, one that guards shared memory, and one that uses TLS."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from arcface_build.serving.ports import free_ports
from arcface_clients import TritonEmbedder
from arcface_clients.errors import ConfigError, ContractMismatch, ServerUnreachable
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.triton.session import RECHECK_AFTER_S
from deadlines import HANG_S
from odd_models import write_model

FACES = synthetic_faces(16)
GUARD = [
    "--grpc-restricted-protocol=shared-memory:admin-key=secret",
    "--http-restricted-api=shared-memory:admin-key=secret",
]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_model(tmp_path / "repository", "good")
    return tmp_path / "repository"


def wait_until_more(seen: list[int], more: int = 40, timeout_s: float = HANG_S) -> None:
    """Every counter has gone up since now."""
    before, deadline_s = list(seen), time.monotonic() + timeout_s
    while not all(after >= start + more for start, after in zip(before, seen, strict=True)):
        assert time.monotonic() < deadline_s, f"{before} → {seen}: a stream stands still"
        time.sleep(0.02)


def test_streams_survive_two_restarts_with_every_face_answered_once_and_in_order(repository, start_triton) -> None:
    ports = free_ports()
    server = start_triton(repository, ["good"], config_name="", ports=ports)
    urls = [f"grpc://{server.grpc_url}", f"http://{server.http_url}"]
    with TritonEmbedder(urls[0], "good", shared_memory=False) as embedder:
        truth = np.concatenate([embedder.encode(face) for face in FACES])
    done = threading.Event()
    wrong: list[str] = []
    seen = [0, 0, 0]
    through_memory = [False, False, False]

    def follow(number: int, url: str, shared_memory: bool) -> None:
        def source() -> Iterator[np.ndarray]:
            count = 0
            while not done.is_set():
                yield FACES[count % len(FACES)]
                count += 1

        with TritonEmbedder(url, "good", shared_memory=shared_memory) as embedder:
            embedder.ensure_ready()
            for row in embedder.encode_stream(source(), batch_size=4):
                if not np.allclose(row, truth[seen[number] % len(FACES)], atol=1e-6):
                    wrong.append(f"{url} face {seen[number]}")
                    break
                seen[number] += 1
            through_memory[number] = embedder.shared_memory.kind is not None

    threads = [
        threading.Thread(target=follow, args=(i, url, shm))
        for i, (url, shm) in enumerate([(urls[0], True), (urls[0], False), (urls[1], False)])
    ]
    for thread in threads:
        thread.start()
    answered = []
    for _ in range(2):
        wait_until_more(seen)
        server.kill()
        time.sleep(0.2)
        answered.append(list(seen))
        server = start_triton(repository, ["good"], config_name="", ports=ports)
    wait_until_more(seen)
    done.set()
    for thread in threads:
        thread.join(HANG_S)
    assert wrong == []
    assert not any(thread.is_alive() for thread in threads)
    assert through_memory == [True, False, False]  # shared memory is shared memory again
    assert all(after > before for before, after in zip(answered[-1], seen, strict=True))


def test_server_that_comes_back_with_another_contract_is_refused(repository, start_triton) -> None:
    ports = free_ports()
    server = start_triton(repository, ["good"], config_name="", ports=ports, extra=GUARD, guarded=False)
    with TritonEmbedder(server.grpc_url, "good") as embedder, TritonEmbedder(server.http_url, "good") as wrong_port:
        embedder.encode(FACES)
        assert embedder.shared_memory.kind is None
        assert "guards this with a key" in embedder.shared_memory.reason
        keys = {"triton-grpc-protocol-admin-key": "secret"}
        with TritonEmbedder(server.grpc_url, "good", headers=keys, shared_memory=True) as guarded:
            guarded.encode(FACES)
            assert guarded.shared_memory.kind is not None
        with TritonEmbedder(f"http://{server.http_url}", "good", headers={"admin-key": "secret"}) as guarded:
            guarded.encode(FACES)
            assert guarded.shared_memory.kind is not None
        with (
            TritonEmbedder(server.grpc_url, "good", shared_memory=True) as demanding,
            pytest.raises(
                ConfigError, match=r"shared memory was demanded and is not possible: .* guards this with a key"
            ),
        ):
            demanding.encode(FACES)
        with pytest.raises(ServerUnreachable):
            wrong_port.ensure_ready()
        server.kill()
        with pytest.raises(ServerUnreachable):
            TritonEmbedder(server.grpc_url, "good", retry_for_s=0).encode(FACES)
        write_model(repository, "good", contract="other")
        start_triton(repository, ["good"], config_name="", ports=ports)
        time.sleep(RECHECK_AFTER_S)  # its rows do not name their contract: it is asked anew after so long
        with pytest.raises(ContractMismatch, match="serves contract other, but the first answer is odd"):
            embedder.encode(FACES)
