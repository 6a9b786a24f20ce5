"""CUDA shared memory: the whole exchange on a stand-in for the driver, and the real Triton's refusal without a GPU."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from arcface_clients import AsyncTritonEmbedder, FakeEmbedder, FallbackEmbedder, TritonEmbedder
from arcface_clients.contract import FACE_BYTES
from arcface_clients.errors import ConfigError, CudaFailed, DeadlineExceeded, DependencyMissing, InvalidFaces
from arcface_clients.faces.check import check_faces, check_in_place, to_gpu
from arcface_clients.faces.gpu_arrays import GpuFaces, is_on_gpu
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.gpu.driver import LIBRARY_VARIABLE, driver
from arcface_clients.triton.memory.cuda import CudaSlot
from arcface_clients.triton.memory.system import FOLDER, GRACE_S, left_behind, stale
from arcface_clients.triton.session import RECHECK_AFTER_S
from arcface_tools.clients import run
from arcface_tools.gpu_check.clocks import GpuLog
from arcface_tools.gpu_check.settings import Settings
from arcface_tools.gpu_check.stages.through_triton import through
from deadlines import HANG_S
from fake_cuda import MAX_BATCH, WIDTH, FakeCuda, FakeGpuServer, projected

FACES = synthetic_faces(11)
ROW_BYTES = WIDTH * 4

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm on this host")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    if not shutil.which("gcc"):
        pytest.skip("no gcc: the stand-in for libcuda cannot be compiled")
    return FakeCuda(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def cuda(library: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A host with two GPUs; at its end nothing may be left on them, nor have been freed under somebody's feet."""
    monkeypatch.setenv(LIBRARY_VARIABLE, str(library.path))
    driver.cache_clear()
    library.room(1 << 40)
    before = library.counts()
    yield library
    gc.collect()
    after = library.counts()
    driver.cache_clear()
    assert (after.allocations, after.streams) == (before.allocations, before.streams)
    assert after.violations == 0


@pytest.fixture
def server(cuda: FakeCuda) -> Iterator[FakeGpuServer]:
    server = FakeGpuServer(cuda)
    yield server
    server.forget()
    server.stop()


class ByDlpack:
    """An array on GPU 0 as torch shows it; made of an array over the stand-in's memory."""

    def __init__(self, array: np.ndarray, owner: Any = None) -> None:
        self.array, self.owner, self.streams = array, owner, []
        self.shape = array.shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, stream: int) -> Any:
        self.streams.append(stream)
        return self.array.__dlpack__()


def over(faces: GpuFaces) -> np.ndarray:
    """The stand-in's device memory as an array."""
    memory = (ctypes.c_ubyte * faces.nbytes).from_address(faces.address)
    return np.frombuffer(memory, np.uint8).reshape(faces.shape)


@pytest.mark.parametrize("count", [1, 8, 9, 50])
def test_faces_on_a_gpu_reach_the_server_without_touching_the_host(cuda, server, count) -> None:
    faces = np.concatenate([FACES] * 5)[:count]
    there = to_gpu(faces)
    with TritonEmbedder(server.url, in_flight=3) as embedder:
        embedder.encode(there[:1])  # chooses the way, with one black face from the host
        assert (
            str(embedder.gpu_shared_memory) == "CUDA shared memory: the server opened a region of ours on GPU 0, and "
            "embedded a face in it"
        )
        cuda.counts()
        embeddings = embedder.encode(there)
        moved = cuda.counts()
        assert (moved.to_device, moved.within, moved.to_host) == (0, count * FACE_BYTES, count * ROW_BYTES)
        np.testing.assert_allclose(embeddings, projected(faces), atol=1e-6)
        assert 1 <= len(server.regions) <= 4
        assert server.wire_requests == 0
    assert server.regions == {}


def test_asyncio_does_the_same(cuda, server) -> None:
    there = to_gpu(FACES)

    async def work() -> list[np.ndarray]:
        async with AsyncTritonEmbedder(server.url) as embedder:
            many = await asyncio.gather(*(embedder.encode(there[i:]) for i in range(len(FACES))))
            assert embedder.gpu_shared_memory and embedder.gpu_shared_memory.kind == "cuda"
            streamed = [rows async for rows in embedder.encode_stream([there[:3], FACES[3], there[4:]])]
            return [*many, np.concatenate([streamed[0], streamed[1][None], streamed[2]])]

    *answers, streamed = asyncio.run(work())
    for i, answer in enumerate(answers):
        np.testing.assert_allclose(answer, projected(FACES[i:]), atol=1e-6)
    np.testing.assert_allclose(streamed, projected(FACES), atol=1e-6)


