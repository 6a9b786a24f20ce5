"""Writes tests/tensorrt_api.json: the names, arguments and enums of TensorRT's Python module, by version.

    python tools/arcface_tools/tensorrt_api.py introspect                    # the tensorrt that this Python imports
    python tools/arcface_tools/tensorrt_api.py sources CLONE v10.3.0 v11.1   # tags of a clone of NVIDIA/TensorRT

Both add to or replace versions in the file. It is how the project's own calls, and the stand-in that replaces TensorRT
in tests, are held to what the real module has. Needs the standard library alone: TensorRT 8.6 needs CPython 3.10.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parents[2] / "tests" / "tensorrt_api.json"
FILES = ("infer/pyCore", "infer/pyGraph", "infer/pyFoundationalTypes", "infer/pyPlugin", "parsers/pyOnnx")
_SKIPPED = re.compile(r"^I\w+Layer$|Plugin|Refitter|Calibrator|Dims|Weights|Permutation|Attention|MoE")  # not ours
_CLASS = re.compile(r"py::(class_|enum_)<\s*([\w:]+)[^()]*?>\s*(?:\w+\s*)?[({]\s*m,\s*\"(\w+)\"", re.DOTALL)
_HOW = "def|def_static|def_property|def_property_readonly|def_readwrite|def_readonly|value"
_MEMBER = re.compile(rf"\.({_HOW})\(\s*\"(\w+)\"")
_ARGUMENT = re.compile(r'"(\w+)"_a(\s*=)?')


def from_sources(clone: Path, tag: str) -> dict[str, Any]:
    """The table of one version, from the sources of its bindings."""
    api: dict[str, Any] = {"read": f"sources of {tag}", "names": [], "classes": {}, "enums": {}}
    for file in FILES:
        command = ["git", "-C", str(clone), "show", f"{tag}:python/src/{file}.cpp"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", shown.stdout, flags=re.DOTALL)
        api["names"] += re.findall(r"\bm\.(?:def|attr)\(\s*\"(\w+)\"", text)
        found = [*_CLASS.finditer(text)]
        for match, after in zip(found, [*found[1:], None]):  # noqa: B905 (CPython 3.9)
            part = text[match.end() : after.start() if after else len(text)]
            kind, name = match.group(1), match.group(3)
            members = [(m.group(1), m.group(2), _inside(part, m.end())) for m in _MEMBER.finditer(part)]
            if kind == "enum_":
                api["enums"][name] = sorted({member for how, member, _ in members if how == "value"})
                continue
            bases = re.findall(r"\bI[A-Z]\w+", match.group(0).partition("m,")[0].partition(",")[2])
            entries = {_entry(how, member, inside) for how, member, inside in members}  # ILogger has its severities
            api["classes"][name] = sorted(entries | {f"<{base}" for base in bases if base != name})
    return _trimmed(api)


def from_module() -> tuple[str, dict[str, Any]]:
    """Version and table of the installed tensorrt, from the module itself."""
    import tensorrt

    api: dict[str, Any] = {"read": "introspection of the installed module", "names": [], "classes": {}, "enums": {}}
    for name, value in vars(tensorrt).items():
        if name.startswith("_") or type(value).__name__ == "module":
            continue
        api["names"].append(name)
        if isinstance(value, type) and hasattr(value, "__members__"):
            api["enums"][name] = sorted(value.__members__)
        elif isinstance(value, type) and value.__module__.startswith("tensorrt"):
            entries = set()
            for member in dir(value):
                documented = (getattr(getattr(value, member), "__doc__", "") or "") if member[0] != "_" else ""
                if member[0] == "_" and member not in ("__init__", "__len__", "__getitem__"):
                    continue
                if isinstance(vars(value).get(member), property) or not callable(getattr(value, member)):
                    entries.add(member)
                    continue
                for line in re.findall(rf"(?m)^(?:\d+\. )?{member}\((.*)\) ->", documented) or [""]:
                    arguments = re.findall(r"(\w+): [^,=]+(=)?", line)
                    given = [f"{a}{'=' if d else ''}" for a, d in arguments if a not in ("self", "arg0")]
                    entries.add(f"{member}({', '.join(given)})")
            api["classes"][name] = sorted(entries)
    return tensorrt.__version__, _trimmed(api)


def _inside(text: str, start: int) -> str:
    """From here to the parenthesis that closes the one before."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return text[start:]


def _entry(how: str, name: str, inside: str) -> str:
    if how not in ("def", "def_static"):
        return name
    return f"{name}({', '.join(a + ('=' if default else '') for a, default in _ARGUMENT.findall(inside))})"


def _trimmed(api: dict[str, Any]) -> dict[str, Any]:
    for kind in ("classes", "enums"):
        api[kind] = {name: entries for name, entries in sorted(api[kind].items()) if not _SKIPPED.search(name)}
    network = api["classes"].get("INetworkDefinition", [])
    api["classes"]["INetworkDefinition"] = [entry for entry in network if not entry.startswith("add_")]
    api["names"] = sorted({*api["names"], *api["classes"], *api["enums"]})
    api["names"] = [name for name in api["names"] if not _SKIPPED.search(name)]
    return api


def main(arguments: list[str]) -> int:
    """Add versions to the table; the exit code is 2 for wrong use."""
    if arguments[:1] == ["introspect"]:
        version, api = from_module()
        read = {version: api}
    elif arguments[:1] == ["sources"] and len(arguments) > 2:
        read = {tag.removeprefix("v"): from_sources(Path(arguments[1]), tag) for tag in arguments[2:]}
    else:
        print(__doc__, file=sys.stderr)
        return 2
    known = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    lines = []
    for version, api in sorted({**known, **read}.items(), key=lambda item: [int(n) for n in item[0].split(".")]):
        parts = [f'  "read": {json.dumps(api["read"])}', f'  "names": {json.dumps(api["names"])}']
        for kind in ("classes", "enums"):
            rows = ",\n".join(f"   {json.dumps(name)}: {json.dumps(entries)}" for name, entries in api[kind].items())
            parts.append(f'  "{kind}": {{\n{rows}\n  }}')
        lines.append(f' "{version}": {{\n' + ",\n".join(parts) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
