"""Times a plan alone: faces and embeddings stay on the GPU, each run is a CUDA graph, and CUDA events time the replays.

A client's latency also includes copies and Python; `served.measure` is for that. This code follows the documented calls
of CUDA and TensorRT, and has run only on a stand-in, never on a GPU.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np

from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_BYTES, FACE_INPUT, FACE_SHAPE
from arcface_clients.errors import InferenceFailed

INPUTS = 4  # used in turn, so that no input stays in the GPU's cache from one run to the next
MOST_REPLAYS = 2000
PROFILED_RUNS = 20
NOT_ASKED_FOR = "not asked for"
_LARGEST_ELEMENT = 8  # bytes; outputs are a few kilobytes, so their buffers may be too large
_CAPTURE_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: what other threads do is not our business


class PlanTimer:
    """A plan loaded for timing; a context manager."""

    def __init__(self, plan: bytes, fewest_replays: int = 200, warm_up_s: float = 0.5) -> None:
        """Deserialise the plan.

        Args:
            plan: its bytes.
            fewest_replays: of one measurement.
            warm_up_s: before each one; idle clocks are a fifth of busy ones.

        Raises:
            InferenceFailed: TensorRT refuses it.
        """
        import tensorrt as trt
        from polygraphy import cuda

        self._fewest_replays, self._warm_up_s = fewest_replays, warm_up_s
        self._cuda, self._trt = cuda.wrapper(), trt
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise InferenceFailed("TensorRT cannot deserialise the plan: it is of another version or SM.")
        self._outputs = [
            name
            for name in (self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors))
            if name != FACE_INPUT
        ]
        self._stream = self._cuda.create_stream()
        self._buffers: list[int] = []

    def __enter__(self) -> PlanTimer:
        """The timer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the GPU memory."""
        self._free()
        self._cuda.destroy_stream(self._stream)
        del self._engine, self._runtime

    def time(
        self, faces_bgr_u8: np.ndarray, batch: int, seconds: float, graph: bool = True
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Time the replays of a batch; the row of the report, and the embeddings of the first `batch` faces.

        Args:
            faces_bgr_u8: uint8 (N,112,112,3), repeated if there are too few.
            batch: within the plan's profile.
            seconds: how long to replay, within the fewest and 2,000 replays.
            graph: False times plain launches.

        Returns:
            median_ms, p10_ms, p90_ms, faces_per_s, replays and graph (false, with why, if capture was refused);
            embeddings float32 (batch,D), produced by the timed runs themselves.
        """
        with self._context(batch) as context:
            return self._time(context, faces_bgr_u8, batch, seconds, graph)

    def embed(self, faces_bgr_u8: np.ndarray, batch: int) -> np.ndarray:
        """Embeddings of all faces, `batch` at a time: float32 (N,D)."""
        parts = []
        with self._context(batch) as context:
            for start in range(0, len(faces_bgr_u8), batch):
                part = faces_bgr_u8[start : start + batch]
                enqueue, inputs, address, shape = self._bind(context, part, 1)
                enqueue(inputs[0])
                self._synchronize()
                parts.append(self._download(address, shape))
                self._free()
        return np.concatenate(parts)

    def layers(self, faces_bgr_u8: np.ndarray, batch: int) -> list[tuple[str, float]]:
        """Milliseconds of each layer of one run, the mean of 20, in the plan's order; without a graph."""
        profiler: Any = self._trt.IProfiler

        class LayerTimes(profiler):
            def __init__(self) -> None:
                profiler.__init__(self)
                self.ms: dict[str, float] = {}

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                self.ms[layer_name] = self.ms.get(layer_name, 0.0) + ms

        with self._context(batch) as context:
            enqueue, inputs, _, _ = self._bind(context, np.resize(faces_bgr_u8, (batch, *FACE_SHAPE)), 1)
            self._warm_up([lambda: enqueue(inputs[0])])
            times = LayerTimes()
            context.profiler = times
            for _ in range(PROFILED_RUNS):
                enqueue(inputs[0])  # with a profiler each run waits for its end
                self._synchronize()
        return [(name, ms / PROFILED_RUNS) for name, ms in times.ms.items()]

    @contextmanager
    def _context(self, batch: int) -> Iterator[Any]:
        """An execution context on the profile whose kernels are tuned nearest to this batch, as Triton chooses."""
        context = self._engine.create_execution_context()
        if context is None:
            raise InferenceFailed("no execution context: the GPU is out of memory.")
        try:
            profiles = [
                [int(shape[0]) for shape in self._engine.get_tensor_profile_shape(FACE_INPUT, index)]
                for index in range(self._engine.num_optimization_profiles)
            ]
            fitting = [i for i, (low, _, high) in enumerate(profiles) if low <= batch <= high]
            if not fitting:
                raise InferenceFailed(f"batch {batch} is outside the plan's profiles {profiles}.")
            chosen = min(fitting, key=lambda i: abs(profiles[i][1] - batch))
            if not context.set_optimization_profile_async(chosen, self._stream):
                raise InferenceFailed(f"TensorRT refused profile {chosen} of {profiles}.")
            self._synchronize()
            yield context
        finally:
            self._free()

    def _bind(
        self, context: Any, part: np.ndarray, inputs: int
    ) -> tuple[Callable[[int], None], list[int], int, tuple[int, ...]]:
        """Memory for a batch: what runs it from an input's address, the inputs, the embedding's address and shape."""
        batch = len(part)
        if not context.set_input_shape(FACE_INPUT, part.shape):
            raise InferenceFailed(f"batch {batch} is outside the plan's profile.")
        shapes = {name: tuple(int(d) for d in context.get_tensor_shape(name)) for name in self._outputs}
        addresses = {name: self._malloc(int(np.prod(shape)) * _LARGEST_ELEMENT) for name, shape in shapes.items()}
        for name, address in addresses.items():
            context.set_tensor_address(name, address)
        uploaded = [self._upload(np.roll(part, -i, axis=0)) for i in range(inputs)]

        def enqueue(address: int) -> None:
            context.set_tensor_address(FACE_INPUT, address)
            if not context.execute_async_v3(self._stream):
                raise InferenceFailed(f"TensorRT refused a run of batch {batch}; its log says why.")

        return enqueue, uploaded, addresses[EMBEDDING_OUTPUT], shapes[EMBEDDING_OUTPUT]

    def _time(
        self, context: Any, faces_bgr_u8: np.ndarray, batch: int, seconds: float, graph: bool
    ) -> tuple[dict[str, Any], np.ndarray]:
        part = np.resize(faces_bgr_u8, (batch, *FACE_SHAPE))
        enqueue, inputs, address, shape = self._bind(context, part, INPUTS)
        enqueue(inputs[0])  # TensorRT requires one run of a shape before its capture
        self._synchronize()
        graphs, why_not = self._capture_all(enqueue, inputs) if graph else ([], NOT_ASKED_FOR)
        try:
            runs = [lambda g=g: self._call("cudaGraphLaunch", g, self._stream_p) for g in graphs] or [
                lambda a=a: enqueue(a) for a in inputs
            ]
            times = self._replay(runs, seconds)
            runs[0]()
            self._synchronize()
            embeddings = self._download(address, shape)
        finally:
            for captured in graphs:
                self._call("cudaGraphExecDestroy", captured)
        median = statistics.median(times)
        low, high = np.percentile(times, [10, 90])
        row = {
            "batch": batch,
            "median_ms": median,
            "p10_ms": float(low),
            "p90_ms": float(high),
            "faces_per_s": batch / median * 1e3,
            "replays": len(times),
            "graph": bool(graphs),
        }
        return (row if graphs else row | {"why_no_graph": why_not}), embeddings

    def _capture_all(self, enqueue: Any, inputs: list[int]) -> tuple[list[ctypes.c_void_p], str]:
        """A graph for each input; none, and why, if capture is refused: plain launches are timed then."""
        graphs: list[ctypes.c_void_p] = []
        try:
            for address in inputs:
                graphs.append(self._capture(lambda address=address: enqueue(address)))
        except Exception as exc:  # Polygraphy's own class for a status, ours for TensorRT's refusal
            for graph in graphs:
                self._call("cudaGraphExecDestroy", graph)
            self._cuda.handle.cudaGetLastError()  # a refused capture leaves its error behind for the next call
            return [], str(exc).partition("\n")[0]
        return graphs, ""

    def _capture(self, enqueue: Any) -> ctypes.c_void_p:
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamBeginCapture", self._stream_p, ctypes.c_int(_CAPTURE_THREAD_LOCAL))
        try:
            enqueue()
        finally:  # the stream is unusable while it captures
            status = self._cuda.handle.cudaStreamEndCapture(self._stream_p, ctypes.byref(graph))
        self._cuda.check(status)
        # Its plain form has other arguments in CUDA 11 than in 12; this one is the same since 11.4.
        self._call("cudaGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        self._call("cudaGraphDestroy", graph)
        return executable

    def _replay(self, runs: list[Any], seconds: float) -> list[float]:
        """Milliseconds of each run after the warm-up, between CUDA events; the host waits only at the end."""
        each_s = self._warm_up(runs)
        replays = int(min(max(seconds / each_s, self._fewest_replays), MOST_REPLAYS))
        events = [ctypes.c_void_p() for _ in range(replays + 1)]
        for event in events:
            self._call("cudaEventCreate", ctypes.byref(event))
        try:
            self._call("cudaEventRecord", events[0], self._stream_p)
            for i in range(replays):
                runs[i % len(runs)]()
                self._call("cudaEventRecord", events[i + 1], self._stream_p)
            self._synchronize()
            return [self._between_ms(a, b) for a, b in itertools.pairwise(events)]
        finally:
            for event in events:
                self._call("cudaEventDestroy", event)

    def _warm_up(self, runs: list[Any]) -> float:
        """Run until the clocks are up; the seconds of one run."""
        started, warmed = time.perf_counter(), 0
        while time.perf_counter() - started < self._warm_up_s or warmed < len(runs):
            runs[warmed % len(runs)]()
            self._synchronize()
            warmed += 1
        return (time.perf_counter() - started) / warmed

    def _between_ms(self, first: ctypes.c_void_p, second: ctypes.c_void_p) -> float:
        elapsed_ms = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(elapsed_ms), first, second)
        return float(elapsed_ms.value)

    @property
    def _stream_p(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._stream)

    def _call(self, name: str, *arguments: Any) -> None:
        self._cuda.check(getattr(self._cuda.handle, name)(*arguments))

    def _synchronize(self) -> None:
        self._cuda.stream_synchronize(self._stream)

    def _malloc(self, size: int) -> int:
        address = int(self._cuda.malloc(size))
        self._buffers.append(address)
        return address

    def _upload(self, faces_bgr_u8: np.ndarray) -> int:
        from polygraphy.cuda import MemcpyKind

        content = np.ascontiguousarray(faces_bgr_u8)
        address = self._malloc(len(content) * FACE_BYTES)
        self._cuda.memcpy(address, content.ctypes.data, content.nbytes, MemcpyKind.HostToDevice)
        return address

    def _download(self, address: int, shape: tuple[int, ...]) -> np.ndarray:
        from polygraphy.cuda import MemcpyKind

        content = np.empty(shape, np.float32)
        self._cuda.memcpy(content.ctypes.data, address, content.nbytes, MemcpyKind.DeviceToHost)
        return content

    def _free(self) -> None:
        for address in self._buffers:
            self._cuda.free(address)
        self._buffers = []
