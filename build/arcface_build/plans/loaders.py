"""Polygraphy loaders that build a plan from a typed ONNX and a spec.

Nothing of TensorRT runs until the loader is called. `trt` is the tensorrt module; its version decides how precision is
specified: from 10 on by strong typing; on 8.6 by builder flags and by pinning layers to the precision in the ONNX.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from arcface_build.plans.typed import TypedOnnx
from arcface_clients.contract import FACE_INPUT, FACE_SHAPE
from arcface_clients.plans.spec import PlanSpec, parse_version

_EXTERNAL_TACTICS = ("CUBLAS", "CUBLAS_LT", "CUDNN")


def engine_loader(
    trt: ModuleType, typed: TypedOnnx, spec: PlanSpec, timing_cache: str | None = None, progress_monitor: Any = None
) -> Callable[[], Any]:
    """An EngineBytesFromNetwork: when called, it parses, builds and returns the plan's bytes."""
    from polygraphy.backend.trt import EngineBytesFromNetwork

    return EngineBytesFromNetwork(
        network_loader(trt, typed), config_loader(trt, typed, spec, timing_cache, progress_monitor), timing_cache
    )


def network_loader(trt: ModuleType, typed: TypedOnnx) -> Callable[[], Any]:
    """A loader that parses the ONNX from its path (external weights are beside it), strongly typed if possible."""
    from polygraphy.backend.trt import NetworkFromOnnxPath, PostprocessNetwork

    if strongly_typed(trt):
        return NetworkFromOnnxPath(str(typed.path), strongly_typed=True)
    network = NetworkFromOnnxPath(str(typed.path))
    if not typed.pins:
        return network
    return PostprocessNetwork(network, lambda network: pin_precisions(trt, network, typed.pins), "PinPrecisions")


def config_loader(
    trt: ModuleType, typed: TypedOnnx, spec: PlanSpec, timing_cache: str | None = None, progress_monitor: Any = None
) -> Callable[..., Any]:
    """A CreateConfig: the profiles, the workspace limit, the options; precision flags only on 8.6."""
    from polygraphy.backend.trt import CreateConfig, Profile

    options = spec.options
    shapes = [[(batch, *FACE_SHAPE) for batch in profile] for profile in spec.profiles]
    arguments: dict[str, Any] = {
        "profiles": [Profile().add(FACE_INPUT, *profile) for profile in shapes],
        "memory_pool_limits": {trt.MemoryPoolType.WORKSPACE: options.workspace_bytes},
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,  # else the inspector cannot prove the precision
        "load_timing_cache": timing_cache,
        "tf32": options.tf32,
        "builder_optimization_level": options.optimization_level,
    }
    if not options.external_tactics:
        members = trt.TacticSource.__members__
        arguments["tactic_sources"] = [source for name, source in members.items() if name not in _EXTERNAL_TACTICS]
    if options.hardware_compatible:
        arguments["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.same_compute_capability:
        arguments["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    if progress_monitor is not None:
        arguments["progress_monitor"] = progress_monitor
    if not strongly_typed(trt):
        arguments["fp16"] = bool(typed.layers.get("fp16") or typed.pins)
        arguments["int8"] = bool(typed.layers.get("int8"))
        arguments["precision_constraints"] = "prefer" if typed.pins else None
    return CreateConfig(**arguments)


def strongly_typed(trt: ModuleType) -> bool:
    """Whether this TensorRT supports strong typing: from 10 on (11 keeps the flag and ignores it)."""
    return parse_version(trt.__version__) >= (10,) and hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def pin_precisions(trt: ModuleType, network: Iterable[Any], pins: Mapping[str, str]) -> None:
    """Make a weakly typed network compute in the precisions of the ONNX.

    The parser names a layer after its ONNX node, with _N if a node becomes several layers, and the last tensor of a
    node after the node's output. Some layers before the named one stay unnamed (ReduceL2: the layer that squares, which
    overflows in fp16): they follow the next named layer if that one is pinned to fp32.
    """
    kinds = {"fp32": trt.float32, "fp16": trt.float16}
    data_only = (trt.LayerType.CONSTANT, trt.LayerType.SHUFFLE, trt.LayerType.SHAPE, trt.LayerType.CAST)
    following = ""
    for layer in reversed(list(network)):
        if not layer.num_outputs or layer.type in data_only or layer.get_output(0).dtype not in kinds.values():
            continue
        names = (layer.name, layer.get_output(0).name, re.sub(r"_\d+$", "", layer.name))
        kind = next((pins[name] for name in names if name in pins), "")
        if layer.name.startswith("(Unnamed Layer*"):
            kind = kind or (following if following == "fp32" and layer.get_output(0).dtype == trt.float32 else "")
        else:
            following = kind
        if kind:
            layer.precision = kinds[kind]
