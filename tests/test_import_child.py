"""Files that mean harm: each ends in one sentence within its time, and leaves neither a process nor a file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from arcface_build.imports import child
from arcface_build.imports.child import ImportJob, run_child
from deadlines import HANG_S, wait_until
from tiny_nets import tiny_net

COMMAND = [sys.executable, "-c", "from arcface_build.cli import main; main()", "import"]


def in_front(model: onnx.ModelProto, *nodes: onnx.NodeProto, **weights: np.ndarray) -> onnx.ModelProto:
    """Nodes before the network, which reads `made`."""
    for node in model.graph.node:
        node.input[:] = ["made" if name == "input.1" else name for name in node.input]
    body = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *body])
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


def endless(folder: Path) -> Path:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["x", "zero"], ["x_next"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, None)],
        [value("go_on", TensorProto.BOOL, []), value("x_next", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.float32(0), "zero")],
    )
    loop = helper.make_node("Loop", ["", "always", "input.1"], ["made"], body=body)
    return saved(in_front(tiny_net(), loop, always=np.array(True)), folder)


def giant(folder: Path) -> Path:
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["zero"], keepdims=0),
        helper.make_node("Add", ["input.1", "zero"], ["made"]),
    ]
    return saved(in_front(tiny_net(), *nodes, size=np.array([1 << 40], np.int64)), folder)


def dimensions_without_data(folder: Path) -> Path:
    model = tiny_net()
    tensor = next(t for t in model.graph.initializer if t.name == "fc_w")
    tensor.dims[:] = [1 << 31, 1 << 31]
    return saved(model, folder)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "net.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def beside(folder: Path, change: Callable[[Path], None]) -> Path:
    path = folder / "net.onnx"
    onnx.save(tiny_net(), str(path), save_as_external_data=True, location="net.bin", size_threshold=1024)
    change(folder / "net.bin")
    return path


def hard_link(folder: Path) -> Path:
    def change(weights: Path) -> None:
        weights.rename(folder / "elsewhere")
        os.link(folder / "elsewhere", weights)

    return beside(folder, change)


def link_outside(folder: Path) -> Path:
    def change(weights: Path) -> None:
        outside = folder.parent / f"{folder.name}-outside"
        weights.rename(outside)
        weights.symlink_to(outside)

    return beside(folder, change)


def fifo_beside(folder: Path) -> Path:
    def change(weights: Path) -> None:
        weights.unlink()
        os.mkfifo(weights)

    return beside(folder, change)


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "net.onnx")
    return folder / "net.onnx"


HARMFUL = {
    "a loop without end": (endless, "SourceRefused: net.onnx was not imported within 8 s and was stopped."),
    "a constant of a terabyte": (giant, "SourceRefused: net.onnx"),
    "dimensions without data": (dimensions_without_data, "SourceRefused: net.onnx: weight fc_w is damaged"),
    "weights that are a hard link": (
        hard_link,
        "SourceRefused: net.onnx keeps its weights in net.bin, which is a link or not a file",
    ),
    "weights linked from outside": (
        link_outside,
        "SourceRefused: net.onnx keeps its weights in net.bin, which is a link or not a file",
    ),
    "a fifo beside it": (
        fifo_beside,
        "SourceRefused: net.onnx keeps its weights in net.bin, which is a link or not a file",
    ),
    "a fifo": (fifo, "Missing: "),
}


@pytest.mark.parametrize("what", HARMFUL)
def test_a_harmful_file_ends_in_one_sentence_in_time_and_leaves_nothing(what: str, tmp_path: Path) -> None:
    make, message = HARMFUL[what]
    path = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    answer = subprocess.run(
        [*COMMAND, str(path), "-q", "--no-assemble", "--timeout", "8", "--models-dir", str(tmp_path / "models")],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        cwd=tmp_path,
    )
    assert answer.stderr.startswith(message) and answer.stderr.count("\n") == 1, answer.stderr
    assert answer.returncode in (2, 3)
    assert list((tmp_path / "models").iterdir()) == []
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "models"] == before


def processes_naming(text: str) -> list[int]:
    """Processes whose environment or command line names a path of the test."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if text in str((process / "cwd").readlink()) and int(process.name) != os.getpid():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_a_killed_import_takes_its_child_with_it(tmp_path: Path) -> None:
    path = endless(tmp_path)
    process = subprocess.Popen([*COMMAND, str(path), "--no-assemble"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(processes_naming(str(tmp_path))) == 2, "its child does not start")
    time.sleep(0.5)  # the child asks to die with its parent in its first moments
    process.kill()
    process.wait()
    wait_until(lambda: processes_naming(str(tmp_path)) == [], "its child is still there", 10)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -SEGV $$", "net.onnx crashes the ONNX libraries (SIGSEGV): expected a valid file. Export it again."),
        ("exit 7", "net.onnx crashes the ONNX libraries (exit code 7): expected a valid file. Export it again."),
        ("kill -KILL $$", "the import of net.onnx was killed (by the kernel, out of memory, or by hand)."),
    ],
)
def test_a_crash_of_the_child_is_one_sentence(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(child.sys, "executable", str(program))
    job = ImportJob("net.onnx", str(tmp_path / "models"), str(tmp_path), str(tmp_path))
    with pytest.raises(child.ArcFaceError) as caught:
        run_child(job, 10, lambda what, done, total: None, lambda line: None)
    assert str(caught.value) == message
