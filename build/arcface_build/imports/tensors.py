"""Reads the tensors of a checkpoint (.safetensors, .pth) without running any code in it.

A .pth is a zip with a pickle, and a pickle is a program. This reader resolves only the few names that a dictionary of
tensors needs, so no code from the file is ever called; torch is not needed.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from arcface_build.errors import SourceRefused
from arcface_clients.arrays import Array

CHECKPOINTS = (".pth", ".pt", ".ckpt", ".safetensors")
BFLOAT16 = "bfloat16"  # numpy lacks it: the upper half of a float32
STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": BFLOAT16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
}
SAFETENSORS = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "BF16": BFLOAT16, "I64": "<i8", "I32": "<i4"}
LARGEST_HEADER = 100_000_000
# Keys under which training scripts store the weights, arcface_torch's first.
HOLDERS = ("state_dict_backbone", "state_dict", "model", "model_state_dict", "backbone", "net")


def read_tensors(path: Path) -> dict[str, Array]:
    """Name → array of a checkpoint; floats as float32. Wrappers such as {"state_dict": …} and `module.` are removed.

    Raises:
        SourceRefused: another format, damaged, or it refers to code.
    """
    try:
        found = _safetensors(path) if path.suffix == ".safetensors" else _pth(path)
    except (ValueError, KeyError, TypeError, IndexError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as exc:
        if isinstance(exc, SourceRefused):
            raise
        raise SourceRefused(
            f"{path.name} cannot be read as a checkpoint: {exc}. Export it to ONNX: torch.onnx.export"
        ) from exc
    for prefix in ("module.", "backbone.", "_orig_mod."):
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _safetensors(path: Path) -> dict[str, Array]:
    """https://github.com/huggingface/safetensors#format: length, JSON header, bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= LARGEST_HEADER:
            raise ValueError(f"its header would be {length:,} bytes")
        header = json.loads(file.read(length))
        data = file.read()
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= len(data):
            raise ValueError(f"{name} lies outside the file")
        found[name] = _numbers(data[begin:end], SAFETENSORS[entry["dtype"]]).reshape(entry["shape"])
    return found


def _numbers(data: bytes, dtype: str) -> Array:
    """Flat array; floats as float32."""
    if dtype == BFLOAT16:
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    value = np.frombuffer(data, dtype)
    return value.astype(np.float32) if value.dtype.kind == "f" else value


def _pth(path: Path) -> dict[str, Array]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not a zip, so torch before 1.6 wrote it; load and save it with a newer torch")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it contains no data.pkl, so torch.save did not write it")
        root = pickles[0].removesuffix("data.pkl")
        if any(name.startswith(f"{root}code/") for name in names):
            raise ValueError("it is a TorchScript module")
        with archive.open(pickles[0]) as file:
            content = _Reader(file, archive, root).load()
    for holder in HOLDERS:
        if isinstance(content, dict) and isinstance(content.get(holder), dict):
            content = content[holder]
            break
    if not isinstance(content, dict):
        raise ValueError(f"it contains {type(content).__name__}, not a state_dict")
    return {str(name): value for name, value in content.items() if isinstance(value, np.ndarray)}


@dataclass(frozen=True)
class _Storage:
    """Replaces a class torch.XStorage of the pickle."""

    dtype: str


class _Reader(pickle.Unpickler):
    """Unpickles dictionaries of tensors; every other name is refused, so no code from the file runs."""

    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in STORAGES:
            return _Storage(STORAGES[name])
        raise SourceRefused(
            f"the checkpoint refers to {module}.{name}, which would run code: expected only tensors. "
            "Save the weights alone: torch.save(model.state_dict(), PATH)"
        )

    def persistent_load(self, pid: Any) -> Array:
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Storage):
            raise ValueError(f"it refers to {kind!r}")
        value = _numbers(self._archive.read(f"{self._root}data/{key}"), storage.dtype)
        if value.size < count:
            raise ValueError(f"storage {key} contains {value.size:,} of {count:,} numbers")
        return value


def _rebuild_tensor(storage: Array, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Array:
    """Copy a view of a storage, which must lie inside it."""
    if min([offset, *size, *stride], default=0) < 0 or len(size) != len(stride):
        raise ValueError("a tensor has negative sizes")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if prod(size) and last >= storage.size:
        raise ValueError("a tensor lies outside its storage")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()


def _rebuild_parameter(data: Array, *_: Any) -> Array:
    return data
