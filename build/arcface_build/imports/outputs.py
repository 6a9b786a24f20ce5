"""Selects the output that is the embedding: the named one, or the only one that can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arcface_build.errors import SourceRefused
from arcface_build.graph.index import drop_unused, shapes
from arcface_build.imports.onnx_file import IMPORT_ITSELF

if TYPE_CHECKING:
    import onnx

DETECTOR_OUTPUTS = 5  # SCRFD has 6 or 9, RetinaFace 9, YuNet 12


def keep_embedding(model: onnx.ModelProto, file: str, name: str | None = None) -> str:
    """Drop all outputs but the embedding; returns its name.

    Raises:
        SourceRefused: no output is called `name`; or, without a name, none or more than one can be an embedding.
    """
    outputs = [value.name for value in model.graph.output]
    if name is not None and name not in outputs:
        raise SourceRefused(
            f"{file} has no output {name}: expected one of {', '.join(outputs)}. Name it: --output NAME"
        )
    if name is None:
        name = outputs[0] if len(outputs) == 1 else _only_embedding(model, outputs, file)
    for position in reversed(range(len(outputs))):
        if outputs[position] != name:
            del model.graph.output[position]
    if len(outputs) > 1:
        drop_unused(model.graph)
    return name


def is_width(dim: object) -> bool:
    """Whether a recognition model can have this width: counts of landmarks, ages or classes are not multiples of 32."""
    return isinstance(dim, int) and 64 <= dim <= 4096 and dim % 32 == 0


def _only_embedding(model: onnx.ModelProto, outputs: list[str], file: str) -> str:
    known = shapes(model)
    fitting = [name for name in outputs if _can_be_embedding(known.get(name, []))]
    if len(fitting) == 1:
        return fitting[0]
    if len(fitting) > 1:
        raise SourceRefused(
            f"{file} has {len(fitting)} outputs that could be the embedding ({', '.join(fitting)}): expected one. "
            "Name it: --output NAME"
        )
    what = "a face detector" if len(outputs) >= DETECTOR_OUTPUTS else "not a recognition model"
    raise SourceRefused(
        f"{file} has {len(outputs)} outputs, none of them an embedding, so it is {what}: expected one of N×D. "
        f"{IMPORT_ITSELF}."
    )


def _can_be_embedding(shape: list[int | str | None]) -> bool:
    """[N,D], [N,D,1,1] or [D]."""
    long = [size for size in shape[1:] if size != 1] if len(shape) > 1 else shape
    return len(shape) in (1, 2, 4) and len(long) == 1 and is_width(long[0])
