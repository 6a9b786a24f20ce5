"""Maps a device name to the ONNX Runtime providers to try, in order of preference."""

from __future__ import annotations

import re
from collections.abc import Sequence

from arcface_clients.errors import ConfigError, DependencyMissing

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
COREML = "CoreMLExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
# `auto` never picks the TensorRT provider: on its first run it builds an engine, which takes minutes.
_AUTO = (CUDA, COREML, OPENVINO, CPU)
_PROVIDERS = {
    "auto": _AUTO,
    "gpu": (CUDA, COREML),
    "cuda": (CUDA,),
    "tensorrt": (TENSORRT,),
    "coreml": (COREML,),
    "openvino": (OPENVINO,),
    "cpu": (CPU,),
}
_ALIASES = {"mps": "coreml", "trt": "tensorrt"}
_PACKAGES = {
    CUDA: "onnxruntime-gpu",
    TENSORRT: "onnxruntime-gpu",
    COREML: "onnxruntime (macOS)",
    OPENVINO: "onnxruntime-openvino",
    CPU: "onnxruntime",
}


def canonical_device(device: str) -> str:
    """`device` in lower case with aliases resolved; "cuda:1" keeps its index.

    Raises:
        ConfigError: not a device; the message lists the valid ones.
    """
    text = str(device).lower()
    text = _ALIASES.get(text, text)
    base = text.split(":")[0]
    if base not in _PROVIDERS or (text != base and not re.fullmatch(r"(cuda|tensorrt):\d+", text)):
        raise ConfigError(f"unknown device {device!r}: expected one of {', '.join(_PROVIDERS)}, or cuda:1.")
    return text


def device_index(device: str) -> int:
    """GPU number: 1 for "cuda:1", 0 if none is given."""
    return int(device.partition(":")[2] or 0)


def wheels_with(provider: str) -> str:
    """The ONNX Runtime wheel that includes a provider."""
    return _PACKAGES.get(provider, "no wheel known to us")


def order_of_providers(device: str, available: Sequence[str], needs: str | None = None) -> list[str]:
    """The providers to try in turn until one starts.

    Args:
        device: as returned by `canonical_device`.
        available: as returned by `onnxruntime.get_available_providers()`.
        needs: the only provider that can run the request (bf16 needs OpenVINO), or None.

    Raises:
        DependencyMissing: none of the device's providers is in this ONNX Runtime; falls back.
    """
    wanted = _PROVIDERS[device.split(":")[0]]
    if needs is not None:
        wanted = tuple(name for name in wanted if name == needs) or ((needs,) if device == "cpu" else ())
    there = [name for name in wanted if name in available]
    if there:
        return there
    wheels = sorted({wheels_with(name) for name in wanted or (needs or CPU,)})
    raise DependencyMissing(
        f"this ONNX Runtime cannot run on device {device!r}: expected one of {', '.join(wanted or (needs or CPU,))}, "
        f"got {', '.join(available)}. Install exactly one of its wheels: pip install {' or '.join(wheels)}"
    )
