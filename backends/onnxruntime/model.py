"""Triton's `onnxruntime` backend in Python: serves the native backend's config.pbtxt where only the wheel is installed.

It reads the settings that the native backend reads: default_model_filename, cc_model_filenames, instance_group, the
parameters intra_op_thread_count, inter_op_thread_count and execution_mode, optimization.graph.level and
optimization.execution_accelerators. At load it refuses what the native one refuses, so that a config.pbtxt that works
here works there. Differences, both measured: threads default to cores / instances, and they stop spinning when a run
ends. Requests of one batch are computed in one run. I/O binding to our own buffers is not used, because it was no
faster than `run` (1.00 × on a 0.4 ms network).
"""

import ctypes
import json
import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

TRITON_DTYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(double)": "TYPE_FP64",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(bool)": "TYPE_BOOL",
    "tensor(string)": "TYPE_STRING",
}
PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
GRAPH_LEVELS = {-1: "ORT_ENABLE_BASIC", 0: "ORT_ENABLE_ALL", 1: "ORT_ENABLE_EXTENDED", 2: "ORT_DISABLE_ALL"}
AUTOFILLED_BATCH = 4  # tritonserver's default-max-batch-size, which is not passed to python-based backends


class TritonPythonModel:
    """One instance of one model."""

    @staticmethod
    def auto_complete_config(config):
        """Add the inputs and outputs that config.pbtxt omits, read from the ONNX file.

        As in the native backend, a config.pbtxt with both is unchanged; one without max_batch_size gets one if every
        tensor of the file has an open first dimension.
        """
        current = config.as_dict()
        if current["input"] and current["output"]:
            return config
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = _open(_model_file_of_this_stub(current), options, ["CPUExecutionProvider"])
        tensors = [*session.get_inputs(), *session.get_outputs()]
        batched = current["max_batch_size"] > 0
        if not batched and all(_shape(tensor)[:1] == [-1] for tensor in tensors):
            config.set_max_batch_size(AUTOFILLED_BATCH)
            batched = True
        if batched and not current.get("dynamic_batching") and not current.get("sequence_batching"):
            config.set_dynamic_batching()
        if not current["input"]:
            for tensor in session.get_inputs():
                config.add_input(_tensor_config(tensor, batched))
        if not current["output"]:
            for tensor in session.get_outputs():
                config.add_output(_tensor_config(tensor, batched))
        return config

    def initialize(self, args):
        """Open the session of this instance."""
        config = json.loads(args["model_config"])
        filename = _file_name(config, args["model_instance_kind"], int(args["model_instance_device_id"]))
        path = Path(args["model_repository"]) / args["model_version"] / filename
        wanted = _wanted_providers(config, args["model_instance_kind"], int(args["model_instance_device_id"]))
        threads = _threads(config)
        self.session = _open(path, _session_options(config, threads), wanted)
        taken, expected = self.session.get_providers()[0], wanted[0][0] if isinstance(wanted[0], tuple) else wanted[0]
        if taken != expected:  # ONNX Runtime falls back to the CPU without an error
            raise pb_utils.TritonModelException(
                f"{args['model_name']}: ONNX Runtime used {taken}, but {expected} is configured; its log says why. "
                "To run on the CPU on purpose: instance_group kind KIND_CPU and no execution accelerator"
            )
        _check_tensors("input", config, self.session.get_inputs(), path)
        _check_tensors("output", config, self.session.get_outputs(), path)
        self.inputs = [tensor.name for tensor in self.session.get_inputs()]
        self.outputs = [tensor.name for tensor in self.session.get_outputs()]
        self.demo = _count_demo(config, args["model_name"])
        pb_utils.Logger.log_info(
            f"{args['model_instance_name']}: {path.parent.name}/{filename} on {taken}"
            + (f", {threads} threads" if taken == "CPUExecutionProvider" else "")
        )

    def execute(self, requests):
        """Answer all requests from one run; if it fails, run each alone, so that one cannot fail the others."""
        try:
            return self._run(requests)
        except Exception as exc:
            if len(requests) == 1:
                return [pb_utils.InferenceResponse(error=pb_utils.TritonError(f"onnxruntime: {exc}"))]
            return [self.execute([request])[0] for request in requests]

    def _run(self, requests):
        feeds, rows = {}, []
        for name in self.inputs:
            parts = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            rows = [len(part) for part in parts]
            feeds[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        results = dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))
        responses, start = [], 0
        for request, count in zip(requests, rows, strict=True):
            # A whole result or a slice of its rows is C-contiguous, so Tensor does not copy it.
            mine = slice(start, start + count)
            tensors = [pb_utils.Tensor(name, results[name][mine]) for name in request.requested_output_names()]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
            start += count
        return responses


