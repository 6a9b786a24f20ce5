"""Finds the plan for this GPU, and checks it before TensorRT sees it; says what is wrong and what to do next."""

import ctypes
import hashlib
import json

import triton_python_backend_utils as pb_utils

try:
    import tensorrt as trt
    from polygraphy import cuda

    NOT_INSTALLED = ""
except (ImportError, OSError) as exc:
    NOT_INSTALLED = str(exc)

COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # cudaDeviceAttr


def use_device(device):
    """Make a GPU current in this process, and return its number; an error if it does not exist."""
    if NOT_INSTALLED:
        raise pb_utils.TritonModelException(
            f"TensorRT is not installed for this server ({NOT_INSTALLED}). Next: serve with ONNX Runtime "
            "(--model-config-name onnx), or pip install tensorrt polygraphy nvidia-cuda-runtime-cu12 here"
        )
    count = ctypes.c_int()
    try:
        runtime = cuda.wrapper().handle
        status = runtime.cudaGetDeviceCount(ctypes.byref(count))
    except Exception as exc:  # polygraphy raises its own exception if it finds no CUDA runtime
        raise pb_utils.TritonModelException(
            f"no CUDA runtime can be loaded ({str(exc).splitlines()[0]}). Next: pip install nvidia-cuda-runtime-cu12"
        ) from exc
    if status or device >= count.value:
        raise pb_utils.TritonModelException(
            f"no GPU {device} on this host (CUDA error {status}, {count.value} GPUs). Next: serve with ONNX Runtime "
            "(--model-config-name onnx), or check the driver with nvidia-smi"
        )
    cuda.wrapper().check(runtime.cudaSetDevice(device))
    return device


def sm_of(device):
    """The GPU's compute capability as cc_model_filenames spells it: "8.6"."""
    numbers = []
    for attribute in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR):
        value = ctypes.c_int()
        runtime = cuda.wrapper()
        runtime.check(runtime.handle.cudaDeviceGetAttribute(ctypes.byref(value), attribute, device))
        numbers.append(value.value)
    return f"{numbers[0]}.{numbers[1]}"


def plan_name(folder, config, device):
    """The plan mapped to this GPU; there is no default, because a plan of another SM does not load."""
    sm, mapped = sm_of(device), config.get("cc_model_filenames") or {}
    have = ", ".join(sorted(path.name for path in folder.glob("*.plan"))) or "none"
    if sm not in mapped:
        raise pb_utils.TritonModelException(
            f"no plan for SM {sm} in cc_model_filenames (mapped: {', '.join(mapped) or 'none'}). "
            f"Next, on this host: arcface plan build NAME, then add {sm} to config.pbtxt"
        )
    if not (folder / mapped[sm]).is_file():
        raise pb_utils.TritonModelException(
            f"no plan {mapped[sm]} for SM {sm} in {folder} (found: {have}). "
            f"Next, on an SM {sm} GPU: arcface plan build NAME, then arcface assemble"
        )
    return mapped[sm]


def load(folder, config, device):
    """The engine of the plan for this GPU."""
    path = folder / plan_name(folder, config, device)
    content = _checked(path)  # before TensorRT sees it: a plan is code, and runs with the server's rights
    logger = trt.Logger(trt.Logger.WARNING)
    trt.init_libnvinfer_plugins(logger, "")
    engine = trt.Runtime(logger).deserialize_cuda_engine(content)
    if engine is None:
        raise pb_utils.TritonModelException(
            f"TensorRT {trt.__version__} does not load {path.name}: it was built for another GPU. "
            "Next: arcface plan build on this host"
        )
    return engine


def _checked(path):
    """The plan's bytes, if the manifest beside it has their digest and this TensorRT's version.

    `arcface serve` checks the manifest's signature before it starts the server, with the public key that it has.
    """
    manifest = path.with_name(path.name + ".json")
    try:
        with manifest.open("rb") as file:
            said = json.loads(file.read(1 << 20))
        sha256, version = str(said["sha256"]), str(said["spec"]["tensorrt"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise pb_utils.TritonModelException(
            f"{path.name} has no readable manifest at {manifest} ({type(exc).__name__}: {exc}), so nothing "
            "says what it is. Next: arcface assemble NAME --plan FILE"
        ) from exc
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise pb_utils.TritonModelException(
            f"{path.name} does not match its manifest (expected sha256 {sha256[:12]}): it was damaged or changed. "
            "Next: arcface assemble NAME --plan FILE, or arcface rollback --model arcface_trt"
        )
    if version.split("+")[0].split(".")[:3] != trt.__version__.split("+")[0].split(".")[:3]:
        raise pb_utils.TritonModelException(
            f"{path.name} was built with TensorRT {version}, this server has {trt.__version__}. "
            "Next: arcface plan build on this host, or a server with that version"
        )
    return content
