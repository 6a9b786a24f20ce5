"""Reads which contract a serving ONNX names in its answers, without the onnx package and without loading the weights.

The id is a constant of the graph (`contract_words`), so the file says itself what it is, whatever lies beside it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from arcface_clients.contract import contract_prefix

CONSTANT = "contract_words"
_GRAPH, _INITIALIZER, _NAME, _RAW_DATA = 7, 5, 8, 9  # fields of ModelProto, GraphProto and TensorProto in onnx.proto
_FIXED_BYTES = {1: 8, 5: 4}  # wire type → bytes of a number of fixed size


def contract_in(file: Path) -> str | None:
    """The first 32 hexadecimal digits of the contract id that answers of this ONNX carry.

    None: it names none (an older import, a source), or it is no ONNX, which ONNX Runtime says better.
    """
    with suppress(OSError, ValueError, IndexError), file.open("rb") as handle:
        data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        for graph in _parts(data, (0, len(data)), _GRAPH):
            for tensor in _parts(data, graph, _INITIALIZER):
                if [data[a:b] for a, b in _parts(data, tensor, _NAME)] != [CONSTANT.encode()]:
                    continue
                for a, b in _parts(data, tensor, _RAW_DATA):
                    return contract_prefix(np.frombuffer(data[a:b], "<i4"))
    return None


def _parts(data: mmap.mmap, span: tuple[int, int], wanted: int) -> Iterator[tuple[int, int]]:
    """Where the length-delimited fields of this number lie in a message; everything else is stepped over.

    Raises:
        ValueError, IndexError: not a protobuf message.
    """
    position, end = span
    while position < end:
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            _, position = _varint(data, position)
        elif wire == 2:
            length, position = _varint(data, position)
            if position + length > end:
                raise ValueError("a field is longer than its message")
            if number == wanted:
                yield position, position + length
            position += length
        elif wire in _FIXED_BYTES:
            position += _FIXED_BYTES[wire]
        else:
            raise ValueError(f"wire type {wire}")


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """The number at a position, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