def _count_demo(config, model):
    """The metric arcface_demo_weights, 1 where the weights are random and recognise nobody; kept alive by its owner."""
    if _parameter(config, "demo", "") != "true":
        return None
    family = pb_utils.MetricFamily(
        name="arcface_demo_weights",
        description="1: the weights are random and recognise nobody",
        kind=pb_utils.MetricFamily.GAUGE,
    )
    metric = family.Metric(labels={"model": model})
    metric.set(1)
    return family, metric


def _model_file_of_this_stub(config):
    """The ONNX file; auto_complete_config gets no path, but the stub process has it as its first argument."""
    first = Path(Path("/proc/self/cmdline").read_bytes().split(b"\0")[1].decode())
    return first.parent / (config["default_model_filename"] or "model.onnx")


def _file_name(config, kind, device):
    """The file for this instance: that of the GPU's SM where one is mapped, else the default, as for every CPU."""
    default, mapped = config.get("default_model_filename") or "model.onnx", config.get("cc_model_filenames") or {}
    return mapped.get(_sm(device), default) if kind == "GPU" and mapped else default


def _sm(device):
    """The GPU's compute capability, "8.6", from the driver; "" where it does not tell."""
    numbers, handle = [], ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), device):
            return ""
    except (OSError, AttributeError):
        return ""
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, cuda.h
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle):
            return ""
        numbers.append(str(value.value))
    return ".".join(numbers)


def _open(path, options, providers):
    if not path.is_file():
        raise pb_utils.TritonModelException(
            f"no weights at {path}. Install some: arcface import demo (to try it), or arcface import YOUR.onnx"
        )
    try:
        return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as exc:
        raise pb_utils.TritonModelException(f"ONNX Runtime {ort.__version__} cannot load {path}: {exc}") from exc


def _session_options(config, threads):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = int(_parameter(config, "inter_op_thread_count", 0)) or 1
    mode = _parameter(config, "execution_mode", "0")
    if mode not in ("0", "1"):
        raise pb_utils.TritonModelException(
            f"parameter execution_mode is {mode!r}: expected 0 (sequential) or 1 (parallel)"
        )
    if mode == "1":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, GRAPH_LEVELS.get(level, "ORT_ENABLE_ALL"))
    return options