def test_cuda_can_be_asked_for_and_then_takes_host_faces_too(cuda, server) -> None:
    with TritonEmbedder(server.url, shared_memory="cuda") as embedder:
        np.testing.assert_allclose(embedder.encode(FACES), projected(FACES), atol=1e-6)
        np.testing.assert_allclose(embedder.encode(to_gpu(FACES)), projected(FACES), atol=1e-6)
        assert embedder.shared_memory.kind == "cuda"
        assert embedder.gpu_shared_memory is embedder.shared_memory
    assert server.wire_requests == 0


def test_faces_go_through_a_region_on_their_own_gpu(cuda, server) -> None:
    with TritonEmbedder(server.url) as embedder:
        for device in (0, 1, 0):
            np.testing.assert_allclose(embedder.encode(to_gpu(FACES, device)), projected(FACES), atol=1e-6)
        assert {slot.device for slot in embedder._session.regions.pool._all} == {0, 1}


def test_a_stream_may_mix_host_and_gpu_and_keeps_the_order(cuda, server) -> None:
    lone = to_gpu(FACES[6:7])
    items = [FACES[0], to_gpu(FACES[1:4]), FACES[4:6], ByDlpack(over(lone)[0], lone), FACES[7:]]
    with TritonEmbedder(server.url) as embedder:
        rows = list(embedder.encode_stream(items))
    assert [row.shape for row in rows] == [(WIDTH,), (3, WIDTH), (2, WIDTH), (WIDTH,), (4, WIDTH)]
    np.testing.assert_allclose(np.concatenate([np.atleast_2d(row) for row in rows]), projected(FACES), atol=1e-6)


def test_a_restarted_server_is_told_of_the_regions_again(cuda, server) -> None:
    there = to_gpu(FACES)
    with TritonEmbedder(server.url) as embedder:
        embedder.encode(there)
        server.forget()
        np.testing.assert_allclose(embedder.encode(there), projected(FACES), atol=1e-6)
        assert embedder.gpu_shared_memory.kind == "cuda"


def test_memory_of_a_lost_request_is_neither_used_again_nor_freed_while_the_server_has_it(cuda, server) -> None:
    there = to_gpu(FACES[:1])
    with TritonEmbedder(server.url, timeout_s=0.2) as embedder:
        embedder.encode(there)
        server.fault = 0.5
        with pytest.raises(DeadlineExceeded):
            embedder.encode(there)
        server.fault = None
        np.testing.assert_allclose(embedder.encode(there), projected(FACES[:1]), atol=1e-6)
        (lost,) = [slot for slot in embedder._session.regions.pool._all if slot.doubtful]
        time.sleep(0.5)  # its answer comes, late, into a region that nobody else uses
        np.testing.assert_allclose(lost.rows(1), projected(FACES[:1]), atol=1e-6)
    assert set(server.regions) == {lost.name}
    assert lost.name in left_behind()
    os.utime(lost.path, (0, 0))
    TritonEmbedder(server.url, shared_memory="cuda").ensure_ready()
    assert lost.name not in server.regions
    assert lost.name not in left_behind()
    lost.doubtful, lost.registered_with = False, None
    lost.close()


def test_memory_of_a_lost_request_is_freed_when_the_server_has_forgotten_it(cuda, server) -> None:
    there = to_gpu(FACES[:1])
    with TritonEmbedder(server.url, timeout_s=0.2) as embedder:
        embedder.encode(there)
        server.fault = 0.5
        with pytest.raises(DeadlineExceeded):
            embedder.encode(there)
        time.sleep(RECHECK_AFTER_S + 0.1)  # it is asked anew after so long, since it may have been restarted
        server.fault = None
        server.forget()
        embedder.encode(there)
        assert not any(slot.doubtful for slot in embedder._session.regions.pool._all)


def test_what_a_dead_process_left_at_the_server_is_removed_by_the_next_client(cuda, server) -> None:
    """The file of a region says whether its owner lives, if it is in the /dev/shm that we see."""
    slot = CudaSlot(2, 4, 0)
    elsewhere = f"arcface-cuda-0{FOLDER.stat().st_dev + 1:x}-12ab"
    foreign = "somebody-elses"
    for name in (slot.name, elsewhere, foreign):
        server.regions[name] = (0, 0)
    with TritonEmbedder(server.url, shared_memory="cuda") as embedder:
        embedder.ensure_ready()
    assert slot.name in server.regions
    assert not stale(slot.name, now_s=time.time() + 10 * GRACE_S)  # its owner lives
    slot.doubtful = True
    slot.close()  # as at the end of a process: the lock goes, file and memory stay
    os.utime(slot.path, (0, time.time() - GRACE_S - 1))
    assert stale(slot.name)
    with TritonEmbedder(server.url) as embedder:
        embedder.encode(to_gpu(FACES))
    assert set(server.regions) == {elsewhere, foreign}
    assert slot.name not in left_behind()
    slot.doubtful = False
    slot.close()


