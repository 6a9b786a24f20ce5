"""backends/tensorrt with faces on the GPU: what is copied, what is not, and CUDA graphs.

The class runs in this process, on stand-ins for TensorRT, CUDA (tests/fake_tensorrt.py: its GPU is this host's memory)
and Triton's pb_utils. Capsules come from numpy, and go to numpy: the layout is not only our own opinion.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arcface_clients.faces.synthetic import synthetic_faces
from test_tensorrt_backend import REPO, TESTS, fake_plan, put, reference
from tiny_onnx import DIM

TO_GPU, TO_HOST, ON_GPU = 1, 2, 3
FACE = 112 * 112 * 3


class Tensor:
    """A pb_utils.Tensor: an array in host memory, or a capsule that says it is on the GPU."""

    def __init__(self, name: str, array: np.ndarray | None, capsule: Any = None) -> None:
        self.name, self.array, self.capsule = name, array, capsule

    def is_cpu(self) -> bool:
        return self.capsule is None

    def as_numpy(self) -> np.ndarray:
        assert self.array is not None, "Tensor is stored in GPU and cannot be converted to NumPy."
        return self.array

    def to_dlpack(self) -> Any:
        return self.capsule

    @staticmethod
    def from_dlpack(name: str, capsule: Any) -> Tensor:
        return Tensor(name, None, capsule)


class Request:
    def __init__(self, faces: np.ndarray, on_gpu: bool) -> None:
        capsule = faces.__dlpack__() if on_gpu else None
        self.face = Tensor("face", None if on_gpu else faces, capsule)

    def requested_output_names(self) -> list[str]:
        return ["embedding"]


class Backend:
    """The model of backends/tensorrt, initialised, and what to ask it."""

    def __init__(self, module: Any, tensors: Any, logged: list[str], folder: Path, config: dict[str, Any]) -> None:
        self.tensors, self.logged, self.model = tensors, logged, module.TritonPythonModel()
        full = {"max_batch_size": 16, "cc_model_filenames": {"8.6": "sm86.plan"}, **config}
        arguments = {"model_instance_kind": "GPU", "model_instance_device_id": "0", "model_name": "arcface_trt"}
        arguments |= {"model_instance_name": "arcface_trt_0", "model_repository": str(folder), "model_version": "1"}
        self.model.initialize({"model_config": json.dumps(full), **arguments})
        self.copied = self.model.cuda.handle.copied

    def ask(self, *requests: Request) -> list[tuple[np.ndarray, bool]]:
        """Each request's embeddings, and whether they were handed over on the GPU; copies are counted from here."""
        self.copied.update({TO_GPU: 0, TO_HOST: 0, ON_GPU: 0})
        return [self.read(response) for response in self.model.execute(list(requests))]

    def read(self, response: Any) -> tuple[np.ndarray, bool]:
        assert response.error is None, response.error
        (tensor,) = response.output_tensors
        if tensor.is_cpu():
            return np.array(tensor.as_numpy()), False
        rows = self.tensors.Rows(tensor)
        assert (rows.dtype, rows.shape[1:]) == (np.dtype(np.float32), (DIM,))
        memory = ctypes.string_at(rows.address, int(np.prod(rows.shape)) * 4)
        return np.frombuffer(memory, np.float32).reshape(rows.shape), True


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Backend]:
    """start(fault, **config): a Backend on the stand-ins."""
    from polygraphy.cuda import cuda as polygraphy_cuda

    def load(name: str, path: Path) -> Any:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    def start(fault: str = "", **config: Any) -> Backend:
        monkeypatch.setenv("FAKE_TRT_FAULT", fault)
        monkeypatch.setenv("FAKE_TRT_VERSION", "10.3.0")
        monkeypatch.setattr(polygraphy_cuda, "G_CUDA", None)  # the stand-in sets it
        logged: list[str] = []
        pb_utils = types.ModuleType("triton_python_backend_utils")
        pb_utils.Tensor = Tensor  # type: ignore[attr-defined]
        pb_utils.TritonError = str  # type: ignore[attr-defined]
        pb_utils.TritonModelException = RuntimeError  # type: ignore[attr-defined]
        pb_utils.InferenceResponse = lambda output_tensors=(), error=None: types.SimpleNamespace(  # type: ignore[attr-defined]
            output_tensors=list(output_tensors), error=error
        )
        pb_utils.get_input_tensor_by_name = lambda request, name: request.face  # type: ignore[attr-defined]
        pb_utils.Logger = types.SimpleNamespace(log_info=logged.append, log_warn=logged.append)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb_utils)
        load("tensorrt", TESTS / "fake_tensorrt.py")
        tensors = load("gpu_tensors", REPO / "backends" / "tensorrt" / "gpu_tensors.py")
        for name in ("plan_files", "gpu_buffers", "cuda_graphs"):
            load(name, REPO / "backends" / "tensorrt" / f"{name}.py")
        module = load("tensorrt_backend_model", REPO / "backends" / "tensorrt" / "model.py")
        (tmp_path / "1").mkdir(exist_ok=True)
        put(tmp_path, fake_plan(max_batch=16))
        return Backend(module, tensors, logged, tmp_path, config)

    return start


def aligned(faces: np.ndarray, off_by: int = 0) -> np.ndarray:
    """A copy at an address that is a multiple of 256, plus `off_by`."""
    room = np.empty(faces.nbytes + 512, np.uint8)
    start = -room.ctypes.data % 256 + off_by
    room[start : start + faces.nbytes] = faces.reshape(-1)
    return room[start : start + faces.nbytes].reshape(faces.shape)


