"""Selects the output that is the embedding: the named one, or the only one that can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from arcface_build.errors import SourceRefused
from arcface_build.graph.index import GraphIndex, attribute, drop_unused, shapes
from arcface_build.imports.onnx_file import IMPORT_ITSELF

if TYPE_CHECKING:
    import onnx

DETECTOR_OUTPUTS = 5  # SCRFD has 6 or 9, RetinaFace 9, YuNet 12
SAME_NUMBERS = ("Identity", "Dropout", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze")
UNIT_ERROR = 1e-3  # of a length or a cosine: what float16 weights leave


def keep_embedding(model: onnx.ModelProto, file: str, name: str | None = None) -> str:
    """Drop all outputs but the embedding; returns its name.

    Raises:
        SourceRefused: no output is called `name`; or, where none is named, none or more than one can be an embedding,
            or it looks like a training head's.
    """
    outputs = [value.name for value in model.graph.output]
    if name is not None and name not in outputs:
        raise SourceRefused(
            f"{file} has no output {name}: expected one of {', '.join(outputs)}. Name it: --output NAME"
        )
    if name is None:
        name = outputs[0] if len(outputs) == 1 else _only_embedding(model, outputs, file)
        _check_no_head(GraphIndex(model.graph), name, file)
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
    fitting = [name for name in outputs if _can_be_embedding(known.get(name))]
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


def _can_be_embedding(shape: list[int | str | None] | None) -> bool:
    """[N,D], [N,D,1,1] or [D]; a shape that the file does not tell may be one of them."""
    if shape is None:
        return True
    long = [size for size in shape[1:] if size != 1] if len(shape) > 1 else shape
    return len(shape) in (1, 2, 4) and len(long) == 1 and (is_width(long[0]) or not isinstance(long[0], int))


def last_step(index: GraphIndex, name: str) -> onnx.NodeProto | None:
    """The node that computes the numbers of a tensor: others behind it only pass them on."""
    maker = index.maker.get(name)
    while maker is not None and maker.op_type in SAME_NUMBERS:
        maker = index.maker.get(maker.input[0])
    return maker


def _check_no_head(index: GraphIndex, name: str, file: str) -> None:
    """Refuse cosines to the people of the training: products with unit vectors that stand askew.

    A projection that keeps lengths (PCA) also has unit vectors, but at right angles: that is an embedding.
    """
    maker = last_step(index, name)
    while maker is not None and maker.op_type in ("Mul", "Div", "Sub", "Add"):
        read = [part for part in maker.input if index.constant(part) is None]
        maker = last_step(index, read[0]) if len(read) == 1 else None
    if maker is None or maker.op_type not in ("MatMul", "Gemm"):
        return
    weight = index.constant(maker.input[1])
    if weight is None or weight.ndim != 2:
        return
    vectors = (weight if attribute(maker, "transB", 0) else weight.T).astype(np.float64)
    cosines = vectors[:64] @ vectors[:64].T  # enough to see an angle
    if np.abs(np.linalg.norm(vectors, axis=1) - 1).max() > UNIT_ERROR:
        return
    if np.abs(cosines - np.eye(len(cosines))).max() > UNIT_ERROR:
        raise SourceRefused(
            f"{file} ends in products with {len(vectors)} vectors of length 1, like the cosines of a training head: "
            f"expected an embedding. Export the backbone; if the output is the embedding, name it: --output {name}."
        )
