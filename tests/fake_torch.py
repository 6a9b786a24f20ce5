"""Stands for torch with CUDA where it is not installed: what our scripts for a GPU host's torch call, in numpy.

A rehearsal of gpu-check puts it on the path of "the other Python" as `torch`. It has only names that torch has, and
computes the same values, so that a baseline in it has the drift that it would have in torch.
"""

from __future__ import annotations

import sys
import time
import types

import numpy as np

__version__ = "0.0-stand-in"
float16, float32, int64, uint8 = np.float16, np.float32, np.int64, np.uint8
channels_last, contiguous_format = "channels_last", "contiguous_format"
version = types.SimpleNamespace(cuda="12.4")
backends = types.SimpleNamespace(
    cudnn=types.SimpleNamespace(benchmark=False, allow_tf32=True),
    cuda=types.SimpleNamespace(matmul=types.SimpleNamespace(allow_tf32=False)),
)


class Tensor(np.ndarray):
    def to(self, where: object) -> Tensor:
        return self if isinstance(where, str) else self.astype(where)

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.size

    def is_floating_point(self) -> bool:
        return np.issubdtype(self.dtype, np.floating)

    def contiguous(self, memory_format: str = contiguous_format) -> Tensor:
        return np.ascontiguousarray(self).view(Tensor)

    def permute(self, axes: list[int]) -> Tensor:
        return self.transpose(axes)

    def index_select(self, axis: int, index: Tensor) -> Tensor:
        return np.take(self, index, axis).view(Tensor)

    def t(self) -> Tensor:
        return self.T

    def flatten(self, start: int = 0) -> Tensor:
        return self.reshape(*self.shape[:start], -1)

    def mean(self, axes: tuple[int, ...], keepdim: bool = False) -> Tensor:
        return np.mean(np.asarray(self, np.float32), axes, keepdims=keepdim).astype(self.dtype).view(Tensor)

    def float(self) -> Tensor:
        return self.astype(np.float32)

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray:
        return np.asarray(self)

    def copy_(self, other: Tensor, non_blocking: bool = False) -> Tensor:
        self[...] = other
        return self


def from_numpy(array: np.ndarray) -> Tensor:
    return array.view(Tensor)


def randn(*shape: int, device: str, dtype: type) -> Tensor:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype).view(Tensor)


def empty(count: int, dtype: type, device: str = "cpu", pin_memory: bool = False) -> Tensor:
    return np.empty(count, dtype).view(Tensor)


def empty_like(other: Tensor) -> Tensor:
    return np.empty_like(other)


def mm(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return np.where(condition, a, b).view(Tensor)


def clamp(x: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    return np.clip(x, low, high)


def maximum(a: Tensor, b: Tensor) -> Tensor:
    return np.maximum(a, b)


def compile(function: object) -> object:
    return function


def inference_mode() -> object:
    return lambda function: function


linalg = types.SimpleNamespace(
    vector_norm=lambda x, dim, keepdim: np.sqrt(np.square(x).sum(tuple(dim), keepdims=keepdim)).view(Tensor)
)


def _pad(x: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
    left, right, top, bottom = pads
    return np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right))).view(Tensor)


def _conv2d(x, w, b=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    (sy, sx), (py, px) = stride if isinstance(stride, list) else (stride, stride), padding
    if groups != 1 or list(np.ravel(dilation)) not in ([1], [1, 1]):
        raise NotImplementedError("the stand-in has neither groups nor dilation")
    padded = np.pad(np.asarray(x, np.float32), ((0, 0), (0, 0), (py, py), (px, px)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2:], (2, 3))[:, :, ::sy, ::sx]
    y = np.einsum("nchwij,ocij->nohw", windows, np.asarray(w, np.float32), optimize=True)
    return (y if b is None else y + np.asarray(b, np.float32)[:, None, None]).astype(x.dtype).view(Tensor)


def _batch_norm(x, mean, var, scale, shift, training, momentum, epsilon) -> Tensor:
    along = (1, -1, *[1] * (x.ndim - 2))
    mean, var, scale, shift = (np.asarray(v, np.float32).reshape(along) for v in (mean, var, scale, shift))
    return ((np.asarray(x, np.float32) - mean) / np.sqrt(var + epsilon) * scale + shift).astype(x.dtype).view(Tensor)


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return np.where(x >= 0, x, x * slope.reshape(1, -1, *[1] * (x.ndim - 2))).view(Tensor)


class _Event:
    def __init__(self, enable_timing: bool) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        return (other.time - self.time) * 1e3


cuda = types.SimpleNamespace(
    is_available=lambda: True,
    synchronize=lambda: None,
    Event=_Event,
    get_device_properties=lambda device: types.SimpleNamespace(name="NVIDIA Stand-in", multi_processor_count=1),
)
nn = types.ModuleType("torch.nn")
nn.functional = types.ModuleType("torch.nn.functional")
nn.functional.pad, nn.functional.conv2d, nn.functional.batch_norm = _pad, _conv2d, _batch_norm
nn.functional.prelu, nn.functional.relu = _prelu, lambda x: np.maximum(x, 0)
sys.modules |= {"torch.nn": nn, "torch.nn.functional": nn.functional}
