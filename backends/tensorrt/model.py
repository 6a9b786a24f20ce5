"""Triton's `tensorrt` backend in Python: serves the native backend's config.pbtxt where only the wheel is installed.

It reads the settings that the native backend reads: cc_model_filenames (SM of the GPU → plan), instance_group,
max_batch_size, optimization.cuda.graphs. Differences: a GPU whose SM is not mapped is an error (no
default_model_filename, no model.plan: a plan of another SM does not load), and the first optimization profile is used.
Requests of one batch are computed in one run. All buffers are allocated once, for the largest batch of the profile.
Faces on the host are copied into pinned memory first. Faces on the GPU (CUDA shared memory) stay there, a lone
request's are read where they are, and their embeddings are handed over on the GPU too: nothing passes through the host.
It needs tensorrt, polygraphy and a CUDA runtime (the extra `tensorrt` brings the last two); CUDA is called
through polygraphy.cuda.
"""

import json
from pathlib import Path

import cuda_graphs
import gpu_tensors
import numpy as np
import plan_files
import triton_python_backend_utils as pb_utils
from gpu_buffers import Buffer

if not plan_files.NOT_INSTALLED:  # else the first use of a device says so
    import tensorrt as trt
    from polygraphy import cuda

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
GRAPH_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)  # and the largest: those that the native backend captures
ALIGNMENT = 256  # bytes: what TensorRT requires of an address (NvInferRuntime.h, setTensorAddress)


