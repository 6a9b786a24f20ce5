"""Optional packages: how to install each, reported before any work starts."""

from __future__ import annotations

from importlib.util import find_spec

from arcface_clients.errors import DependencyMissing

_EXTRA = "pip install 'arcface-triton[{}]'"
# module → what installs it; keyed by module, because that is what an import error names
HOW_TO_GET = {
    "aiohttp": _EXTRA.format("http"),
    "boto3": _EXTRA.format("store"),
    "botocore": _EXTRA.format("store"),
    "click": _EXTRA.format("cli"),
    "cryptography": _EXTRA.format("store"),
    "cv2": _EXTRA.format("images"),
    "filelock": _EXTRA.format("tools"),
    "insightface": "pip install --no-deps insightface && " + _EXTRA.format("reference-needs"),
    "matplotlib": _EXTRA.format("tools"),
    "ml_dtypes": _EXTRA.format("tools"),
    "onnx": _EXTRA.format("tools"),
    "onnxruntime": "pip install onnxruntime (or onnxruntime-gpu, or onnxruntime-openvino: one of them)",
    "PIL": _EXTRA.format("images"),
    "polygraphy": _EXTRA.format("tools"),
    "pyarrow": _EXTRA.format("bulk"),
    "pydantic": _EXTRA.format("config"),
    "pytriton": _EXTRA.format("triton"),
    "ray": _EXTRA.format("ray"),
    "rich": _EXTRA.format("cli"),
    "scipy": _EXTRA.format("reference-needs"),
    "skimage": _EXTRA.format("reference-needs"),
    "sklearn": _EXTRA.format("evidence"),
    "tensorrt": "pip install tensorrt, in the version of the server (docs/plans.md)",
    "torch": _EXTRA.format("pytorch"),
    "tritonclient": "pip install 'tritonclient[grpc]'",
    "yaml": _EXTRA.format("config"),
}


def require(*modules: str, purpose: str) -> None:
    """Check that all of these modules can be imported, without importing them.

    Raises:
        DependencyMissing: one cannot; the message says what needs it and how to install it.
    """
    for module in modules:
        if find_spec(module) is None:
            raise DependencyMissing(f"{purpose} needs {module}, which is not installed. Next: {how_to_get(module)}")


def how_to_get(module: str) -> str:
    """The command that installs a module; `module` may be a submodule."""
    root = module.partition(".")[0]
    return HOW_TO_GET.get(root, f"pip install {root}")


def how_to_mend(error: ImportError) -> str:
    """The command after which this import works: for a package that is missing, or one that lacks a display library."""
    if "libGL" in str(error):  # opencv-python; the headless package is the same import without it
        return "pip install --force-reinstall --no-deps opencv-python-headless"
    return how_to_get(error.name or "arcface-triton")
