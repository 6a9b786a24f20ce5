"""Keep embeddings in a FAISS index, and search it; faces of another model are refused.

arcface embed people/ -o people.parquet && arcface embed unknown/ -o unknown.npz     (either form will do)
python examples/faiss_search.py people.parquet unknown.npz people.faiss

The index has no room for names and for the contract, so they stand in a file beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import faiss
import numpy as np

from arcface_clients.bulk.saved import read_saved


def write_index(people: str, index_file: str) -> None:
    """All faces of `people`, exact inner product: of unit rows that is the cosine."""
    known = read_saved(people)
    index = faiss.IndexFlatIP(known.embeddings.shape[1])
    index.add(np.ascontiguousarray(known.embeddings))
    faiss.write_index(index, index_file)
    beside = {"contract_id": known.contract_id, "paths": known.paths}
    Path(f"{index_file}.json").write_text(json.dumps(beside))


def main(people: str, unknown: str, index_file: str = "people.faiss") -> None:
    """Write the index if there is none, then print the nearest known face of each unknown one."""
    if not Path(index_file).exists():
        write_index(people, index_file)
    beside = json.loads(Path(f"{index_file}.json").read_text())
    asked = read_saved(unknown).of_contract(beside["contract_id"])  # raises ContractMismatch
    cosines, rows = faiss.read_index(index_file).search(np.ascontiguousarray(asked.embeddings), 1)
    for path, cosine, row in zip(asked.paths or (), cosines[:, 0], rows[:, 0], strict=True):
        print(f"{path}: {beside['paths'][row]}, distance {1 - cosine:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
