"""Stands for TensorRT and CUDA on hosts without a GPU: the API that is called, with ONNX Runtime inside.

A fixture puts it on a process's path as `tensorrt`, so everything around TensorRT is real: Polygraphy, the child
process, tritonserver. Environment: FAKE_SM (86); FAKE_TRT_VERSION (8.6.0, 10.3.0, 11.0.0: each lacks what that version
lacks); FAKE_TRT_FAULT: driver (none), crash, oom, error, slow, fp32 (kernels of another precision than asked), drift
(wrong numbers), drift_small (only on the profiles after the first), poison (a black face fails the whole run), nograph
(no CUDA graphs), abort_capture (the process dies when it captures one), open (an engine that does not know its output's
width). The tests that use it run on the real TensorRT behind the marker `gpu`.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import pickle
import sys
import time
import types

import numpy as np
import onnx
import onnxruntime
from polygraphy.cuda import cuda as polygraphy_cuda

from arcface_build.plans.typed import layer_precisions, tensor_types

__version__ = os.environ.get("FAKE_TRT_VERSION", "10.3.0")
FAULT = os.environ.get("FAKE_TRT_FAULT", "")
MAJOR = int(__version__.split(".")[0])


def _enum(name: str, members: str) -> type[enum.IntEnum]:
    return enum.IntEnum(name, {member: i for i, member in enumerate(members.split())})


DataType = _enum("DataType", "FLOAT HALF INT8 INT32 BOOL UINT8" + (" INT64 BF16" if MAJOR >= 10 else ""))
float32, float16, int8, int32, uint8 = DataType.FLOAT, DataType.HALF, DataType.INT8, DataType.INT32, DataType.UINT8
bool = DataType.BOOL
if MAJOR >= 10:
    bfloat16, int64 = DataType.BF16, DataType.INT64
    _FLAGS = "STRONGLY_TYPED" if MAJOR >= 11 else "EXPLICIT_BATCH STRONGLY_TYPED"
    NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag", _FLAGS)
else:
    NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH")
_OLD_FLAGS = "FP16 INT8 OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS"
BuilderFlag = _enum("BuilderFlag", ("" if MAJOR >= 11 else _OLD_FLAGS + " ") + "TF32 REFIT")
MemoryPoolType = _enum("MemoryPoolType", "WORKSPACE DLA_MANAGED_SRAM")
_EXTERNAL = "" if MAJOR >= 11 else "CUBLAS CUBLAS_LT CUDNN "
TacticSource = _enum("TacticSource", _EXTERNAL + "EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS")
ProfilingVerbosity = _enum("ProfilingVerbosity", "LAYER_NAMES_ONLY NONE DETAILED")
_SAME = " SAME_COMPUTE_CAPABILITY" if tuple(map(int, __version__.split(".")[:2])) >= (10, 9) else ""
HardwareCompatibilityLevel = _enum("HardwareCompatibilityLevel", "NONE AMPERE_PLUS" + _SAME)
PreviewFeature, DeviceType = _enum("PreviewFeature", "X"), _enum("DeviceType", "GPU DLA")
LayerType = _enum("LayerType", "CONVOLUTION CONSTANT SHUFFLE SHAPE CAST QUANTIZE DEQUANTIZE ELEMENTWISE")
TensorIOMode, TensorFormat = _enum("TensorIOMode", "NONE INPUT OUTPUT"), _enum("TensorFormat", "LINEAR HWC CHW16")
TensorLocation = _enum("TensorLocation", "DEVICE HOST")
LayerInformationFormat = _enum("LayerInformationFormat", "ONELINE JSON")


class ILogger:
    pass


class Logger(ILogger):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self, severity: int = 2) -> None:
        self.severity = severity


class IOutputAllocator:
    pass


class IProfiler:
    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


if MAJOR >= 10:

    class IProgressMonitor:
        pass


def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> None:
    pass


class _Network(list):
    """Layers of the parsed ONNX; a list, as INetworkDefinition is a sequence."""

    model: onnx.ModelProto
    strongly_typed = False
    num_inputs = 1

    def get_input(self, index: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(name="face", is_shape_tensor=False, shape=(-1, 112, 112, 3), dtype=uint8)

    if MAJOR >= 10:

        def get_flag(self, flag: int) -> int:
            return self.strongly_typed


class OnnxParser:
    num_errors = 0

    def get_error(self, index: int) -> str:
        return "[E] a convolution has invalid weights type of Int8"

    def __init__(self, network: _Network, logger: ILogger) -> None:
        self.network, self.flags = network, 0

    def parse_from_file(self, model: str) -> int:
        parsed = self.network.model = onnx.load(model)
        stored = {i.name for i in parsed.graph.initializer if i.data_type == 3}
        half = {i.name for i in parsed.graph.initializer if i.data_type == 10}
        quantised = [n for n in parsed.graph.node if n.op_type == "DequantizeLinear"]
        newer = max(o.version for o in parsed.opset_import) > 17
        if MAJOR < 10 and (newer or any(n.input[0] in stored or n.input[1] in half for n in quantised)):
            self.num_errors = 1
            return False
        kinds, kind_of = tensor_types(parsed.graph), {1: float32, 10: float16, 3: int8}
        for node in parsed.graph.node:
            layer = types.SimpleNamespace(name=node.name, type=LayerType.ELEMENTWISE, num_outputs=1, precision=None)
            layer.type = LayerType.CONVOLUTION if node.op_type == "Conv" else layer.type
            output = types.SimpleNamespace(name=node.output[0], dtype=kind_of.get(kinds.get(node.output[0]), int32))
            layer.get_output = lambda _, output=output: output
            layer.precision_is_set = False
            self.network.append(layer)
        return True


class _TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data or b"timings"

    def serialize(self) -> _Buffer:
        return _Buffer(self.data)

    def combine(self, input_cache: _TimingCache, ignore_mismatch: int) -> int:
        return True


class _Buffer(bytes):
    def __enter__(self) -> _Buffer:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Config:
    """Only what an IBuilderConfig of this version has: setting anything else is an AttributeError, as in TensorRT."""

    __slots__ = ("DLA_core", "builder_optimization_level", "cache", "default_device_type", "engine_capability", "flags")
    __slots__ += ("hardware_compatibility_level", "limits", "profiles", "profiling_verbosity", "sources")
    __slots__ += ("progress_monitor",) if MAJOR >= 10 else ("int8_calibrator",)

    def __init__(self) -> None:
        self.flags, self.limits, self.profiles, self.sources = {BuilderFlag.TF32}, {}, [], 31
        self.DLA_core, self.default_device_type, self.engine_capability = -1, DeviceType.GPU, 0
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        if MAJOR < 10:
            self.int8_calibrator = None
        else:
            self.progress_monitor = None

    num_optimization_profiles = property(lambda self: len(self.profiles))

    def set_flag(self, flag: int) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: int) -> None:
        self.flags.discard(flag)

    def get_flag(self, flag: int) -> int:
        return flag in self.flags

    def add_optimization_profile(self, profile: _Profile) -> None:
        self.profiles.append(profile)

    def set_memory_pool_limit(self, pool: int, pool_size: int) -> None:
        self.limits[pool] = pool_size

    def get_memory_pool_limit(self, pool: int) -> int:
        return self.limits.get(pool, 0)

    def set_tactic_sources(self, tactic_sources: int) -> None:
        self.sources = tactic_sources

    def get_tactic_sources(self) -> int:
        return self.sources

    def create_timing_cache(self, serialized_timing_cache: bytes) -> _TimingCache:
        return _TimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: int) -> None:
        self.cache = cache

    def get_timing_cache(self) -> _TimingCache:
        return self.cache


class _Profile(dict):
    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        self[input] = (min, opt, max)


class Builder:
    def __init__(self, logger: ILogger) -> None:
        if FAULT == "crash":
            os.abort()

    def create_network(self, flags: int = 0) -> _Network:
        network = _Network()
        asked = MAJOR >= 10 and flags & (1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED) > 0
        network.strongly_typed = MAJOR >= 11 or asked
        return network

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> memoryview | None:
        if FAULT == "slow":
            time.sleep(60)
        if FAULT in ("oom", "error"):
            said = "[E] Error Code 2: OutOfMemory" if FAULT == "oom" else "[E] Error Code 10: no kernel for Conv_7"
            print(said, file=sys.stderr)
            return None
        monitor = getattr(config, "progress_monitor", None)
        if monitor:
            monitor.phase_start("Building", None, 2)
            for step in range(2):
                monitor.step_complete("Building", step)
            monitor.phase_finish("Building")
        pins = {layer.name: layer.precision.name for layer in network if layer.precision is not None}
        flags = [flag.name for flag in config.flags]
        plan = {"version": __version__, "onnx": network.model.SerializeToString(), "pins": pins, "flags": flags}
        plan |= {"profile": dict(config.profiles[0]), "profiles": [dict(profile) for profile in config.profiles]}
        plan |= {"typed": network.strongly_typed, "sources": config.sources}
        level = getattr(config, "hardware_compatibility_level", None)
        plan |= {"level": level.name if level is not None else ""}
        plan |= {"verbosity": config.profiling_verbosity.name, "workspace": config.limits[MemoryPoolType.WORKSPACE]}
        return memoryview(pickle.dumps(plan))  # as IHostMemory: a buffer with nbytes, and no bytes


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        pass

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        plan = pickle.loads(bytes(serialized_engine))
        return ICudaEngine(plan) if plan["version"] == __version__ else None


class ICudaEngine:
    num_io_tensors = 2

    def __init__(self, plan: dict) -> None:
        self.plan = plan
        self.session = onnxruntime.InferenceSession(plan["onnx"], providers=["CPUExecutionProvider"])
        self.dim = self.session.get_outputs()[0].shape[1]
        self.profiles = plan.get("profiles") or [plan["profile"]]

    num_optimization_profiles = property(lambda self: len(self.profiles))
    if MAJOR >= 10:

        def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
            return 1_000_000 * self.profiles[profile_index]["face"][2][0]
    else:
        device_memory_size = property(lambda self: 1_000_000 * max(p["face"][2][0] for p in self.profiles))

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)

    def create_engine_inspector(self) -> _Inspector:
        return _Inspector(self.plan)

    def get_tensor_name(self, index: int) -> str:
        return ("face", "embedding")[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == "face" else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return uint8 if name == "face" else float32

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 112, 112, 3) if name == "face" else (-1, -1 if FAULT == "open" else self.dim)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> tuple[tuple[int, ...], ...]:
        return self.profiles[profile_index][name]

    if MAJOR >= 10:

        def get_tensor_format(self, name: str, profile_index: int = 0) -> TensorFormat:
            return TensorFormat.LINEAR

    else:

        def get_tensor_format(self, name: str) -> TensorFormat:
            return TensorFormat.LINEAR

    def is_shape_inference_io(self, name: str) -> int:
        return False


class IExecutionContext:
    active_optimization_profile = 0
    profiler: IProfiler | None = None

    def __init__(self, engine: ICudaEngine) -> None:
        self.engine, self.shape, self.addresses, self.allocator = engine, None, {}, None

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> int:
        self.active_optimization_profile, self.shape = profile_index, None
        return 0 <= profile_index < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> int:
        low, _, high = self.engine.profiles[self.active_optimization_profile][name]
        if len(shape) != 4 or not low[0] <= shape[0] <= high[0]:
            return False
        self.shape = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...] | None:
        return self.shape if name == "face" else (self.shape[0], self.engine.dim)

    def get_tensor_address(self, name: str) -> int:
        return self.addresses.get(name, 0)

    def set_tensor_address(self, name: str, memory: int) -> int:
        self.addresses[name] = memory
        return True

    def set_output_allocator(self, name: str, output_allocator: IOutputAllocator) -> int:
        self.allocator = output_allocator
        return True

    def execute_async_v3(self, stream_handle: int) -> int:
        if _Cudart.capturing is not None:
            shape, addresses = self.shape, dict(self.addresses)
            _Cudart.capturing.append(lambda: self._run(shape, addresses))
            return True
        return self._run(self.shape, self.addresses)

    def _run(self, shape: tuple[int, ...], addresses: dict[str, int]) -> int:
        raw = ctypes.string_at(addresses["face"], int(np.prod(shape)))
        faces = np.frombuffer(raw, np.uint8).reshape(shape)
        if FAULT == "poison" and (faces == 0).all(axis=(1, 2, 3)).any():
            return False
        started = time.perf_counter()
        result = np.ascontiguousarray(self.engine.session.run(["embedding"], {"face": faces})[0], np.float32)
        if self.profiler is not None:
            names = [node.name for node in onnx.load_from_string(self.engine.plan["onnx"]).graph.node]
            for name in names:
                self.profiler.report_layer_time(name, (time.perf_counter() - started) * 1e3 / len(names))
        if FAULT == "drift" or (FAULT == "drift_small" and self.active_optimization_profile):
            result = np.roll(result, 1, axis=1)
        if self.allocator is not None:
            addresses["embedding"] = self.allocator.reallocate_output("embedding", 0, result.nbytes, 256)
            self.allocator.notify_shape("embedding", result.shape)
        ctypes.memmove(addresses["embedding"], result.ctypes.data, result.nbytes)
        return True


class _Inspector:
    execution_context = None

    def __init__(self, plan: dict) -> None:
        self.plan = plan

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        model = onnx.load_from_string(self.plan["onnx"])
        asked = layer_precisions(model.graph, tensor_types(model.graph))
        layers = []
        for node in model.graph.node:
            precision = asked.get(node.output[0], "fp32")
            if precision == "fp32" and self.plan.get("pins", {}).get(node.name) == "HALF":
                precision = "fp16"
            flag = {"fp16": "FP16", "int8": "INT8"}.get(precision)
            by_flags = flag is None or (flag in self.plan["flags"])
            if FAULT == "fp32" or not (self.plan["typed"] or by_flags):
                precision = "fp32"
            text = {"fp32": "FP32", "fp16": "FP16", "int8": "Int8", "bf16": "BF16"}[precision]
            kind = {"Conv": "CaskConvolution", "Gemm": "CaskGemmMatrixMultiply"}.get(node.op_type, node.op_type)
            tensor = {"Name": node.input[0] if node.input else ""}
            if self.execution_context is not None and self.execution_context.shape is not None:
                tensor |= {"DataType": text, "Format": "NHWC8"} if MAJOR >= 11 else {"Format/Datatype": f"NHWC8 {text}"}
            layers.append({"Name": node.name, "LayerType": kind, "Inputs": [tensor], "Outputs": []})
        detailed = self.plan["verbosity"] == "DETAILED"
        return json.dumps({"Layers": layers if detailed else [layer["Name"] for layer in layers]})


class _Cudart:
    """The CUDA runtime's functions that are called by name, on the memory of this host."""

    capturing: list | None = None  # runs that a graph records instead of doing them

    def __init__(self) -> None:
        self.kept: dict[int, object] = {}
        self.graphs: dict[int, list] = {}
        self.times: dict[int, float] = {}
        self.copied = {1: 0, 2: 0, 3: 0}  # bytes by cudaMemcpyKind: to the GPU, to the host, on the GPU

    def cudaStreamBeginCapture(self, stream: object, mode: object) -> int:
        if FAULT == "abort_capture":
            os.abort()
        if FAULT == "nograph":
            return 900  # cudaErrorStreamCaptureUnsupported
        _Cudart.capturing = []
        return 0

    def cudaStreamEndCapture(self, stream: object, graph: object) -> int:
        graph._obj.value = len(self.graphs) + 1
        self.graphs[graph._obj.value], _Cudart.capturing = _Cudart.capturing or [], None
        return 0

    def cudaGraphInstantiateWithFlags(self, executable: object, graph: object, flags: object) -> int:
        executable._obj.value = graph.value
        return 0

    def cudaGraphDestroy(self, graph: object) -> int:
        return 0

    def cudaGraphExecDestroy(self, graph: object) -> int:
        return 0 if self.graphs.pop(graph.value, None) else 1

    def cudaGraphLaunch(self, graph: object, stream: object) -> int:
        return 0 if all(run() for run in self.graphs[graph.value]) else 1

    def cudaGetLastError(self) -> int:
        return 0

    def cudaEventCreate(self, event: object) -> int:
        event._obj.value = len(self.times) + 1
        self.times[event._obj.value] = 0.0
        return 0

    def cudaEventRecord(self, event: object, stream: object) -> int:
        self.times[event.value] = time.perf_counter()
        return 0

    def cudaEventElapsedTime(self, ms: object, first: object, second: object) -> int:
        ms._obj.value = (self.times[second.value] - self.times[first.value]) * 1e3
        return 0

    def cudaEventDestroy(self, event: object) -> int:
        return 0

    def __getattr__(self, name: str) -> object:
        raise AttributeError(f"the fake CUDA runtime has no {name}")

    def cudaGetDeviceCount(self, count: object) -> int:
        if FAULT == "driver":
            print("[W] Unable to determine GPU memory usage: CUDA driver version is insufficient", file=sys.stderr)
            return 35
        count._obj.value = 1
        return 0

    def cudaMemGetInfo(self, free: object, total: object) -> int:
        free._obj.value, total._obj.value = 23 << 30, 24 << 30
        return 0

    def cudaSetDevice(self, device: object) -> int:
        return 0

    def cudaDeviceGetAttribute(self, value: object, attribute: object, device: object) -> int:
        sm = os.environ.get("FAKE_SM", "86")
        value._obj.value = int(sm[:-1] if attribute == 75 else sm[-1])
        return 0

    def cudaStreamCreate(self, stream: object) -> int:
        stream._obj.value = 1
        return 0

    def cudaStreamSynchronize(self, stream: object) -> int:
        return 0

    def cudaStreamDestroy(self, stream: object) -> int:
        return 0

    def cudaMalloc(self, pointer: object, size: object) -> int:
        memory = ctypes.create_string_buffer(getattr(size, "value", size) or 1)
        pointer._obj.value = ctypes.addressof(memory)
        self.kept[pointer._obj.value] = memory
        return 0

    cudaMallocHost = cudaMalloc

    def cudaFree(self, pointer: object) -> int:
        self.kept.pop(pointer.value, None)
        return 0

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, target: object, source: object, size: object, kind: object, stream: object) -> int:
        ctypes.memmove(target, source, getattr(size, "value", size))
        self.copied[getattr(kind, "value", kind)] += getattr(size, "value", size)
        return 0

    def cudaMemcpy(self, target: object, source: object, size: object, kind: object) -> int:
        return self.cudaMemcpyAsync(target, source, size, kind, 0)


class _Wrapper(polygraphy_cuda.Cuda):
    def __init__(self) -> None:
        self.handle = _Cudart()


polygraphy_cuda.G_CUDA = _Wrapper()
