"""The PyTorch baseline: an exported graph in, faces/s of eager PyTorch by precision and batch out. Run by any Python.

    python torch_baseline.py FOLDER BATCHES SECONDS [DEVICE]

FOLDER holds graph.json and weights.npz as `export_graph` writes them, faces.npy and reference.npy. This file imports
nothing but numpy and torch, because the Python that has torch on a GPU host is seldom the one that has TensorRT. The
network is walked node by node with torch.nn.functional, which is what a converted module does when it is called.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def main(folder, batches, seconds, device="cuda"):
    """Print one JSON object: versions, and per precision the cosine to the reference and the measured batches."""
    faces, reference = np.load(folder / "faces.npy"), np.load(folder / "reference.npy")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    result = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": device}
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        embed = eager_network(folder, dtype, device)
        got = np.concatenate([embed(faces[i : i + 16]) for i in range(0, len(faces), 16)])
        cosine = (got * reference).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(reference, axis=1)
        rows = [_measure(embed, faces, batch, seconds) for batch in batches]
        result[name] = {"min_cosine": float(cosine.min()), "batches": rows}
    print(json.dumps(result))


def eager_network(folder, dtype, device):
    """What FOLDER holds as a callable: uint8 (N,112,112,3) on the host to float32 (N,D) on the host.

    Raises NotImplementedError with the names of operators that are not in OPS.
    """
    graph = json.loads((folder / "graph.json").read_text())
    unknown = sorted({node["op"] for node in graph["nodes"]} - set(OPS))
    if unknown:
        raise NotImplementedError(f"no eager form of {', '.join(unknown)}")
    with np.load(folder / "weights.npz") as arrays:
        weights = {key: _weight(arrays[key], dtype, device) for key in arrays.files}
    needed = {graph["output"]}
    for node in reversed(graph["nodes"]):  # a tensor that nobody needs any more gives its memory to the next one
        node["frees"] = sorted(set(node["inputs"]) - needed - set(weights))
        needed.update(node["inputs"])
    return partial(_run, graph, weights, dtype, device)


def _weight(array, dtype, device):
    tensor = torch.from_numpy(array).to(device)
    tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _measure(call, faces, batch, seconds):
    part = np.resize(faces, (batch, *faces.shape[1:]))
    for _ in range(5):
        call(part)
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 10:
        start = time.perf_counter()
        call(part)
        times.append(time.perf_counter() - start)
    median = sorted(times)[len(times) // 2]
    return {"batch": batch, "faces_per_s": batch / median, "median_ms": median * 1e3, "samples": len(times)}


@torch.inference_mode()
def _run(graph, weights, dtype, device, faces):
    """uint8 faces on the host to float32 embeddings on the host: the same work as a plan's call."""
    values = dict(weights)
    values[graph["input"]] = torch.from_numpy(faces).to(device)
    for node in graph["nodes"]:
        inputs = [values.get(name) for name in node["inputs"]]
        values[node["output"]] = OPS[node["op"]](node["attributes"], dtype, *inputs)
        del inputs
        for name in node["frees"]:
            values.pop(name, None)
    return values[graph["output"]].float().cpu().numpy()


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


def _transpose(a, dtype, x):
    y = x.permute(a["perm"])
    return y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y


def _reduce_l2(a, dtype, x, axes=None):
    axes = a.get("axes") or [int(i) for i in axes]
    return torch.linalg.vector_norm(x.float(), dim=axes, keepdim=bool(a.get("keepdims", 1)))


OPS = {
    "Cast": lambda a, dtype, x: x.to({1: dtype, 10: dtype}.get(a["to"], torch.int64)),
    "Transpose": _transpose,
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
    main(Path(sys.argv[1]), [int(b) for b in sys.argv[2].split(",")], float(sys.argv[3]), *sys.argv[4:])
