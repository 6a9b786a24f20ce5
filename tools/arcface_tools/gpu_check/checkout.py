"""The checkout that these tools run from: its model repository, and the small networks and stand-ins of its tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[3]
REPOSITORY = ROOT / "model_repository"
TESTS = ROOT / "tests"


def load_from_tests(name: str) -> ModuleType:
    """A module of tests/, which is not on the path: `tiny_onnx` is the three-layer network of the first stage."""
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
