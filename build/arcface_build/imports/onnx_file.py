"""Reads an ONNX file with all its weights, or says in one sentence what the file is instead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from arcface_build.errors import SourceRefused
from arcface_build.graph.upgrade_opset import opset_of
from arcface_clients.errors import Missing

if TYPE_CHECKING:
    import onnx

IMPORT_ITSELF = "Import the recognition ONNX itself"
# First bytes of files that people pass by mistake, and what those are.
FOREIGN_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "Fetch them: git lfs pull"),
    (b"PK\x03\x04", "a zip (a PyTorch checkpoint or a model pack)", "Export or unpack the recognition ONNX"),
    (b"\x80\x02", "a Python pickle (a PyTorch checkpoint)", "Export it: torch.onnx.export"),
    (b"ftrt", "a TensorRT plan", "Import the ONNX that it was built from"),
    (b"ptrt", "a TensorRT plan", "Import the ONNX that it was built from"),
    (b"\x89HDF", "an HDF5 file (Keras)", "Export it with tf2onnx"),
    (b"ORTM", "an .ort file (ONNX Runtime's own format)", "Import the ONNX that it was made from"),
    (b"<", "a web page or XML", "Download the file itself"),
    (b"\xff\xd8\xff", "a JPEG image", "Name the ONNX file"),
    (b"\x89PNG", "a PNG image", "Name the ONNX file"),
)


def read_source(path: Path) -> onnx.ModelProto:
    """Read the model in a file, including weights stored beside it.

    Raises:
        Missing: no such file.
        SourceRefused: not ONNX, damaged, without its weights, or without a graph.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise Missing(f"{path} does not exist: expected an ONNX file. See what can be imported: arcface import --help")
    with path.open("rb") as file:
        head = file.read(64)
    if head[4:8] == b"ORTM":  # a flatbuffer: a four-byte offset precedes its identifier
        head = head[4:]
    try:
        model = onnx.load(str(path), load_external_data=False)
        sound = bool(model.graph.node and opset_of(model))
    except DecodeError:
        sound = False
    if not sound:
        raise SourceRefused(_not_onnx(path, head))
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as exc:
        wanted = _external_names(model)
        for name in wanted:
            if _is_odd(path.parent / name):
                raise SourceRefused(
                    f"{path.name} keeps its weights in {name}, which is a link or not a file: expected a regular file "
                    "beside it. Copy it there."
                ) from exc
        raise SourceRefused(
            f"{path.name} keeps its weights in another file: expected {', '.join(wanted)} beside it. "
            "Copy it into the same folder."
        ) from exc
    return _inlined(model, path.name)


def _inlined(model: onnx.ModelProto, file: str) -> onnx.ModelProto:
    """Inline the functions that a file defines.

    Raises:
        SourceRefused: a function calls itself, directly or through others.
    """
    if not model.functions:
        return model
    from onnx.inliner import inline_local_functions

    calls = {
        (function.domain, function.name): {(node.domain, node.op_type) for node in _all_nodes(function.node)}
        for function in model.functions
    }
    while leaves := [key for key, called in calls.items() if not called & calls.keys()]:
        for key in leaves:
            del calls[key]
    if calls:
        names = ", ".join(sorted(name for _, name in calls))
        raise SourceRefused(f"{file} defines functions that call themselves ({names}): expected none. Export it again.")
    return inline_local_functions(model)


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for item in node.attribute:
            for body in (item.g, *item.graphs):
                yield from _all_nodes(body.node)


def external_files(path: Path) -> list[Path]:
    """The files beside an ONNX file that contain its weights, sorted by name; usually none."""
    import onnx

    return [path.parent / name for name in _external_names(onnx.load(str(path), load_external_data=False))]


def _external_names(model: onnx.ModelProto) -> list[str]:
    """The names of the files beside it, sorted: of initializers, Constant nodes, and those of the bodies inside."""
    nodes = list(_all_nodes((*model.graph.node, *(node for function in model.functions for node in function.node))))
    items = [item for node in nodes for item in node.attribute]
    graphs = [model.graph, *(body for item in items for body in (item.g, *item.graphs))]
    tensors = [*(tensor for graph in graphs for tensor in graph.initializer)]
    tensors += [tensor for item in items for tensor in (item.t, *item.tensors)]
    return sorted({_location(tensor) for tensor in tensors if tensor.external_data})


def _is_odd(path: Path) -> bool:
    """Whether the path is anything but a regular file with one name: a link could point to any file on the host."""
    return path.is_symlink() or (path.exists() and (not path.is_file() or path.stat().st_nlink > 1))


def _not_onnx(path: Path, head: bytes) -> str:
    size = path.stat().st_size
    if size == 0:
        return f"{path.name} is empty: expected an ONNX file. Copy or download it again."
    for magic, what, todo in FOREIGN_FILES:
        if head.startswith(magic):
            return f"{path.name} is {what}: expected an ONNX file. {todo}."
    if head[:1] == b"\x08":  # field 1 of ModelProto, ir_version: this was once an ONNX file
        damaged = f"{path.name} is damaged or truncated ({size:,} bytes)"
        return f"{damaged}: expected a complete ONNX file. Download it again."
    return f"{path.name} is not an ONNX file (it starts with {head[:4].hex(' ')}). {IMPORT_ITSELF}."


def _location(tensor: onnx.TensorProto) -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "?")
