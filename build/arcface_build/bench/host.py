"""The host of a measurement as JSON: hardware, versions, governor and load."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from arcface_clients.engines.runtimes import TELLING_FLAGS
from arcface_clients.errors import DependencyMissing
from arcface_clients.gpu.cards import find_gpus

_PACKAGES = (
    "arcface-triton",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "openvino",
    "insightface",
    "tritonclient",
    "nvidia-pytriton",
    "tensorrt",
    "torch",
)


def describe_host() -> dict[str, Any]:
    """Processor, cores, memory, GPU, kernel, package versions, frequency governor and the load of the last minute."""
    cpuinfo = _text("/proc/cpuinfo")
    flags = set(_field(cpuinfo, "flags").split())
    return {
        "cpu": _field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_flags": [flag for flag in TELLING_FLAGS if flag in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _gpus(),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or "not visible",
        "load_1min": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES if _installed(name)},
    }


def _gpus() -> list[dict[str, Any]]:
    """The GPUs that this process may use, with the fields of `arcface_clients.gpu.cards.Gpu`."""
    try:
        return [asdict(gpu) for gpu in find_gpus()]
    except DependencyMissing:
        return []


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _field(cpuinfo: str, name: str) -> str:
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")
