"""The PyTorch baseline, for any Python that has torch: the speed of an exported graph in several modes.

    python torch_baseline.py FOLDER BATCHES SECONDS [DEVICE [WARM_UP_S]]

FOLDER contains graph.json and weights.npz as written by `export_graph`, faces.npy and reference.npy. This file imports
only numpy and torch, because on a GPU host the Python with torch is seldom the one with TensorRT. The network is
executed node by node with torch.nn.functional, just as a converted module would when called.

It prints one JSON object per line, as soon as it is known: the versions, then one for each mode, whose rows say when
they were measured (`between`, seconds of time.monotonic), so that a caller can tell the GPU's clocks then. A baseline
is the best of its kind, so every kind is run in both memory layouts.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

WARM_UP_S = 0.5  # idle clocks are a fifth of busy ones
# (kind, dtype, TF32 allowed, channels last, compiled); PyTorch's default for float32 is TF32 in convolutions only.
WAYS = [
    ("fp32", torch.float32, False, False, False),
    ("fp32", torch.float32, False, True, False),
    ("tf32", torch.float32, True, False, False),
    ("tf32", torch.float32, True, True, False),
    ("fp16", torch.float16, True, False, False),
    ("fp16", torch.float16, True, True, False),
    ("tf32", torch.float32, True, True, True),  # last, because compiling takes a minute
    ("fp16", torch.float16, True, True, True),
]


def main(folder, batches, seconds, device="cuda", warm_up_s=WARM_UP_S):
    """Print one line per measurement; a mode that fails gives a line with its error."""
    faces, reference = np.load(folder / "faces.npy"), np.load(folder / "reference.npy")
    torch.backends.cudnn.benchmark = True
    _tell({"torch": torch.__version__, "cuda": torch.version.cuda, "device": device, "python": sys.executable})
    for kind, dtype, tf32, channels_last, compiled in WAYS:
        if device != "cuda" and (tf32 or compiled):
            continue  # the CPU is only for tests: it has no TF32, and fp16 takes forever
        way = {"kind": kind, "layout": "NHWC" if channels_last else "NCHW", "compiled": compiled}
        try:
            _allow_tf32(tf32)
            forward = device_network(folder, dtype, device, channels_last)
            if compiled:
                eager = forward
                forward = torch.compile(lambda faces, eager=eager: eager(faces))
            embed = partial(_from_host, forward, device)
            got = np.concatenate([embed(faces[i : i + 16]) for i in range(0, len(faces) // 16 * 16 or len(faces), 16)])
            expected = reference[: len(got)]
            cosine = (got * expected).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
            rows = [_measure(embed, forward, faces, batch, seconds, device, warm_up_s) for batch in batches]
            _tell({**way, "min_cosine": float(cosine.min()), "batches": rows})
        except NotImplementedError:
            raise
        except Exception as exc:  # the other modes are still worth measuring
            _tell({**way, "error": f"{type(exc).__name__}: {exc}"[:400]})


def eager_network(folder, dtype, device, channels_last=True):
    """The network in FOLDER as a callable: uint8 (N,112,112,3) on the host to float32 (N,D) on the host.

    Raises NotImplementedError with the names of operators that are not in OPS.
    """
    return partial(_from_host, device_network(folder, dtype, device, channels_last), device)


def device_network(folder, dtype, device, channels_last=True):
    """The same, from a tensor on the device to a tensor on the device."""
    graph = json.loads((folder / "graph.json").read_text())
    unknown = sorted({node["op"] for node in graph["nodes"]} - set(OPS))
    if unknown:
        raise NotImplementedError(f"no eager form of {', '.join(unknown)}")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with np.load(folder / "weights.npz") as arrays:
        weights = {key: _weight(arrays[key], dtype, device, layout) for key in arrays.files}
    needed = {graph["output"]}
    for node in reversed(graph["nodes"]):  # free a tensor after its last use, so that the next can reuse its memory
        node["frees"] = sorted(set(node["inputs"]) - needed - set(weights))
        needed.update(node["inputs"])
    return partial(_run, graph, weights, dtype, layout)


def _tell(facts):
    print(json.dumps(facts), flush=True)


def _allow_tf32(allowed):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def _weight(array, dtype, device, layout):
    tensor = torch.from_numpy(array).to(device)
    tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor


def _measure(embed, forward, faces, batch, seconds, device, warm_up_s):
    """Median of calls from host to host and, on a GPU, of the network alone with all data there."""
    part = np.resize(faces, (batch, *faces.shape[1:]))
    started = time.monotonic()
    _repeat(lambda i: embed(part), warm_up_s if device == "cuda" else 0)
    times = _repeat(lambda i: embed(part), seconds)
    median = sorted(times)[len(times) // 2]
    row = {"batch": batch, "faces_per_s": batch / median, "median_ms": median * 1e3, "samples": len(times)}
    if device == "cuda":
        there = [torch.from_numpy(np.roll(part, i, axis=0).copy()).to(device) for i in range(4)]
        row["device_ms"] = _events_ms(lambda i: forward(there[i % 4]), seconds, warm_up_s)
    row["between"] = [started, time.monotonic()]
    return row


def _repeat(call, seconds):
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - start)
    return times


def _events_ms(call, seconds, warm_up_s):
    """Median milliseconds between CUDA events around 10 to 200 calls, about twice `seconds` of them."""
    alone = _repeat(lambda i: (call(i), torch.cuda.synchronize()), warm_up_s)
    # Calls only queue work, so that their number has to follow from how long one takes, not from the host's clock.
    count = int(min(max(2 * seconds / sorted(alone)[len(alone) // 2], 10), 200))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for i, mark in enumerate(marks[1:]):
        call(i)
        mark.record()
    torch.cuda.synchronize()
    between = sorted(marks[i].elapsed_time(marks[i + 1]) for i in range(count))
    return between[count // 2]


def _from_host(forward, device, faces):
    return forward(torch.from_numpy(faces).to(device)).cpu().numpy()


@torch.inference_mode()
def _run(graph, weights, dtype, layout, faces):
    """uint8 faces to float32 embeddings, both on the device."""
    values = dict(weights)
    values[graph["input"]] = faces
    for node in graph["nodes"]:
        inputs = [values.get(name) for name in node["inputs"]]
        value = OPS[node["op"]](node["attributes"], dtype, *inputs)
        if node["op"] == "Transpose" and value.dim() == 4:
            value = value.contiguous(memory_format=layout)
        values[node["output"]] = value
        del inputs
        for name in node["frees"]:
            values.pop(name, None)
    return values[graph["output"]].float()


def _conv(a, dtype, x, w, b=None):
    pads = a.get("pads", [0, 0, 0, 0])
    if pads[:2] != pads[2:]:
        x, pads = F.pad(x, (pads[1], pads[3], pads[0], pads[2])), [0, 0]
    return F.conv2d(x, w, b, a.get("strides", 1), pads[:2], a.get("dilations", 1), a.get("group", 1))


def _gemm(a, dtype, x, w, b=None):
    x, w = (x.t() if a.get("transA") else x), (w.t() if a.get("transB") else w)
    y = (x @ w) * a.get("alpha", 1.0)
    return y if b is None else y + b * a.get("beta", 1.0)


def _prelu(a, dtype, x, slope):
    if x.dim() == 4 and slope.dim() >= 3 and slope.numel() == slope.shape[-3]:
        return F.prelu(x, slope.flatten())
    return torch.where(x >= 0, x, x * slope)


def _reduce_l2(a, dtype, x, axes=None):
    axes = a.get("axes") or [int(i) for i in axes]
    return torch.linalg.vector_norm(x.float(), dim=axes, keepdim=bool(a.get("keepdims", 1)))


OPS = {
    "Cast": lambda a, dtype, x: x.to({1: dtype, 10: dtype}.get(a["to"], torch.int64)),
    "Transpose": lambda a, dtype, x: x.permute(a["perm"]),
    "Gather": lambda a, dtype, x, i: x.index_select(a.get("axis", 0), i),
    "Sub": lambda a, dtype, x, y: x - y,
    "Add": lambda a, dtype, x, y: x + y,
    "Mul": lambda a, dtype, x, y: x * y,
    "Div": lambda a, dtype, x, y: x / y,
    "Max": lambda a, dtype, x, y: torch.maximum(x, y.to(x.dtype)),
    "Relu": lambda a, dtype, x: F.relu(x),
    "Clip": lambda a, dtype, x, low=None, high=None: torch.clamp(x, low, high),
    "PRelu": _prelu,
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": lambda a, dtype, x, y: x @ y,
    "BatchNormalization": lambda a, dtype, x, s, b, m, v: F.batch_norm(x, m, v, s, b, False, 0, a.get("epsilon", 1e-5)),
    "GlobalAveragePool": lambda a, dtype, x: x.mean((2, 3), keepdim=True),
    "Flatten": lambda a, dtype, x: x.flatten(a.get("axis", 1)),
    "Reshape": lambda a, dtype, x, shape: x.reshape(
        [x.shape[0] if i == 0 and s == 0 else int(s) for i, s in enumerate(shape)]
    ),
    "ReduceL2": _reduce_l2,
}

if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        [int(b) for b in sys.argv[2].split(",")],
        float(sys.argv[3]),
        *sys.argv[4:5],
        *map(float, sys.argv[5:]),
    )
