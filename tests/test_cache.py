"""What is embedded once stays embedded: by content and contract, within its memory, through a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from arcface_clients.errors import ConfigError, ContractMismatch
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.people.cache import ENTRY_OVERHEAD_BYTES, EmbeddingCache
from people import PixelEngine


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    return synthetic_faces(12)


def test_a_face_is_embedded_once_and_comes_back_in_order(faces: np.ndarray) -> None:
    engine, cache = PixelEngine(), EmbeddingCache()
    expected = engine.encode(faces)
    engine.calls.clear()
    assert np.allclose(cache.embed(engine, faces[[0, 1, 0, 2]]), expected[[0, 1, 0, 2]], atol=1e-6)
    assert np.allclose(cache.embed(engine, faces[[3, 2, 1]]), expected[[3, 2, 1]], atol=1e-6)
    assert engine.calls == [3, 1]
    assert (cache.stats.hits, cache.stats.misses) == (3, 4)
    assert cache.embed(engine, faces[:0]).shape == (0, 64)


def test_another_contract_is_another_embedding(faces: np.ndarray) -> None:
    cache = EmbeddingCache()
    cache.embed(PixelEngine(), faces[:2])
    other = PixelEngine(dim=32, contract_id="d" * 64)
    assert cache.embed(other, faces[:2]).shape == (2, 32)
    assert other.faces_seen == 2
    with pytest.raises(ContractMismatch, match="states no contract id"):
        cache.embed(PixelEngine(contract_id=None), faces)


def test_memory_stays_within_its_limit_and_the_least_used_goes_first(faces: np.ndarray) -> None:
    entry = 64 * 4 + ENTRY_OVERHEAD_BYTES
    engine, cache = PixelEngine(), EmbeddingCache(max_bytes=3 * entry)
    cache.embed(engine, faces[:3])
    cache.embed(engine, faces[:1])  # face 0 was used last
    cache.embed(engine, faces[3:4])
    assert (len(cache), cache.bytes_used, cache.stats.evictions) == (3, 3 * entry, 1)
    engine.calls.clear()
    cache.embed(engine, faces[[0]])
    assert engine.calls == []
    cache.embed(engine, faces[[1]])
    assert engine.calls == [1]
    assert cache.embed(engine, faces).shape == (12, 64)  # more than fit at once
    assert cache.bytes_used <= 3 * entry
    nothing = EmbeddingCache(max_bytes=0)
    nothing.embed(engine, faces)
    assert (len(nothing), nothing.bytes_used) == (0, 0)


@pytest.mark.parametrize("on_disk", [False, True])
def test_clearing_a_person_keeps_what_others_hold(faces: np.ndarray, tmp_path: Path, on_disk: bool) -> None:
    engine = PixelEngine()
    with EmbeddingCache(path=tmp_path / "cache.sqlite" if on_disk else None) as cache:
        cache.embed(engine, faces[:4], person="Ann")
        cache.embed(engine, faces[3:6], person="Bob")
        assert cache.clear("Ann") == 3
        assert cache.clear("Ann") == 0
        engine.calls.clear()
        cache.embed(engine, faces[3:6])
        assert engine.calls == []
        cache.embed(engine, faces[:3])
        assert engine.calls == [3]
        assert cache.clear() == 6
        assert (len(cache), cache.bytes_used) == (0, 0)
        cache.embed(engine, faces[3:4])
        assert engine.calls == [3, 1]


def test_a_file_serves_the_next_process_what_memory_had_no_room_for(faces: np.ndarray, tmp_path: Path) -> None:
    engine = PixelEngine()
    with EmbeddingCache(max_bytes=0, path=tmp_path / "new" / "cache.sqlite") as cache:
        first = cache.embed(engine, faces, person="all")
    with EmbeddingCache(path=tmp_path / "new" / "cache.sqlite") as cache:
        assert np.array_equal(cache.embed(engine, faces), first)
        assert (cache.stats.hits, cache.stats.disk_hits, cache.stats.misses) == (12, 12, 0)
        assert cache.clear("all") == 12
    assert engine.faces_seen == 12


def test_a_killed_writer_leaves_a_cache_with_whole_rows(faces: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import numpy as np\n"
        "from people import PixelEngine\n"
        "from arcface_clients.people.cache import EmbeddingCache\n"
        "cache, engine, rng = EmbeddingCache(path=sys.argv[2]), PixelEngine(), np.random.default_rng(1)\n"
        "while True:\n"
        "    cache.embed(engine, rng.integers(0, 256, (4, 112, 112, 3), dtype=np.uint8), person='p')\n"
        "    print('.', flush=True)\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        for _ in range(20):
            assert writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
    with EmbeddingCache(path=path) as cache:
        engine = PixelEngine()
        rng = np.random.default_rng(1)
        for _ in range(20):
            batch = rng.integers(0, 256, (4, 112, 112, 3), dtype=np.uint8)
            assert np.allclose(cache.embed(engine, batch), PixelEngine().encode(batch), atol=1e-6)
        assert engine.faces_seen == 0
        assert cache.clear("p") >= 80


def test_threads_share_a_cache(faces: np.ndarray, tmp_path: Path) -> None:
    engine = PixelEngine()
    expected = engine.encode(faces)
    wrong: list[int] = []
    with EmbeddingCache(max_bytes=2000, path=tmp_path / "cache.sqlite") as cache:

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(30):
                picked = rng.integers(0, 12, 5)
                if not np.allclose(cache.embed(engine, faces[picked], person=str(seed)), expected[picked], atol=1e-6):
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert cache.stats.hits + cache.stats.misses <= 4 * 30 * 5
        assert cache.bytes_used <= 2000


def test_a_file_that_is_no_cache_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are my notes, all of them, and they are longer than a header " * 20)
    with pytest.raises(ConfigError, match=r"notes\.txt is not an embedding cache"):
        EmbeddingCache(path=path)
    assert path.read_text().startswith("these are my notes")
    with pytest.raises(ConfigError, match=r"cannot be opened .* writable file on a disk with free space"):
        EmbeddingCache(path=tmp_path)  # a folder
    with pytest.raises(ConfigError, match="max_bytes of at least 0"):
        EmbeddingCache(max_bytes=-1)