def _threads(config):
    """intra_op_thread_count if it is above 0, else the cores of this process divided by the instances."""
    configured = int(_parameter(config, "intra_op_thread_count", 0))
    if configured > 0:
        return configured
    instances = sum(group.get("count", 1) for group in config.get("instance_group", [])) or 1
    return max(1, len(os.sched_getaffinity(0)) // instances)


def _wanted_providers(config, kind, device_id):
    """Providers in order of preference; the session must use the first."""
    accelerators = config.get("optimization", {}).get("execution_accelerators", {})
    side = "gpu_execution_accelerator" if kind == "GPU" else "cpu_execution_accelerator"
    available, wanted = ort.get_available_providers(), []
    for accelerator in accelerators.get(side, []):
        provider = PROVIDERS.get(accelerator["name"])
        if provider is None or provider not in available:
            raise pb_utils.TritonModelException(
                f"no accelerator {accelerator['name']!r} in this ONNX Runtime (it has {', '.join(available)}). "
                "Install the wheel that has it (openvino: onnxruntime-openvino; tensorrt: onnxruntime-gpu)"
            )
        wanted.append((provider, _accelerator_options(accelerator, _threads(config), device_id)))
    if kind == "GPU":
        if PROVIDERS["cuda"] in available:
            wanted.append((PROVIDERS["cuda"], {"device_id": str(device_id)}))
        else:
            pb_utils.Logger.log_warn(
                "there is a GPU, but this ONNX Runtime has no CUDA provider: install onnxruntime-gpu. Using the CPU"
            )
    return [*wanted, "CPUExecutionProvider"]


def _accelerator_options(accelerator, threads, device_id):
    if accelerator["name"] != "openvino":
        return {"device_id": str(device_id)}
    precision = accelerator.get("parameters", {}).get("precision", "fp32").lower()
    if precision == "bf16" and not _cpu_has_bf16():
        pb_utils.Logger.log_warn("bf16 is configured, but this CPU has no bf16 instructions: OpenVINO runs fp32")
        precision = "fp32"
    hints = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "fp16": "f16"}.get(precision, precision)}
    hints |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1"}
    return {"device_type": "CPU", "load_config": json.dumps({"CPU": hints})}


def _cpu_has_bf16():
    flags = Path("/proc/cpuinfo").read_text().split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _parameter(config, key, default):
    return config.get("parameters", {}).get(key, {}).get("string_value", default)


def _tensor_config(tensor, batched):
    shape = _shape(tensor)
    return {"name": tensor.name, "data_type": TRITON_DTYPES[tensor.type], "dims": shape[1:] if batched else shape}


def _shape(tensor):
    """Dimensions of a tensor of the file, with open ones as -1."""
    return [d if isinstance(d, int) and d > 0 else -1 for d in tensor.shape]


def _check_tensors(kind, config, tensors, path):
    """Check config.pbtxt against the file as the native backend does.

    All inputs must be stated, outputs may be omitted. config.pbtxt may fix an input's dimension that the file leaves
    open; an output's dimensions must equal the file's, with -1 only where the file has it.
    """
    have = {tensor.name: tensor for tensor in tensors}
    stated = config.get(kind, [])
    if kind == "input" and len(stated) != len(have):
        raise pb_utils.TritonModelException(
            f"config.pbtxt states {len(stated)} inputs, {path} has {len(have)} ({', '.join(have)}). "
            "Omit them: they are read from the file"
        )
    for entry in stated:
        name, tensor = entry["name"], have.get(entry["name"])
        if tensor is None:
            raise pb_utils.TritonModelException(f"{path} has no {kind} {name!r}: expected one of {', '.join(have)}")
        if entry["data_type"] != TRITON_DTYPES.get(tensor.type):
            raise pb_utils.TritonModelException(
                f"{kind} {name!r} is {TRITON_DTYPES.get(tensor.type, tensor.type)} in {path}, config.pbtxt says "
                f"{entry['data_type']}"
            )
        shape = _shape(tensor)
        if not shape:
            continue
        batched = config.get("max_batch_size", 0) > 0
        wanted = [-1] * batched + [int(d) for d in (entry.get("reshape") or {}).get("shape", entry["dims"])]
        same = len(shape) == len(wanted) and all(
            mine == theirs or (kind == "input" and mine == -1) for mine, theirs in zip(shape, wanted, strict=True)
        )
        if not same or (batched and shape[0] != -1):
            raise pb_utils.TritonModelException(
                f"{kind} {name!r} has shape {shape} in {path}, config.pbtxt says {wanted}"
                + ", the first for max_batch_size" * batched
                + ". Omit its dims: they are read from the file"
            )
