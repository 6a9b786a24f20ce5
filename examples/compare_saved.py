"""Compare two files of saved embeddings of the same faces, as `arcface embed` writes them.

python examples/compare_saved.py before.npz after.npz

With a report, targets and the likely fault in words: arcface compare before.npz after.npz
"""

from __future__ import annotations

import sys

from arcface_clients.bulk.saved import read_saved
from arcface_clients.evidence.drift import compare_embeddings


def main(before: str, after: str) -> None:
    """Line the faces up by path, print their drift and the worst of them."""
    a, b = read_saved(before), read_saved(after)  # .npz or .parquet
    a.of_contract(b.contract_id)  # raises where they mean nothing to each other
    place = {path: row for row, path in enumerate(b.paths or ())}
    shared = [(row, place[path]) for row, path in enumerate(a.paths or ()) if path in place]
    if not shared:
        sys.exit("the two files have no path in common")
    rows_a, rows_b = map(list, zip(*shared, strict=True))
    names = [path for path in a.paths or () if path in place]
    report = compare_embeddings(a.embeddings[rows_a], b.embeddings[rows_b], names=names)
    print(f"{report.faces} faces: mean cosine {report.mean_cosine:.6f}, largest drift {report.max_drift:.1e}")
    for face in report.worst_faces[:3]:
        print(f"{face.name}: cosine {face.cosine:.6f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
