"""Triton's `tensorrt` backend in Python: serves the native backend's config.pbtxt where only the wheel is installed.

It reads the settings that the native backend reads: cc_model_filenames (SM of the GPU → plan), instance_group,
max_batch_size. Differences: a GPU whose SM is not mapped is an error (no default_model_filename, no model.plan: a plan
of another SM does not load), and the first optimization profile is used. Requests of one batch are computed in one run.
All buffers are allocated once, for the largest batch of the profile; a request costs one copy into pinned memory. It
needs tensorrt, polygraphy and a CUDA runtime (arcface-triton[tensorrt] installs the last two); CUDA is called through
polygraphy.cuda.
"""

import ctypes
import hashlib
import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

try:
    import tensorrt as trt
    from polygraphy import cuda

    NOT_INSTALLED = ""
except (ImportError, OSError) as exc:
    NOT_INSTALLED = str(exc)

TRITON_DTYPES = {
    "FLOAT": "TYPE_FP32",
    "HALF": "TYPE_FP16",
    "INT8": "TYPE_INT8",
    "INT32": "TYPE_INT32",
    "BOOL": "TYPE_BOOL",
    "UINT8": "TYPE_UINT8",
    "INT64": "TYPE_INT64",
}
NUMPY_DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "INT64": np.int64,
}
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # cudaDeviceAttr


