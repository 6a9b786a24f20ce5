"""Where no machine of ours has a GPU: a libcuda made of host memory, and a server that opens its regions over gRPC."""

from __future__ import annotations

import ctypes
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

WIDTH, MAX_BATCH = 64, 8


@dataclass(frozen=True)
class Counts:
    """Live allocations and streams, bytes copied since the last count, and frees of memory that was open elsewhere."""

    allocations: int
    streams: int
    to_device: int
    to_host: int
    within: int
    violations: int


class FakeCuda:
    """The other side of fake_libcuda.c."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "libcuda.so.1"
        source = Path(__file__).with_suffix("").with_name("fake_libcuda.c")
        command = ["gcc", "-O1", "-shared", "-fPIC", "-pthread", "-o", str(self.path), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        self.library = ctypes.CDLL(str(self.path))
        self.library.fake_open.restype = ctypes.c_uint64
        self.library.fake_open.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t)
        self.library.fake_close.argtypes = (ctypes.c_uint64,)
        self.library.fake_room.argtypes = (ctypes.c_size_t,)

    def room(self, byte_size: int) -> None:
        """How much all GPUs hold together."""
        self.library.fake_room(byte_size)

    def counts(self) -> Counts:
        counts = (ctypes.c_uint64 * 6)()
        self.library.fake_counts(counts)
        return Counts(*counts)


def projected(faces: np.ndarray) -> np.ndarray:
    """The embeddings of odd_models.py."""
    weights = np.random.default_rng(5).standard_normal((28 * 28 * 3, WIDTH)).astype(np.float32)
    rows = (faces[:, ::4, ::4].reshape(len(faces), -1).astype(np.float32) - 127.5) @ weights
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class FakeGpuServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """As much of Triton as a client asks: a model on GPU 0, CUDA regions that it really opens, and no system memory.

    Attributes:
        regions: address, size and registered message by name.
        fault: "refuse" fails every request through a region; seconds make every request that slow.
    """

    def __init__(self, cuda: FakeCuda, kind: str = "KIND_GPU") -> None:
        self.cuda, self.kind = cuda, kind
        self.regions: dict[str, tuple[int, int]] = {}
        self.fault: str | float | None = None
        self.wire_requests = 0
        self.server = grpc.server(ThreadPoolExecutor(8))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self.server)
        self.url = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def stop(self) -> None:
        self.server.stop(None).wait()

    def forget(self) -> None:
        """What a restart does to regions."""
        for address, _ in self.regions.values():
            self.cuda.library.fake_close(address)
        self.regions.clear()

    def ModelConfig(self, request, context):
        reply = service_pb2.ModelConfigResponse()
        config = reply.config
        config.name, config.backend, config.max_batch_size = request.name, "tensorrt", MAX_BATCH
        config.input.add(name="face", data_type="TYPE_UINT8", dims=[112, 112, 3])
        config.output.add(name="embedding", data_type="TYPE_FP32", dims=[WIDTH])
        config.instance_group.add(name="0", kind=self.kind, count=1, gpus=[0] if self.kind == "KIND_GPU" else [])
        return reply

    def SystemSharedMemoryRegister(self, request, context):
        context.abort(grpc.StatusCode.INTERNAL, f"Unable to open shared memory region: '{request.key}'")

    def SystemSharedMemoryStatus(self, request, context):
        return service_pb2.SystemSharedMemoryStatusResponse()

    def SystemSharedMemoryUnregister(self, request, context):
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    def CudaSharedMemoryRegister(self, request, context):
        if request.name in self.regions:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"shared memory region '{request.name}' already in manager")
        address = self.cuda.library.fake_open(request.raw_handle, request.device_id, request.byte_size)
        if not address or len(request.raw_handle) != 64:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "failed to open CUDA IPC handle: invalid argument")
        self.regions[request.name] = (address, request.byte_size)
        return service_pb2.CudaSharedMemoryRegisterResponse()

    def CudaSharedMemoryUnregister(self, request, context):
        address, _ = self.regions.pop(request.name, (0, 0))
        self.cuda.library.fake_close(address)
        return service_pb2.CudaSharedMemoryUnregisterResponse()

    def CudaSharedMemoryStatus(self, request, context):
        reply = service_pb2.CudaSharedMemoryStatusResponse()
        for name, (_, size) in self.regions.items():
            reply.regions[name].name, reply.regions[name].byte_size = name, size
        return reply

    def ModelInfer(self, request, context):
        face, embedding = request.inputs[0], request.outputs[0]
        shape = tuple(face.shape)
        shared = "shared_memory_region" in face.parameters
        if shared and self.fault == "refuse":
            context.abort(grpc.StatusCode.INTERNAL, "this backend reads no memory of a GPU")
        faces = np.frombuffer(self._place(face, context) if shared else request.raw_input_contents[0], np.uint8)
        rows = projected(faces.reshape(shape))
        if isinstance(self.fault, float):
            time.sleep(self.fault)
        reply = service_pb2.ModelInferResponse(model_name=request.model_name)
        reply.outputs.add(name="embedding", datatype="FP32", shape=rows.shape)
        if "shared_memory_region" in embedding.parameters:
            np.frombuffer(self._place(embedding, context), np.float32).reshape(rows.shape)[:] = rows
            reply.raw_output_contents.append(b"")  # as Triton does, so that outputs and contents stay in step
        else:
            self.wire_requests += 1
            reply.raw_output_contents.append(rows.tobytes())
        return reply

    def _place(self, tensor, context) -> ctypes.Array:
        name = tensor.parameters["shared_memory_region"].string_param
        offset = tensor.parameters["shared_memory_offset"].int64_param
        length = tensor.parameters["shared_memory_byte_size"].int64_param
        if name not in self.regions:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Unable to find cuda shared memory region: '{name}'")
        address, size = self.regions[name]
        if offset + length > size:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "Invalid offset + byte size for shared memory region")
        return (ctypes.c_ubyte * length).from_address(address + offset)
