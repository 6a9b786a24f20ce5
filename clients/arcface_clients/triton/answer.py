"""What an answer has to be before a caller sees it: one unit embedding for each face, made by the right weights."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from arcface_clients.arrays import Array, FloatArray
from arcface_clients.contract import (
    CONTRACT_OUTPUT,
    EMBEDDING_OUTPUT,
    NORM_OUTPUT,
    UNIT_TOLERANCE,
    contract_prefix,
)
from arcface_clients.errors import ContractMismatch, InferenceFailed

Tensors = dict[str, Array]
"""The outputs of one answer by name."""
KINDS = {
    EMBEDDING_OUTPUT: ("FP32", np.float32),
    NORM_OUTPUT: ("FP32", np.float32),
    CONTRACT_OUTPUT: ("INT32", np.int32),
}
"""Each output of ours as Triton and as NumPy name its type; all have two dimensions."""

_NO_NORMS = np.empty(0, np.float32)


class Answer(NamedTuple):
    """`embeddings` float32 (N,D) of unit length; `norms` float32 (N,), or (0,) where nobody asked for them."""

    embeddings: FloatArray
    norms: FloatArray = _NO_NORMS

    @property
    def features(self) -> FloatArray:
        """Float32 (N,D): the embeddings as the network gave them, before they were cut to unit length."""
        return self.embeddings * self.norms[:, None]

    def owned(self) -> Answer:
        """The same, which the caller may write to; copied if need be."""
        if self.embeddings.flags.writeable and not self.norms.size:
            return self
        return Answer(self.embeddings.copy(), self.norms.copy())


def tensor_of(name: str, datatype: str, shape: tuple[int, ...], raw: bytes | memoryview) -> Array | None:
    """An output of ours (`KINDS`), a view on its bytes; None where type, shape and length do not go together."""
    kind, dtype = KINDS[name]
    if datatype != kind or len(shape) != 2 or min(shape) < 0 or len(raw) != 4 * shape[0] * shape[1]:
        return None
    return np.frombuffer(raw, dtype).reshape(shape)


def checked_contract(tensors: Tensors, count: int, who: str) -> npt.NDArray[np.int32]:
    """The one row int32 (4,) that all rows of the output `contract` are.

    Raises:
        InferenceFailed: no such output, or not a row for each face.
        ContractMismatch: the rows of one answer name two contracts.
    """
    rows = tensors.get(CONTRACT_OUTPUT)
    if rows is None or rows.shape != (count, 4) or not count:
        got = "none" if rows is None else str(rows.shape)
        raise InferenceFailed(f"{who} answered `contract` {got} for {count} faces; expected {(count, 4)}.")
    if (rows != rows[0]).any():
        raise ContractMismatch(
            f"{who} answered with rows of two contracts in one answer. Check the model: arcface parity"
        )
    return rows[:1].astype(np.int32).reshape(4)


def other_contract(got: npt.NDArray[np.int32], expected: npt.NDArray[np.int32], who: str) -> ContractMismatch:
    """The error for rows of another contract than the client has told its caller."""
    return ContractMismatch(
        f"{who} answered with rows of contract {contract_prefix(got)[:12]}; expected {contract_prefix(expected)[:12]}: "
        "another model was loaded. Embeddings of two contracts cannot be compared: serve the former model, or make a "
        "new client and enrol every person again"
    )


def checked_rows(tensors: Tensors, shape: tuple[int, int], who: str) -> Answer:
    """An answer's embeddings, if they are unit embeddings of this shape, and its norms, if it has them.

    Args:
        tensors: what came.
        shape: (N, D).
        who: who answered, for the message.

    Raises:
        InferenceFailed: they are not.
    """
    rows, norms = tensors[EMBEDDING_OUTPUT], tensors.get(NORM_OUTPUT)
    if rows.shape != shape:
        raise InferenceFailed(
            f"{who} answered {rows.shape} for {shape[0]} faces; expected {shape}. "
            "Was another model loaded? Make a new client"
        )
    squared = np.einsum("nd,nd->n", rows, rows)
    good = np.abs(squared - 1) <= UNIT_TOLERANCE  # NaN is not good either
    if not good.all():
        bad = np.flatnonzero(~good)
        raise InferenceFailed(
            f"{who} answered {bad.size} of {len(rows)} embeddings that are not of unit length "
            f"(row {bad[0]}: norm {np.sqrt(squared[bad[0]]):.4g}). Check the model: arcface parity"
        )
    if norms is None:
        return Answer(rows)
    if norms.shape != (shape[0], 1) or not (np.isfinite(norms) & (norms >= 0)).all():
        raise InferenceFailed(
            f"{who} answered `norm` {norms.shape} for {shape[0]} faces; expected lengths {(shape[0], 1)}."
        )
    return Answer(rows, norms.reshape(-1))


class Rows:
    """The answers to parts as one, which the caller may write to.

    Args:
        count: faces in all parts.
        embedding_dim: D.
        norms: whether the answers have norms.
    """

    def __init__(self, count: int, embedding_dim: int, norms: bool) -> None:
        """Empty."""
        self._embeddings = np.empty((count, embedding_dim), np.float32)
        self._norms = np.empty(count if norms else 0, np.float32)
        self._done = 0

    def add(self, answer: Answer) -> None:
        """The next part."""
        end = self._done + len(answer.embeddings)
        self._embeddings[self._done : end] = answer.embeddings
        if self._norms.size:
            self._norms[self._done : end] = answer.norms
        self._done = end

    @property
    def whole(self) -> Answer:
        """All of them."""
        return Answer(self._embeddings, self._norms)