class TritonPythonModel:
    """One instance of one model: one execution context with its own stream and buffers."""

    @staticmethod
    def auto_complete_config(config):
        """Add the inputs and outputs that config.pbtxt omits, read from the plan for this GPU."""
        current = config.as_dict()
        if current["input"] and current["output"]:
            return config
        engine = _load(_version_folder_of_this_stub(), current, _use_device(0))
        batched = current["max_batch_size"] > 0
        for tensor in _tensors(engine):
            shape = [int(d) for d in engine.get_tensor_shape(tensor)]
            described = {
                "name": tensor,
                "data_type": TRITON_DTYPES[engine.get_tensor_dtype(tensor).name],
                "dims": shape[1:] if batched else shape,
            }
            if _is_input(engine, tensor) and not current["input"]:
                config.add_input(described)
            elif not _is_input(engine, tensor) and not current["output"]:
                config.add_output(described)
        return config

    def initialize(self, args):
        """Load the plan for this instance's GPU and allocate everything that requests will need."""
        config = json.loads(args["model_config"])
        on_gpu = args["model_instance_kind"] == "GPU"
        device = _use_device(int(args["model_instance_device_id"]) if on_gpu else 0)
        folder = Path(args["model_repository"]) / args["model_version"]
        self.engine = _load(folder, config, device)
        self.context = self.engine.create_execution_context()
        if not self.context:
            raise pb_utils.TritonModelException(
                f"no execution context for {args['model_name']}: the GPU is out of memory. "
                "Free some, or lower instance_group count"
            )
        self.max_batch = _max_batch(self.engine, args["model_name"], int(config["max_batch_size"]))
        self.cuda = cuda.wrapper()
        self.stream = self.cuda.create_stream()
        self.inputs = {n: self._buffer(n) for n in _tensors(self.engine) if _is_input(self.engine, n)}
        self.outputs = {n: self._buffer(n) for n in _tensors(self.engine) if not _is_input(self.engine, n)}
        pb_utils.Logger.log_info(
            f"{args['model_instance_name']}: {_plan_name(folder, config, device)} on GPU {device}, SM {_sm(device)}, "
            f"TensorRT {trt.__version__}, batches up to {self.max_batch}"
        )

    def execute(self, requests):
        """Answer all requests from one run; if it fails, run each alone, so that one cannot fail the others."""
        answers, good = [None] * len(requests), []
        for i, request in enumerate(requests):
            try:
                good.append((i, request, self._parts(request)))
            except Exception as exc:
                answers[i] = _error(exc)
        try:
            self._answer(good, answers)
        except Exception:
            for one in good:
                try:
                    self._answer([one], answers, last=False)
                except Exception as exc:
                    answers[one[0]] = _error(exc)
        return answers

    def finalize(self):
        """Free the memory; the context first, because it still points there."""
        self.context = self.engine = None
        for host, _, device in [*self.inputs.values(), *self.outputs.values()]:
            self.cuda.free(device)
            self.cuda.check(self.cuda.handle.cudaFreeHost(ctypes.c_void_p(host.ctypes.data)))
        self.cuda.destroy_stream(self.stream)

    def _parts(self, request):
        """The arrays of a request, checked for a common number of rows that fits the profile."""
        parts = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        rows = {len(part) for part in parts.values()}
        if len(rows) != 1 or not 0 < max(rows) <= self.max_batch:
            raise ValueError(
                f"a request of {sorted(rows)} rows: expected 1 to {self.max_batch}, the same in every input"
            )
        for name, part in parts.items():
            host = self.inputs[name][0]
            if part.shape[1:] != host.shape[1:] or part.dtype != host.dtype:
                raise ValueError(f"{name} is {part.dtype} {part.shape}: expected {host.dtype} (N, {host.shape[1:]})")
        return parts

    def _answer(self, good, answers, last=True):
        """Run in groups that fit the profile (one group if Triton's max_batch_size is right) and fill `answers`.

        Answers of the last run in an execute call are views of pinned memory, which Triton copies before the next call;
        answers of earlier runs are copies, because the next run would overwrite them.
        """
        while good:
            rows, group = 0, []
            while good and rows + len(next(iter(good[0][2].values()))) <= self.max_batch:
                group.append(good[0])
                rows += len(next(iter(good[0][2].values())))
                good = good[1:]
            results = self._run([parts for _, _, parts in group], rows)
            take, start = np.asarray if last and not good else np.copy, 0
            for i, request, parts in group:
                mine = slice(start, start + len(next(iter(parts.values()))))
                names = request.requested_output_names()
                tensors = [pb_utils.Tensor(name, take(results[name][mine])) for name in names]
                answers[i] = pb_utils.InferenceResponse(output_tensors=tensors)
                start = mine.stop

    def _run(self, requests, rows):
        """Copy in, compute, copy out on one stream; the results are views of the pinned output buffers."""
        to_device, to_host = cuda.MemcpyKind.HostToDevice, cuda.MemcpyKind.DeviceToHost
        for name, (host, row_bytes, device) in self.inputs.items():
            start = 0
            for parts in requests:
                host[start : start + len(parts[name])] = parts[name]
                start += len(parts[name])
            shape = (rows, *host.shape[1:])
            if tuple(self.context.get_tensor_shape(name) or ()) != shape and not self.context.set_input_shape(
                name, shape
            ):
                raise RuntimeError(f"the plan refused {name} of shape {shape}")
            self.cuda.memcpy(device, host.ctypes.data, rows * row_bytes, to_device, self.stream)
        if not self.context.execute_async_v3(self.stream):
            raise RuntimeError("TensorRT could not run the plan; the server's log has its reason")
        for host, row_bytes, device in self.outputs.values():
            self.cuda.memcpy(host.ctypes.data, device, rows * row_bytes, to_host, self.stream)
        self.cuda.stream_synchronize(self.stream)
        return {name: host[:rows] for name, (host, _, _) in self.outputs.items()}

    def _buffer(self, name):
        """(pinned host array, bytes of a row, device pointer) of a tensor at the largest batch, bound here."""
        dtype = np.dtype(NUMPY_DTYPES[self.engine.get_tensor_dtype(name).name])
        shape = (self.max_batch, *(int(d) for d in tuple(self.engine.get_tensor_shape(name))[1:]))
        size = int(np.prod(shape)) * dtype.itemsize
        pointer = ctypes.c_void_p()
        self.cuda.check(self.cuda.handle.cudaMallocHost(ctypes.byref(pointer), ctypes.c_size_t(size)))
        memory = (ctypes.c_byte * size).from_address(pointer.value)
        host = np.frombuffer(memory, dtype).reshape(shape)
        device = self.cuda.malloc(size)
        if not self.context.set_tensor_address(name, device):
            raise pb_utils.TritonModelException(f"TensorRT accepts no buffer for {name}")
        return host, size // self.max_batch, device


def _error(exc):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"tensorrt: {exc}"))


def _use_device(device):
    """Make a GPU current in this process, and return its number; an error if it does not exist."""
    if NOT_INSTALLED:
        raise pb_utils.TritonModelException(
            f"TensorRT is not installed for this server ({NOT_INSTALLED}). Next: serve with ONNX Runtime "
            "(--model-config-name onnx), or install arcface-triton[tensorrt] and tensorrt here"
        )
    count = ctypes.c_int()
    try:
        runtime = cuda.wrapper().handle
        status = runtime.cudaGetDeviceCount(ctypes.byref(count))
    except Exception as exc:  # polygraphy raises its own exception if it finds no CUDA runtime
        raise pb_utils.TritonModelException(
            f"no CUDA runtime can be loaded ({str(exc).splitlines()[0]}). Next: pip install 'arcface-triton[tensorrt]'"
        ) from exc
    if status or device >= count.value:
        raise pb_utils.TritonModelException(
            f"no GPU {device} on this host (CUDA error {status}, {count.value} GPUs). Next: serve with ONNX Runtime "
            "(--model-config-name onnx), or check the driver with nvidia-smi"
        )
    cuda.wrapper().check(runtime.cudaSetDevice(device))
    return device


