"""Shared memory with a real server: used by itself, tidied up by whoever comes next, never shared by two requests."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from arcface_clients import TritonEmbedder
from arcface_clients.errors import ClientUnusable, DeadlineExceeded, InvalidFaces
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.triton.address import Address, Connection
from arcface_clients.triton.memory.slots import SlotPool
from arcface_clients.triton.memory.system import FOLDER, GRACE_S, Slot, is_local, left_behind, stale
from arcface_clients.triton.transports import open_transport
from deadlines import HANG_S
from odd_models import MARKED

FACES = synthetic_faces(8)

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm on this host")


@pytest.fixture
def known(odd_server):
    """known(): names of our regions that the server knows."""
    transport = open_transport(Connection(Address.parse(odd_server.grpc_url)))
    yield lambda: {name for name in transport.shared_regions("system", 5) if name.startswith("arcface-")}
    transport.close()


def in_process(server, body: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script with `embedder` (not closed at its end) and `faces` at hand."""
    script = f"""
import os, signal, sys, numpy as np
from arcface_clients import TritonEmbedder
from arcface_clients.faces.synthetic import synthetic_faces
faces = synthetic_faces(2)
embedder = TritonEmbedder({server.grpc_url!r}, "good")
{body}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG_S)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_regions_are_reused_and_gone_after_close(odd_server, known) -> None:
    before = known()
    with TritonEmbedder(odd_server.grpc_url, "good", in_flight=2) as embedder:
        for _ in range(5):
            embedder.encode(np.concatenate([FACES] * 6))
        ours = known() - before
        assert (
            str(embedder.shared_memory)
            == "system shared memory: the server is on this host and opened a region of ours"
        )
        assert 1 <= len(ours) <= 3  # two in flight and one being filled
        assert ours <= set(left_behind())
    assert set(left_behind()) & ours == set()
    assert known() & ours == set()


def test_forgotten_and_unclosed_clients_leave_nothing(odd_server, known) -> None:
    before = known()
    embedder = TritonEmbedder(odd_server.grpc_url, "good")
    embedder.encode(FACES)
    ours = known() - before
    del embedder
    gc.collect()
    done = in_process(
        odd_server, "embedder.encode(faces); print(*(s.name for s in embedder._session.regions.pool._all))"
    )
    ours |= set(done.stdout.split())
    assert len(ours) == 2
    assert ours & (known() | set(left_behind())) == set()


def test_what_a_killed_process_left_is_removed_by_the_next_client_after_the_grace_time(odd_server, known) -> None:
    before = known()
    in_process(odd_server, "embedder.encode(faces); os.kill(os.getpid(), signal.SIGKILL)", check=False)
    (name,) = known() - before
    with TritonEmbedder(odd_server.grpc_url, "good") as embedder:
        embedder.encode(FACES)
    assert name in left_behind()  # the server may still be at work on it
    assert name in known()
    os.utime(FOLDER / name, (0, time.time() - GRACE_S - 1))
    with TritonEmbedder(odd_server.grpc_url, "good") as embedder:
        embedder.encode(FACES)
    assert name not in left_behind()
    assert name not in known()


def test_region_of_a_living_process_is_never_stale() -> None:
    slot = Slot(2, 4)
    try:
        assert not stale(slot.name, now_s=time.time() + 10 * GRACE_S)
    finally:
        slot.close()
    assert stale(slot.name)  # closed: there is no file any more


def test_lost_request_keeps_its_region_to_itself(odd_server, slow_is_held, known) -> None:
    with TritonEmbedder(odd_server.grpc_url, "slow", timeout_s=1.5) as embedder:
        embedder.ensure_ready()
        before = known()
        with slow_is_held(), pytest.raises(DeadlineExceeded):
            embedder.encode(MARKED)
        embedder.encode(FACES)  # after the lost one: there is one instance
        (fresh,) = known() - before
        (lost,) = [slot for slot in embedder._session.regions.pool._all if slot.doubtful]
        assert lost.name != fresh
        answer = lost.rows(1)  # it came, late, into a region that nobody else uses
        np.testing.assert_allclose(np.linalg.norm(answer), 1, atol=1e-4)
    assert lost.name in left_behind()  # for the next client to remove
    os.utime(lost.path, (0, 0))
    TritonEmbedder(odd_server.grpc_url, "good").ensure_ready()
    assert lost.name not in left_behind()


def test_slots_are_handed_out_once_and_grow_with_demand() -> None:
    pool = SlotPool()
    first, second = pool.take(2, 4), pool.take(2, 4)
    assert first is not second
    pool.give(first)
    assert pool.take(2, 4) is first
    first.doubtful = True
    pool.give(first)
    third, larger = pool.take(2, 4), pool.take(3, 4)
    assert third not in (first, second)
    assert larger.max_faces == 3
    assert pool.doubtful == 1
    pool.give(third)
    pool.close()
    there = [slot for slot in (first, second, third, larger) if slot.path.exists()]
    assert there == [first, second, larger]  # doubtful, and in use: left for `stale`
    for slot in there:
        slot.path.unlink()


@pytest.mark.parametrize("in_flight", [1, 4])
def test_a_stream_that_ends_early_gives_its_regions_back(odd_server, in_flight: int) -> None:
    with TritonEmbedder(odd_server.grpc_url, "good", in_flight=in_flight) as embedder:
        pool = embedder._session.regions.pool
        for _ in range(5):
            with pytest.raises(InvalidFaces):
                list(embedder.encode_stream([FACES, "no face"]))
            stream = embedder.encode_stream([FACES] * 9)
            next(stream)
            stream.close()
        until = time.monotonic() + HANG_S  # requests that were under way come back first
        while len(pool._free) < len(pool._all) and time.monotonic() < until:
            time.sleep(0.01)
        assert len(pool._free) == len(pool._all) <= 2 * in_flight + 2


def test_a_request_too_large_for_a_region_goes_over_the_wire(odd_server) -> None:
    with TritonEmbedder(odd_server.grpc_url, "good") as embedder:
        truth = embedder.encode(FACES)
        regions = embedder._session.regions
        regions.resize(replace(embedder.served, max_batch_size=4), 64)  # another thread found the model loaded anew
        np.testing.assert_array_equal(embedder.encode(FACES), truth)
        assert embedder.shared_memory.kind == "system"  # smaller requests still use it
        assert len(regions.pool._free) == len(regions.pool._all)


def test_a_server_that_came_back_with_another_key_is_used_over_the_wire(odd_server, monkeypatch) -> None:
    with TritonEmbedder(odd_server.grpc_url, "good") as embedder:
        truth = embedder.encode(FACES)
        monkeypatch.setenv("ARCFACE_ADMIN_KEY", "not-its-key")
        embedder._session.regions.server_lost()
        np.testing.assert_array_equal(embedder.encode(FACES), truth)
        assert "guards this with a key" in str(embedder.shared_memory)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_whoever_closes_under_load_gives_the_others_one_error(odd_server, protocol: str) -> None:
    url = f"{protocol}://{getattr(odd_server, f'{protocol}_url')}"
    odd: list[BaseException] = []

    def work(embedder: TritonEmbedder) -> None:
        try:
            while True:
                embedder.encode(np.concatenate([FACES] * 5))
        except ClientUnusable:
            pass
        except BaseException as exc:
            odd.append(exc)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for round_ in range(30):
            embedder = TritonEmbedder(url, "good", in_flight=3)
            threads = [threading.Thread(target=work, args=(embedder,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            time.sleep(0.002 * round_)
            embedder.close()
            for thread in threads:
                thread.join(HANG_S)
                assert not thread.is_alive()
    finally:
        sys.setswitchinterval(interval)
    assert odd == []


def test_full_shared_memory_falls_back_to_the_wire_and_says_so(odd_server) -> None:
    done = in_process(
        odd_server,
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "print(embedder.encode(faces).shape, embedder.shared_memory)",
    )
    assert done.stdout.startswith("(2, 64) the wire: no shared memory on this host ([Errno 27] File too large)")


def test_shared_memory_can_be_switched_off_and_demanded(odd_server) -> None:
    with TritonEmbedder(odd_server.grpc_url, "good", shared_memory=False) as embedder:
        embedder.encode(FACES)
        assert str(embedder.shared_memory) == "the wire: shared memory is switched off"


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("192.0.2.1", False),
        ("8.8.8.8", False),
        ("no.such.host.invalid", False),
    ],
)
def test_this_host_is_known_by_its_addresses(host: str, local: bool) -> None:
    assert is_local(host) is local
