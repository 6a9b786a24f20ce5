"""What a fresh import could gain: precisions that nobody has made or judged yet, timed but never served."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from arcface_build.variants.candidates import Candidate, fp32_file
from arcface_build.variants.int8 import quantizable_layers, quantize_convolutions
from arcface_build.variants.make import load_named
from arcface_build.variants.sidecar import variants_folder
from arcface_clients.engines.import_manifest import DEMO, read_import_manifest

if TYPE_CHECKING:
    import onnx

WORTH_MAKING = {"bf16": 1.1, "int8": 1.4}  # times what is served; the gate will keep some of int8's layers in float


def untried(model_dir: Path, here: Sequence[str], told_precision: bool = True) -> list[Candidate]:
    """bf16 and int8 where they were neither made nor refused and OpenVINO could run them; none for demo weights.

    bf16 is the fp32 file. int8 is a stand-in with every convolution but the first in int8 and ranges made up: its
    embeddings are useless, but its speed is that of int8, which does not depend on ranges.
    """
    imported = read_import_manifest(model_dir)
    openvino = [runtime for runtime in here if runtime.startswith("openvino")]
    if imported.source.get("kind") == DEMO or not openvino or find_spec("onnx") is None:
        return []
    file, digest = fp32_file(model_dir, imported.serving)
    found = []
    if "openvino-bf16" in openvino and told_precision and not _tried(model_dir, "bf16"):
        found.append(Candidate("bf16", "openvino-bf16", file, digest))
    if not _tried(model_dir, "int8"):
        make = partial(_stand_in, model_dir / file)
        found.append(Candidate("int8", openvino[0], file, f"stand-in of {digest}", made=make))
    return found


def offer(model: str, precision: str, lead: float) -> str:
    """What to tell whoever serves: that a variant would win, and how to make it; empty if it would not."""
    if lead < WORTH_MAKING[precision]:
        return ""
    how = "" if precision == "bf16" else " with every layer but the first in int8 (the gate will keep some in float)"
    faces = "" if precision == "bf16" else " --eval FOLDER_OF_CROPS"
    return (
        f"{precision} would be faster: {model} ran {lead:.1f} × as fast here{how}. "
        f"Next: arcface quantize {model} --precision {precision}{faces}"
    )


def _tried(model_dir: Path, precision: str) -> bool:
    return any(variants_folder(model_dir).glob(f"{precision}-cpu.json*"))


def _stand_in(serving: Path) -> onnx.ModelProto:
    model = load_named(serving)
    layers = quantizable_layers(model)
    inputs = {node.name: node.input[0] for node in model.graph.node}
    return quantize_convolutions(model, {inputs[name]: (-1.0, 1.0) for name in layers}, "cpu", layers[:1])