def test_a_client_without_a_gpu_tidies_up_after_a_dead_one_that_had_one(cuda, odd_server) -> None:
    slot = CudaSlot(2, 4, 0)
    slot.doubtful = True
    slot.close()
    os.utime(slot.path, (0, time.time() - GRACE_S - 1))
    with TritonEmbedder(odd_server.grpc_url, "good") as embedder:
        embedder.ensure_ready()
    assert slot.name not in left_behind()
    slot.doubtful = False
    slot.close()


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("refuse", "one face through GPU 0 did not come back: .*this backend reads no memory of a GPU"),
        ("no room", r"CUDA: cuMemAlloc_v2 returned 2 \(out of memory\). Check the GPU: nvidia-smi"),
        ("no driver", "no CUDA driver on this host"),
        ("no gpu", r"CUDA: cuInit returned 100 \(no CUDA-capable device is detected\)"),
    ],
)
def test_where_cuda_is_not_possible_the_next_way_is_taken_and_says_why(
    cuda, server, monkeypatch, caplog, fault, why
) -> None:
    if fault == "refuse":
        server.fault = fault
    elif fault == "no room":
        cuda.room(1000)
    else:
        driver.cache_clear()
        variable, value = (LIBRARY_VARIABLE, "/no/libcuda.so") if fault == "no driver" else ("FAKE_CUDA_NO_GPU", "1")
        monkeypatch.setenv(variable, value)
    with TritonEmbedder(server.url, shared_memory="cuda") as embedder:
        np.testing.assert_allclose(embedder.encode(FACES), projected(FACES), atol=1e-6)
        assert embedder.shared_memory.kind is None
        assert re.search(
            f"; CUDA shared memory was asked for and is not possible: {why}", embedder.shared_memory.reason
        )
    assert "is not possible" in caplog.text
    assert server.wire_requests == 2


def test_regions_that_run_out_later_send_faces_over_the_wire(cuda, server) -> None:
    there = to_gpu(FACES[:2])
    with TritonEmbedder(server.url) as embedder:
        embedder.encode(there)
        server.forget()
        embedder._session.regions.pool.take(MAX_BATCH, WIDTH, 0)  # the only one there is
        cuda.room(1000)
        np.testing.assert_allclose(embedder.encode(there), projected(FACES[:2]), atol=1e-6)
        assert "copied to the host first: no more room in memory on GPU 0" in str(embedder.gpu_shared_memory)
        for slot in embedder._session.regions.pool._all:
            slot.registered_with = None
            embedder._session.regions.pool.give(slot)


@pytest.mark.parametrize(
    ("shared_memory", "kind", "why"),
    [
        ("auto", "KIND_CPU", "'arcface' runs on the server's CPU"),
        (False, "KIND_GPU", "shared_memory is False"),
        ("system", "KIND_GPU", "shared_memory is 'system'"),
    ],
)
def test_faces_on_a_gpu_are_copied_to_the_host_where_cuda_is_not_the_way(cuda, shared_memory, kind, why) -> None:
    server = FakeGpuServer(cuda, kind)
    with TritonEmbedder(server.url, shared_memory=shared_memory) as embedder:
        np.testing.assert_allclose(embedder.encode(to_gpu(FACES)), projected(FACES), atol=1e-6)
        assert str(embedder.gpu_shared_memory) == f"the wire: faces on the GPU are copied to the host first: {why}"
    server.stop()
    assert server.regions == {}


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_real_server_without_a_gpu_refuses_our_region_and_gets_system_memory(cuda, odd_server, protocol) -> None:
    address = f"grpc://{odd_server.grpc_url}" if protocol == "grpc" else f"http://{odd_server.http_url}"
    with TritonEmbedder(address, "good", shared_memory="cuda") as embedder:
        np.testing.assert_allclose(embedder.encode(FACES), projected(FACES), atol=1e-5)
        np.testing.assert_allclose(embedder.encode(to_gpu(FACES)), projected(FACES), atol=1e-5)
        assert str(embedder.shared_memory).startswith(
            "system shared memory: the server is on this host and opened a region of ours; CUDA shared memory was "
            "asked for and is not possible: the server cannot open a region of ours on GPU 0: "
        )
        # what Triton says when its own cudaIpcOpenMemHandle failed; a request that it cannot read has other words
        assert (
            "failed to register shared memory region: invalid args. It needs that GPU" in embedder.shared_memory.reason
        )