def check(answers: Sequence[tuple[np.ndarray, bool]], parts: Sequence[np.ndarray], on_gpu: bool) -> None:
    for (rows, there), part in zip(answers, parts, strict=True):
        assert there is on_gpu
        np.testing.assert_allclose(rows, reference(part), atol=1e-6)


def test_a_lone_request_on_the_gpu_is_read_where_it_is_and_answered_there(start: Callable[..., Backend]) -> None:
    backend, faces = start(), aligned(synthetic_faces(5))
    check(backend.ask(Request(faces, on_gpu=True)), [faces], on_gpu=True)
    assert backend.copied == {TO_GPU: 0, TO_HOST: 0, ON_GPU: 0}
    host = synthetic_faces(3, seed=9)
    check(backend.ask(Request(host, on_gpu=False)), [host], on_gpu=False)  # back in our own buffer
    assert backend.copied == {TO_GPU: 3 * FACE, TO_HOST: 3 * DIM * 4, ON_GPU: 0}
    assert [line for line in backend.logged if "arrives" in line] == [
        "face arrives in memory of GPU 0", "face arrives in host memory"]  # fmt: skip


def test_an_address_that_tensorrt_does_not_accept_is_copied_on_the_gpu(start: Callable[..., Backend]) -> None:
    backend, faces = start(), aligned(synthetic_faces(2), off_by=64)
    check(backend.ask(Request(faces, on_gpu=True)), [faces], on_gpu=True)
    assert backend.copied == {TO_GPU: 0, TO_HOST: 0, ON_GPU: 2 * FACE}


def test_requests_on_the_gpu_are_gathered_there_and_mixed_ones_answered_on_the_host(
    start: Callable[..., Backend],
) -> None:
    backend, faces = start(), synthetic_faces(9)
    parts = [aligned(faces[:2]), aligned(faces[2:3]), faces[3:6], faces[6:8], aligned(faces[8:])]
    check(backend.ask(*(Request(part, on_gpu=True) for part in parts[:2])), parts[:2], on_gpu=True)
    assert backend.copied == {TO_GPU: 0, TO_HOST: 0, ON_GPU: 3 * FACE}
    kinds = [True, True, False, False, True]
    mixed = [Request(part, on_gpu=there) for part, there in zip(parts, kinds, strict=True)]
    check(backend.ask(*mixed), parts, on_gpu=False)
    assert backend.copied == {TO_GPU: 5 * FACE, TO_HOST: 9 * DIM * 4, ON_GPU: 4 * FACE}


def test_more_requests_than_the_profile_holds_keep_their_answers_apart(start: Callable[..., Backend]) -> None:
    backend, faces = start(), synthetic_faces(30)
    parts = [aligned(faces[:10]), aligned(faces[10:20]), aligned(faces[20:])]
    answers = backend.ask(*(Request(part, on_gpu=True) for part in parts))
    assert [there for _, there in answers] == [False, False, True]  # a next run would overwrite the first two
    for (rows, _), part in zip(answers, parts, strict=True):
        np.testing.assert_allclose(rows, reference(part), atol=1e-6)


def test_cuda_graphs_are_replayed_for_captured_sizes_where_the_config_asks(start: Callable[..., Backend]) -> None:
    backend, faces = start(optimization={"cuda": {"graphs": True}}), synthetic_faces(16)
    assert backend.logged[0].endswith("CUDA graphs of 1, 2, 3, 4, 6, 8, 12, 16")
    ran = []
    launch = backend.model.cuda.handle.cudaGraphLaunch
    backend.model.cuda.handle.cudaGraphLaunch = lambda graph, stream: ran.append(graph.value) or launch(graph, stream)
    for count, replayed in ((4, 1), (5, 1), (16, 2), (1, 3)):
        part = aligned(faces[:count])
        check(backend.ask(Request(part, on_gpu=True)), [part], on_gpu=True)
        assert len(ran) == replayed
    backend.model.finalize()
    assert backend.model.cuda.handle.graphs == {}
    assert "CUDA graphs" not in start().logged[0]


def test_a_plan_that_cannot_be_captured_is_served_without_graphs(start: Callable[..., Backend]) -> None:
    backend, faces = start("nograph", optimization={"cuda": {"graphs": True}}), synthetic_faces(4)
    assert backend.logged[0].startswith("no CUDA graphs for this plan: ")
    check(backend.ask(Request(faces, on_gpu=False)), [faces], on_gpu=False)


def test_a_width_that_the_engine_leaves_open_is_asked_of_the_context(start: Callable[..., Backend]) -> None:
    backend, faces = start("open"), synthetic_faces(3)
    check(backend.ask(Request(faces, on_gpu=False)), [faces], on_gpu=False)


def test_a_lent_tensor_is_one_that_numpy_reads_and_gives_back(
    start: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, memory = start().tensors, np.arange(24, dtype=np.float32)
    monkeypatch.setattr(tensors, "CUDA", 1)  # kDLCPU: numpy reads nothing else
    capsule = tensors.lend(memory.ctypes.data, (2, 12), memory.dtype, 0)
    methods = {"__dlpack__": lambda self, **_: capsule, "__dlpack_device__": lambda self: (1, 0)}
    read = np.from_dlpack(type("Lender", (), methods)())
    np.testing.assert_array_equal(read, memory.reshape(2, 12))
    assert len(tensors._lent) == 1
    del read
    assert not tensors._lent