def _sm(device):
    """The GPU's compute capability as cc_model_filenames spells it: "8.6"."""
    numbers = []
    for attribute in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR):
        value = ctypes.c_int()
        runtime = cuda.wrapper()
        runtime.check(runtime.handle.cudaDeviceGetAttribute(ctypes.byref(value), attribute, device))
        numbers.append(value.value)
    return f"{numbers[0]}.{numbers[1]}"


def _plan_name(folder, config, device):
    """The plan mapped to this GPU; there is no default, because a plan of another SM does not load."""
    sm, mapped = _sm(device), config.get("cc_model_filenames") or {}
    have = ", ".join(sorted(path.name for path in folder.glob("*.plan"))) or "none"
    if sm not in mapped:
        raise pb_utils.TritonModelException(
            f"no plan for SM {sm} in cc_model_filenames (mapped: {', '.join(mapped) or 'none'}). "
            f"Next, on this host: arcface plan build NAME, then add {sm} to config.pbtxt"
        )
    if not (folder / mapped[sm]).is_file():
        raise pb_utils.TritonModelException(
            f"no plan {mapped[sm]} for SM {sm} in {folder} (found: {have}). "
            f"Next, on an SM {sm} GPU: arcface plan build NAME, then arcface assemble"
        )
    return mapped[sm]


def _load(folder, config, device):
    """The engine of the plan for this GPU."""
    path = folder / _plan_name(folder, config, device)
    content = _checked(path)  # before TensorRT sees it: a plan is code, and runs with the server's rights
    logger = trt.Logger(trt.Logger.WARNING)
    trt.init_libnvinfer_plugins(logger, "")
    engine = trt.Runtime(logger).deserialize_cuda_engine(content)
    if engine is None:
        raise pb_utils.TritonModelException(
            f"TensorRT {trt.__version__} does not load {path.name}: it was built for another GPU. "
            "Next: arcface plan build on this host"
        )
    return engine


def _checked(path):
    """The plan's bytes, if the manifest beside it has their digest and this TensorRT's version.

    `arcface serve` checks the manifest's signature before it starts the server, with the public key that it has.
    """
    manifest = path.with_name(path.name + ".json")
    try:
        with manifest.open("rb") as file:
            said = json.loads(file.read(1 << 20))
        sha256, version = str(said["sha256"]), str(said["spec"]["tensorrt"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise pb_utils.TritonModelException(
            f"{path.name} has no readable manifest at {manifest} ({type(exc).__name__}: {exc}), so nothing "
            "says what it is. Next: arcface assemble NAME --plan FILE"
        ) from exc
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise pb_utils.TritonModelException(
            f"{path.name} does not match its manifest (expected sha256 {sha256[:12]}): it was damaged or changed. "
            "Next: arcface assemble NAME --plan FILE, or arcface rollback --model arcface_trt"
        )
    if version.split("+")[0].split(".")[:3] != trt.__version__.split("+")[0].split(".")[:3]:
        raise pb_utils.TritonModelException(
            f"{path.name} was built with TensorRT {version}, this server has {trt.__version__}. "
            "Next: arcface plan build on this host, or a server with that version"
        )
    return content


def _max_batch(engine, model, configured):
    """The largest batch of the first profile; Triton must not send more."""
    limits = [int(engine.get_tensor_profile_shape(n, 0)[2][0]) for n in _tensors(engine) if _is_input(engine, n)]
    if configured > min(limits):
        raise pb_utils.TritonModelException(
            f"{model}: max_batch_size is {configured}, but the plan accepts batches up to {min(limits)}. "
            f"Next: lower max_batch_size, or arcface plan build NAME --max-batch {configured}"
        )
    return min(limits)


def _tensors(engine):
    return [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]


def _is_input(engine, name):
    return engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT


def _version_folder_of_this_stub():
    """The version folder; auto_complete_config gets no path, but the stub process has it as its first argument."""
    return Path(Path("/proc/self/cmdline").read_bytes().split(b"\0")[1].decode()).parent
