"""What we call of TensorRT, and the stand-in for it, against what the real Python module has in each version.

tests/tensorrt_api.json is read off the real bindings by tools/arcface_tools/tensorrt_api.py: 8.6.0 from the installed
module, later versions from their published sources.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent
TABLE: dict[str, dict[str, Any]] = json.loads((REPO / "tests" / "tensorrt_api.json").read_text())
OURS = [
    *(REPO / "build" / "arcface_build" / "plans").glob("*.py"),
    *(REPO / "tools" / "arcface_tools" / "gpu_check").glob("*.py"),
    *(REPO / "backends" / "tensorrt").glob("*.py"),
    REPO / "clients" / "arcface_clients" / "engines" / "tensorrt.py",
]
# What exists, or is asked for, from a version on; every use of it is behind a question for the version or the name.
SINCE = {
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": (10,),
    "IProgressMonitor": (10,),
    "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY": (10, 9),
}
CLASS_OF = {  # by the name of a variable or attribute, as our code calls them
    "engine": "ICudaEngine", "_engine": "ICudaEngine", "context": "IExecutionContext", "inspector": "EngineInspector",
    "layer": "ILayer", "runtime": "Runtime", "_runtime": "Runtime",
}  # fmt: skip
CUDA = {"check", "handle", "malloc"}  # what a variable called `runtime` has where it is CUDA's


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def members(api: dict[str, Any], name: str) -> dict[str, list[list[str]]]:
    """Member → the argument names of each overload ([] for an attribute); inherited ones are in it."""
    found: dict[str, list[list[str]]] = {}
    for entry in api["classes"][name]:
        if entry.startswith("<"):
            base = entry[1:]
            inherited = members(api, base) if base in api["classes"] else {}
            found = {**inherited, **found}
            continue
        member, given, arguments = entry.partition("(")
        names = [part.strip().rstrip("=") for part in arguments.rstrip(")").split(",") if part.strip()]
        found.setdefault(member, []).extend([names] if given else [])
    return found


def chains(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """X and X.Y of every trt.X and trt.X.Y, with the line."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        parts, below = [node.attr], node.value
        while isinstance(below, ast.Attribute):
            parts.insert(0, below.attr)
            below = below.value
        if isinstance(below, ast.Name) and below.id in ("trt", "tensorrt") and id(node) not in inner:
            yield ".".join(parts[:2]), node.lineno


def has(api: dict[str, Any], chain: str) -> bool:
    name, _, member = chain.partition(".")
    if name == "__version__":
        return True
    if name not in api["names"]:
        return False
    if not member or member.startswith("__"):
        return True
    return member in (api["enums"].get(name) or members(api, name))


def test_every_name_that_we_take_from_tensorrt_exists_in_every_version_that_has_it() -> None:
    used = [(path, chain, line) for path in OURS for chain, line in chains(ast.parse(path.read_text()))]
    assert len({chain for _, chain, _ in used}) > 15
    for path, chain, line in used:
        for version, api in TABLE.items():
            since = next((since for name, since in SINCE.items() if f"{chain}.".startswith(f"{name}.")), ())
            if numbers(version) < since:
                continue
            assert has(api, chain), f"{path.name}:{line}: TensorRT {version} has no {chain}"
    for chain, since in SINCE.items():
        assert not any(has(api, chain) for version, api in TABLE.items() if numbers(version) < since), chain


UNTIL = {("ICudaEngine", "device_memory_size"): (10,)}  # newer: for each profile


def test_every_method_that_we_call_exists_with_these_arguments() -> None:
    seen = set()
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            if path.name == "inspect.py" or name not in CLASS_OF:  # its layers are JSON
                continue
            if node.attr in CUDA or node.attr.startswith("cuda"):
                continue
            for version, api in TABLE.items():
                if CLASS_OF[name] == "ILayer" and numbers(version) >= (10,):
                    continue  # only what 8.6 builds is pinned
                if numbers(version) >= UNTIL.get((CLASS_OF[name], node.attr), (99,)):
                    continue
                known = members(api, CLASS_OF[name])
                where = f"{path.name}:{node.lineno}: TensorRT {version}"
                assert node.attr in known, f"{where}: {CLASS_OF[name]} has no {node.attr}"
            seen.add((CLASS_OF[name], node.attr))
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            for owner_class in {owner for owner, method in seen if method == call.func.attr}:
                for version, api in TABLE.items():
                    overloads = members(api, owner_class)[call.func.attr]
                    given = len(call.args) + len(call.keywords)
                    assert any(given <= len(names) for names in overloads), (path.name, call.lineno, version, overloads)
    assert ("ICudaEngine", "get_tensor_profile_shape") in seen
    assert ("IExecutionContext", "set_tensor_address") in seen


STAND_IN = {  # name in the stand-in → name in the real module
    "Builder": "Builder", "OnnxParser": "OnnxParser", "Runtime": "Runtime", "ICudaEngine": "ICudaEngine",
    "IExecutionContext": "IExecutionContext", "_Inspector": "EngineInspector", "_Config": "IBuilderConfig",
    "_Profile": "IOptimizationProfile", "_Network": "INetworkDefinition", "_TimingCache": "ITimingCache",
}  # fmt: skip
OWN = {  # of the stand-in itself: what it remembers
    "_Network": {"model", "strongly_typed"}, "_Config": {"cache", "flags", "limits", "profiles", "sources"},
    "_TimingCache": {"data"}, "ICudaEngine": {"plan", "session", "dim"},
    "IExecutionContext": {"engine", "shape", "addresses", "allocator"}, "_Inspector": {"plan"},
    "OnnxParser": {"network"},
}  # fmt: skip

INTROSPECT = """
import enum, inspect, json, sys
import tensorrt as fake
told = {"names": [n for n in vars(fake) if n[0] != "_"], "enums": {}, "classes": {}}
for name, value in vars(fake).items():
    if isinstance(value, type) and issubclass(value, enum.Enum):
        told["enums"][name] = [m for m in value.__members__]
    elif isinstance(value, type) and value.__module__ == "tensorrt":
        slots = [s for s in getattr(value, "__slots__", ()) if s[0] != "_"]
        found = dict.fromkeys(slots)
        for member, held in vars(value).items():
            if member[0] != "_":
                found[member] = list(inspect.signature(held).parameters)[1:] if inspect.isfunction(held) else None
        told["classes"][name] = found
print(json.dumps(told))
"""


@pytest.mark.parametrize("version", ["8.6.0", "10.3.0", "10.9.0", "11.1"])
def test_the_stand_in_offers_nothing_that_the_real_module_has_not(version: str, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text((REPO / "tests" / "fake_tensorrt.py").read_text())
    environment = {**os.environ, "FAKE_TRT_VERSION": version}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", INTROSPECT], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    fake, api = json.loads(done.stdout), TABLE[version]
    for name, offered in fake["enums"].items():
        if name in api["enums"] and name != "PreviewFeature":
            assert set(offered) <= set(api["enums"][name]), f"{name}: {set(offered) - set(api['enums'][name])}"
    wrong = []
    for name, real in STAND_IN.items():
        known = members(api, real)
        for member, arguments in fake["classes"][name].items():
            if member in OWN.get(name, ()):
                continue
            if member not in known:
                wrong.append(f"{real} has no {member}")
            elif arguments is not None and not any(arguments == names[: len(arguments)] for names in known[member]):
                wrong.append(f"{real}.{member} takes {known[member]}, not {arguments}")
    assert not wrong, "\n".join(wrong)
