"""Optional packages: how to install each from where this copy of the package runs, reported before any work starts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from arcface_clients.errors import DependencyMissing

_DISTRIBUTION = "arcface-triton"
_EXTRA_OF = {  # keyed by module, because that is what an import error names
    "aiohttp": "http",
    "boto3": "store",
    "botocore": "store",
    "click": "cli",
    "cryptography": "store",
    "cv2": "images",
    "filelock": "tools",
    "matplotlib": "tools",
    "ml_dtypes": "tools",
    "onnx": "tools",
    "PIL": "images",
    "pillow_heif": "heif",
    "polygraphy": "tools",
    "pyarrow": "bulk",
    "pydantic": "config",
    "pytriton": "triton",
    "ray": "ray",
    "rich": "cli",
    "scipy": "reference-needs",
    "skimage": "reference-needs",
    "sklearn": "evidence",
    "torch": "pytorch",
    "yaml": "config",
}


def require(*modules: str, purpose: str) -> None:
    """Check that all of these modules can be imported, without importing them.

    Raises:
        DependencyMissing: one cannot; the message says what needs it and how to install it.
    """
    for module in modules:
        if find_spec(module) is None:
            raise DependencyMissing(f"{purpose} needs {module}, which is not installed. Next: {how_to_get(module)}")


@contextmanager
def importing(purpose: str) -> Iterator[None]:
    """Optional packages may be imported within; `purpose` is what needs them.

    Raises:
        DependencyMissing: one is not installed, or does not load here; the message says how to get it.
    """
    try:
        yield
    except ImportError as exc:
        module = (exc.name or "a package").partition(".")[0]
        absent = isinstance(exc, ModuleNotFoundError)
        why = "which is not installed" if absent else f"which does not load here ({exc})"
        raise DependencyMissing(f"{purpose} needs {module}, {why}. Next: {how_to_mend(exc)}") from exc


def how_to_get(module: str) -> str:
    """The command that installs a module; `module` may be a submodule."""
    root = module.partition(".")[0]
    if root in _EXTRA_OF:
        return install_command(_EXTRA_OF[root])
    if root == "insightface":  # its own requirements hold a second ONNX Runtime, and an OpenCV with a display library
        return f"{_pip()} install --no-deps insightface && {install_command('reference-needs')}"
    if root == "onnxruntime":
        return f"{_pip()} install onnxruntime (or onnxruntime-gpu, or onnxruntime-openvino: one of them)"
    if root == "tensorrt":
        return f"{install_command('tensorrt')}, and TensorRT itself in the version of the server (docs/plans.md)"
    return f"{_pip()} install {'tritonclient[grpc]' if root == 'tritonclient' else root}"


def how_to_mend(error: ImportError) -> str:
    """The command after which this import works: for a package that is missing, or one that lacks a display library."""
    if "libGL" in str(error):  # opencv-python; the headless package is the same import without it
        return f"{_pip()} install --force-reinstall --no-deps opencv-python-headless"
    return how_to_get(error.name) if error.name else f"{_pip()} check"


def install_command(extra: str) -> str:
    """The command that adds an extra to this installation: to the checkout that it runs from, or to its wheel.

    The package is on no index, so the distribution is named by its folder or its file.
    """
    if (checkout := _checkout()) is not None:
        here = checkout == Path.cwd()
        folder, constraints = (".", "constraints.txt") if here else (str(checkout), str(checkout / "constraints.txt"))
        return f"{_pip()} install -c {constraints} -e '{folder}[{extra}]'"
    return f"{_pip()} install '{_wheel()}[{extra}]'"


def _checkout() -> Path | None:
    """The checkout that this module lies in; None for an installed wheel."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "pyproject.toml").is_file() and (folder / "scripts" / "serve").is_file() else None


def _wheel() -> str:
    """The file that was installed, where pip still knows it and it is still there; else what it is called."""
    try:
        distribution = metadata.distribution(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "arcface_triton.whl"
    origin = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
    file = Path(unquote(urlsplit(origin).path))
    return str(file) if file.is_file() else f"arcface_triton-{distribution.version}-py3-none-any.whl"


def _pip() -> str:
    """pip of the running environment, as it would be typed here."""
    pip = Path(sys.prefix) / "bin" / "pip"
    if sys.prefix == sys.base_prefix or not pip.is_file():
        return "pip"
    below = os.path.relpath(pip)
    return str(pip) if below.startswith("..") else below