def test_dlpack_is_asked_to_wait_for_its_producer(cuda) -> None:
    there = to_gpu(FACES)
    producer = ByDlpack(over(there), there)
    found = check_in_place(producer)
    assert (found.device, found.address, len(found)) == (0, there.address, len(FACES))
    assert producer.streams == [1]
    np.testing.assert_array_equal(found[2:4].to_host(), FACES[2:4])
    np.testing.assert_array_equal(check_faces(producer), FACES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.transpose(0, 3, 1, 2), r"got \(11, 3, 112, 112\), on a GPU. This looks like NCHW"),
        (lambda a: a[:, :, :50], r"expected faces of shape \(N, 112, 112, 3\) BGR, got \(11, 112, 50, 3\)"),
        (lambda a: a.transpose(0, 2, 1, 3), "not C-contiguous: pass faces.contiguous()"),
        (lambda a: a[..., ::-1], "not C-contiguous"),
        (lambda a: a.view(np.int8), "expected faces of dtype uint8"),
    ],
)
def test_arrays_on_a_gpu_that_are_no_faces_are_refused(cuda, change, words) -> None:
    there = to_gpu(FACES)
    array = change(over(there))

    class ByInterface:
        __cuda_array_interface__ = {**array.__array_interface__, "version": 2}  # noqa: RUF012

    for producer in (ByDlpack(array), ByInterface()):
        for check in (check_in_place, check_faces):
            with pytest.raises(InvalidFaces, match=words):
                check(producer)


def test_every_engine_takes_faces_on_a_gpu(cuda, server) -> None:
    there = to_gpu(FACES)
    with FakeEmbedder() as fake:
        np.testing.assert_array_equal(fake.encode(there), fake.encode(FACES))
    with TritonEmbedder(server.url) as triton, FallbackEmbedder([("triton", lambda: triton)]) as chain:
        np.testing.assert_allclose(chain.encode(there), projected(FACES), atol=1e-6)
        assert triton.gpu_shared_memory.kind == "cuda"  # the chain left them on the GPU
    assert check_faces(ByDlpack(over(there)[:0])).shape == (0, 112, 112, 3)
    with pytest.raises(InvalidFaces, match=r"a list of arrays on a GPU: expected one array, such as torch.stack"):
        check_faces([there, there])


def test_host_arrays_are_not_taken_for_gpu_ones() -> None:
    class OnCpu(ByDlpack):
        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    class Elsewhere(ByDlpack):
        def __dlpack_device__(self) -> tuple[int, int]:
            raise ValueError("Unknown device type mps for Dlpack")

    assert not any(map(is_on_gpu, (FACES, [FACES], OnCpu(FACES), Elsewhere(FACES), None, "faces")))


def test_no_driver_and_no_such_gpu_are_told_apart(cuda, monkeypatch) -> None:
    with pytest.raises(CudaFailed, match=r"cuDeviceGet returned 101"):
        to_gpu(FACES, device=7)
    monkeypatch.setenv(LIBRARY_VARIABLE, "/no/such/libcuda.so.1")
    driver.cache_clear()
    with pytest.raises(DependencyMissing, match="no CUDA driver on this host"):
        to_gpu(FACES)


def test_both_benches_measure_regions_on_the_gpu_with_faces_of_the_host_and_on_it(cuda, server) -> None:
    names = ("grpc-cudashm", "grpc-gpufaces")
    result = run(
        None, server.url, "", model="arcface", batch=8, in_flight=(2,), transports=names, rounds=1, sample_s=0.02
    )
    assert [row["name"] for row in result["variants"]] == [f"client {name} in flight 2" for name in names]

    settings = Settings(networks=(), batches=(1, 8), sample_s=0.01, warm_up_s=0, callers=2)
    check = SimpleNamespace(faces=FACES, settings=settings, log=GpuLog())
    found = through(check, server.url, "cuda", projected(FACES), {8: 1e9}, model="arcface")
    assert found["drift"]["max_drift"] < 1e-6
    for rows in (found["rows"], found["rows_of_gpu_faces"]):
        assert [(row["batch"], row["callers"]) for row in rows] == [(1, 1), (1, 2), (8, 1), (8, 2)]
        assert rows[0]["of_the_plan_alone"] is None and rows[3]["of_the_plan_alone"] < 1
    assert server.wire_requests == 0


