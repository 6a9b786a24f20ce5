"""Compare two files of saved embeddings of the same faces, as `arcface embed` writes them.

python examples/compare_saved.py before.npz after.npz

With a report, targets and the likely fault in words: arcface compare before.npz after.npz
"""

from __future__ import annotations

import sys

import numpy as np

from arcface_clients.evidence.drift import compare_embeddings


def main(before: str, after: str) -> None:
    """Line the faces up by path, print their drift and the worst of them."""
    with np.load(before) as a, np.load(after) as b:
        contracts = [str(file["contract_id"]) for file in (a, b) if "contract_id" in file]
        if len({*filter(None, contracts)}) > 1:
            sys.exit(f"embeddings of two models mean nothing to each other: contract ids {' and '.join(contracts)}")
        place = {path: row for row, path in enumerate(b["paths"])}
        shared = [(row, place[path]) for row, path in enumerate(a["paths"]) if path in place]
        if not shared:
            sys.exit("the two files have no path in common")
        rows_a, rows_b = map(list, zip(*shared, strict=True))
        report = compare_embeddings(a["embeddings"][rows_a], b["embeddings"][rows_b], names=a["paths"][rows_a].tolist())
    print(f"{report.faces} faces: mean cosine {report.mean_cosine:.6f}, largest drift {report.max_drift:.1e}")
    for face in report.worst_faces[:3]:
        print(f"{face.name}: cosine {face.cosine:.6f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
