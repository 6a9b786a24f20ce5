"""Reads what `arcface embed` wrote, .npz or Parquet: paths, embeddings, and the contract they belong to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from arcface_clients.arrays import DAMAGED, Array
from arcface_clients.bulk.files import Files, is_url
from arcface_clients.bulk.parts import FORMAT, SUCCESS, read_embeddings
from arcface_clients.errors import ContractMismatch, WrongUse
from arcface_clients.extras import require

_NEXT = "Next: arcface embed FOLDER -o FILE.npz"


@dataclass(frozen=True)
class SavedEmbeddings:
    """The content of one file.

    Attributes:
        embeddings: float (N,D).
        paths: N, as they were given to `arcface embed`; None if the file has none.
        contract_id: None if the file states none.
        precision: of the model that made them, if it says.
    """

    embeddings: Array = field(repr=False)
    paths: tuple[str, ...] | None = field(default=None, repr=False)
    contract_id: str | None = None
    precision: str | None = None

    def of_contract(self, contract_id: str | None) -> SavedEmbeddings:
        """These, if they may be compared with embeddings of that contract.

        Raises:
            ContractMismatch: the contracts differ, or one of them is unknown.
        """
        if not self.contract_id or self.contract_id != contract_id:
            mine, theirs = (which[:12] if which else "an unknown contract" for which in (self.contract_id, contract_id))
            raise ContractMismatch(
                f"these embeddings are of {mine}, those to compare them with of {theirs}: expected one model for both, "
                "since distances between two models mean nothing. Embed both with the model that is served: "
                "arcface embed FACES -o FILE"
            )
        return self


def read_saved(path: Path | str) -> SavedEmbeddings:
    """The embeddings of a .npz or .parquet file or a data set that `arcface embed` wrote, or of a bare .npy (N,D).

    Raises:
        WrongUse: it is no such file, or damaged.
        OSError: it cannot be read.
    """
    if is_url(str(path)) or Path(path).is_dir():
        return _data_set(str(path))
    path = Path(path)
    return _parquet(path) if path.suffix.lower() == ".parquet" else _numpy(path)


def _data_set(path: str) -> SavedEmbeddings:
    require("pyarrow", purpose=f"reading {path}")
    success = Files().folder(path).read(SUCCESS)
    if success is None:
        raise WrongUse(
            f"{path} holds no finished data set: expected {SUCCESS} in it. Next: arcface embed FOLDER -o {path}"
        )
    return _gathered(path, json.loads(success)["contract_id"])


def _gathered(path: str, contract_id: str | None) -> SavedEmbeddings:
    groups = [group for group in read_embeddings(path) if len(group[0])]
    paths = tuple(name for names, _, _ in groups for name in names)
    embeddings = np.concatenate([rows for _, _, rows in groups]) if groups else np.empty((0, 0), np.float32)
    return SavedEmbeddings(embeddings, paths, contract_id)


def _parquet(path: Path) -> SavedEmbeddings:
    require("pyarrow", purpose=f"reading {path}")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
        if metadata.get(b"format", b"").decode() != FORMAT:
            raise WrongUse(f"{path} is a Parquet file, but not of embeddings. {_NEXT.replace('npz', 'parquet')}")
        return _gathered(str(path), metadata[b"contract_id"].decode() or None)
    except WrongUse:
        raise
    except (pa.ArrowException, KeyError, ValueError) as exc:
        raise WrongUse(f"{path} is not a Parquet file, or truncated ({exc}). {_NEXT}") from exc


def _numpy(path: Path) -> SavedEmbeddings:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return SavedEmbeddings(_two_dimensional(loaded, path))
            if "embeddings" not in loaded.files:
                found = ", ".join(loaded.files) or "nothing"
                raise WrongUse(f"{path} contains {found}: expected an array `embeddings`.")
            return SavedEmbeddings(
                _two_dimensional(loaded["embeddings"], path),
                tuple(str(name) for name in loaded["paths"]) if "paths" in loaded.files else None,
                str(loaded["contract_id"]) or None if "contract_id" in loaded.files else None,
                str(loaded["precision"]) if "precision" in loaded.files else None,
            )
    except WrongUse:
        raise
    except DAMAGED as exc:
        raise WrongUse(f"{path} is not a NumPy file, or truncated ({exc}). {_NEXT}") from exc


def _two_dimensional(array: Array, path: Path) -> Array:
    if array.ndim != 2 or array.dtype.kind != "f":
        raise WrongUse(f"{path} contains {array.dtype} {array.shape}: expected float embeddings (N, D).")
    return array