def test_shared_memory_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="shared_memory is 'gpu'; expected auto, system, cuda, true or false"):
        TritonEmbedder(shared_memory="gpu")


OTHER_PROCESS = """
import ctypes, sys, numpy as np
cuda = ctypes.CDLL("libcuda.so.1")
handle, count, rows_offset = bytes.fromhex(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
Handle = type("Handle", (ctypes.Structure,), {"_fields_": [("bytes", ctypes.c_char * 64)]})
context, address = ctypes.c_void_p(), ctypes.c_uint64()
faces, rows = np.empty(count * 37632, np.uint8), np.arange(count * 4, dtype=np.float32)
assert cuda.cuInit(0) == 0
assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
assert cuda.cuCtxPushCurrent_v2(context) == 0
assert cuda.cuIpcOpenMemHandle_v2(ctypes.byref(address), Handle.from_buffer_copy(handle), 1) == 0
here, size = ctypes.c_void_p(faces.ctypes.data), ctypes.c_size_t(faces.nbytes)
assert cuda.cuMemcpyDtoH_v2(here, address, size) == 0
there, here, size = ctypes.c_uint64(address.value + rows_offset), ctypes.c_void_p(rows.ctypes.data), rows.nbytes
assert cuda.cuMemcpyHtoD_v2(there, here, ctypes.c_size_t(size)) == 0
assert cuda.cuCtxSynchronize() == 0
assert cuda.cuIpcCloseMemHandle(address) == 0
print(int(faces.astype(np.int64).sum()))
"""


@pytest.mark.gpu(tensorrt=False)
def test_another_process_opens_a_slot_on_a_real_gpu() -> None:
    slot = CudaSlot(len(FACES), 4, 0)
    try:
        slot.put([FACES[:2], to_gpu(FACES[2:])])
        assert np.isnan(slot.rows(len(FACES))).all()
        arguments = [slot.raw_handle.hex(), str(len(FACES)), str(slot.rows_at(1)[0])]
        command = [sys.executable, "-c", OTHER_PROCESS, *arguments]
        seen = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANG_S).stdout
        assert int(seen) == int(FACES.astype(np.int64).sum())
        np.testing.assert_array_equal(slot.rows(len(FACES)).ravel(), np.arange(len(FACES) * 4))
        np.testing.assert_array_equal(slot.faces(len(FACES)), FACES)
    finally:
        slot.close()


@pytest.mark.gpu(tensorrt=False)
def test_the_same_on_a_real_gpu(odd_server) -> None:
    """The model runs on the CPU, so that Triton itself has to read from and write to our memory on the GPU."""
    there = to_gpu(np.concatenate([FACES] * 5))
    np.testing.assert_array_equal(there.to_host()[: len(FACES)], FACES)
    with TritonEmbedder(odd_server.grpc_url, "good", shared_memory="cuda", in_flight=3) as embedder:
        for faces in (there, np.concatenate([FACES] * 5)):
            np.testing.assert_allclose(embedder.encode(faces), projected(np.concatenate([FACES] * 5)), atol=1e-5)
        assert embedder.shared_memory.kind == "cuda", embedder.shared_memory
        names = {slot.name for slot in embedder._session.regions.pool._all}
    assert not names & set(left_behind())
    with TritonEmbedder(f"http://{odd_server.http_url}", "good", shared_memory="cuda") as embedder:
        np.testing.assert_allclose(embedder.encode(there[:11]), projected(FACES), atol=1e-5)
        assert embedder.shared_memory.kind == "cuda", embedder.shared_memory


@pytest.mark.gpu(tensorrt=False)
def test_torch_tensors_on_a_real_gpu_are_read_in_place(odd_server) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    with torch.cuda.stream(torch.cuda.Stream()):  # its work is not on the default stream
        faces = torch.from_numpy(FACES).cuda(non_blocking=True).flip(-1).contiguous()
        with TritonEmbedder(odd_server.grpc_url, "good", shared_memory="cuda") as embedder:
            embeddings = embedder.encode(faces)
            assert embedder.shared_memory.kind == "cuda", embedder.shared_memory
    np.testing.assert_allclose(embeddings, projected(np.ascontiguousarray(FACES[..., ::-1])), atol=1e-5)