class TritonPythonModel:
    """One instance of one model: one execution context with its own stream and buffers."""

    @staticmethod
    def auto_complete_config(config):
        """Add the inputs and outputs that config.pbtxt omits, read from the plan for this GPU."""
        current = config.as_dict()
        if current["input"] and current["output"]:
            return config
        engine = plan_files.load(_version_folder_of_this_stub(), current, plan_files.use_device(0))
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
        device = plan_files.use_device(int(args["model_instance_device_id"]) if on_gpu else 0)
        folder = Path(args["model_repository"]) / args["model_version"]
        self.engine = plan_files.load(folder, config, device)
        self.context = self.engine.create_execution_context()
        if not self.context:
            raise pb_utils.TritonModelException(
                f"no execution context for {args['model_name']}: the GPU is out of memory. "
                "Free some, or lower instance_group count"
            )
        self.max_batch = _max_batch(self.engine, args["model_name"], int(config["max_batch_size"]))
        self.cuda = cuda.wrapper()
        self.stream = self.cuda.create_stream()
        self.device, self.seen = device, set()
        self.inputs = {n: self._buffer(n) for n in _tensors(self.engine) if _is_input(self.engine, n)}
        for name, buffer in self.inputs.items():  # outputs have the shapes that follow from them
            self.context.set_input_shape(name, buffer.host.shape)
        self.outputs = {n: self._buffer(n) for n in _tensors(self.engine) if not _is_input(self.engine, n)}
        self.graphs = self._captured() if _asks_for_graphs(config) else {}
        pb_utils.Logger.log_info(
            f"{args['model_instance_name']}: {plan_files.plan_name(folder, config, device)} on GPU {device}, "
            f"SM {plan_files.sm_of(device)}, TensorRT {trt.__version__}, batches up to {self.max_batch}"
            + (f", CUDA graphs of {', '.join(map(str, self.graphs))}" if self.graphs else "")
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
        cuda_graphs.destroy(self.cuda, self.graphs.values())
        self.context = self.engine = None
        for buffer in [*self.inputs.values(), *self.outputs.values()]:
            buffer.free()
        self.cuda.destroy_stream(self.stream)

    def _parts(self, request):
        """The rows of a request by input, checked for a common number that fits the profile."""
        parts = {name: gpu_tensors.Rows(pb_utils.get_input_tensor_by_name(request, name)) for name in self.inputs}
        rows = {len(part) for part in parts.values()}
        if len(rows) != 1 or not 0 < max(rows) <= self.max_batch:
            raise ValueError(
                f"a request of {sorted(rows)} rows: expected 1 to {self.max_batch}, the same in every input"
            )
        for name, part in parts.items():
            host = self.inputs[name].host
            if part.shape[1:] != host.shape[1:] or part.dtype != host.dtype:
                raise ValueError(f"{name} is {part.dtype} {part.shape}: expected {host.dtype} (N, {host.shape[1:]})")
            self._tell(name, part)
        return parts

    def _tell(self, name, part):
        """Log, once for each, in which memory an input arrives: without libcuda.so Triton copies all to the host."""
        where = "host memory" if part.address is None else f"memory of GPU {self.device}"
        if (name, where) not in self.seen:
            self.seen.add((name, where))
            pb_utils.Logger.log_info(f"{name} arrives in {where}")

    def _answer(self, good, answers, last=True):
        """Run in groups that fit the profile (one group if Triton's max_batch_size is right) and fill `answers`.

        Answers of the last run in an execute call are views of our buffers, which Triton copies before the next call;
        answers of earlier runs are copies on the host, because the next run would overwrite them. If all faces of a
        last run were on the GPU, its answers are too.
        """
        while good:
            rows, group = 0, []
            while good and rows + len(next(iter(good[0][2].values()))) <= self.max_batch:
                group.append(good[0])
                rows += len(next(iter(good[0][2].values())))
                good = good[1:]
            requests = [parts for _, _, parts in group]
            final = last and not good
            stays = final and all(part.address is not None for parts in requests for part in parts.values())
            self._run(requests, rows, to_host=not stays)
            start = 0
            for i, request, parts in group:
                mine = slice(start, start + len(next(iter(parts.values()))))
                names = request.requested_output_names()
                device = self.device if stays else None
                tensors = [self.outputs[name].tensor(name, mine, device, final) for name in names]
                answers[i] = pb_utils.InferenceResponse(output_tensors=tensors)
                start = mine.stop

    def _run(self, requests, rows, to_host):
        """Copy in, compute and, if asked, copy out, on one stream; the results are in the output buffers."""
        graph = self.graphs.get(rows)
        for name, buffer in self.inputs.items():
            parts = [parts[name] for parts in requests]
            lone = parts[0].address if len(parts) == 1 and graph is None else None
            if lone is None or lone % ALIGNMENT:
                lone = None
                buffer.gather(parts)
            if graph is None:
                self._set_shape(name, rows)
                self._set_address(name, lone or buffer.device)
        if graph is not None:
            cuda_graphs.launch(self.cuda, self.stream, graph)
        elif not self._enqueue():
            raise RuntimeError("TensorRT could not run the plan; the server's log has its reason")
        if to_host:
            for buffer in self.outputs.values():
                buffer.fetch(rows)
        self.cuda.stream_synchronize(self.stream)

    def _captured(self):
        """CUDA graphs by batch size, over our own buffers; {} if this plan cannot be captured, and the log says why."""
        graphs = {}
        try:
            for rows in sorted({*(batch for batch in GRAPH_BATCHES if batch < self.max_batch), self.max_batch}):
                for name in self.inputs:
                    self._set_shape(name, rows)
                self._enqueue()  # TensorRT requires one run of a shape before its capture
                self.cuda.stream_synchronize(self.stream)
                graphs[rows] = cuda_graphs.capture(self.cuda, self.stream, self._enqueue)
        except Exception as exc:
            cuda_graphs.destroy(self.cuda, graphs.values())
            self.cuda.handle.cudaGetLastError()  # a refused capture leaves its error behind for the next call
            pb_utils.Logger.log_warn(f"no CUDA graphs for this plan: {str(exc).partition(chr(10))[0]}")
            return {}
        return graphs

    def _enqueue(self):
        """Put a run of the plan on the stream; whether TensorRT accepted it."""
        return self.context.execute_async_v3(self.stream)

    def _buffer(self, name):
        """The buffers of a tensor at the largest batch, on the host and on the GPU; the latter is bound here."""
        shape = (self.max_batch, *(int(d) for d in tuple(self.engine.get_tensor_shape(name))[1:]))
        if min(shape) < 0:  # a width that the engine leaves open
            shape = tuple(int(d) for d in self.context.get_tensor_shape(name))
        if min(shape) < 0:
            raise pb_utils.TritonModelException(
                f"the plan leaves the shape of {name} open ({shape}). Next: arcface plan build NAME, from a typed ONNX"
            )
        dtype = np.dtype(NUMPY_DTYPES[self.engine.get_tensor_dtype(name).name])
        buffer = Buffer(shape, dtype, self.cuda, self.stream)
        self._set_address(name, buffer.device)
        return buffer

    def _set_shape(self, name, rows):
        shape = (rows, *self.inputs[name].host.shape[1:])
        if tuple(self.context.get_tensor_shape(name) or ()) != shape and not self.context.set_input_shape(name, shape):
            raise RuntimeError(f"the plan refused {name} of shape {shape}")

    def _set_address(self, name, address):
        if not self.context.set_tensor_address(name, address):
            raise pb_utils.TritonModelException(f"TensorRT accepts no buffer for {name}")


def _asks_for_graphs(config):
    cuda_options = (config.get("optimization") or {}).get("cuda") or {}
    return bool(cuda_options.get("graphs"))


def _error(exc):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"tensorrt: {exc}"))


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
