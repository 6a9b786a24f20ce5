"""Keep embeddings in Qdrant, and search them; faces of another model are refused.

arcface embed people/ -o people.parquet && arcface embed unknown/ -o unknown.npz     (either form will do)
python examples/qdrant_search.py people.parquet unknown.npz http://localhost:6333     (or a folder: no server needed)
"""

from __future__ import annotations

import sys
import uuid

from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams

from arcface_clients.bulk.saved import read_saved

NAME = "faces"


def main(people: str, unknown: str, where: str = "qdrant") -> None:
    """Store the faces of `people`, then print the nearest of them for each unknown face."""
    known, asked = read_saved(people), read_saved(unknown)
    client = QdrantClient(where) if "://" in where else QdrantClient(path=where)
    if not client.collection_exists(NAME):
        size = known.embeddings.shape[1]
        client.create_collection(NAME, vectors_config=VectorParams(size=size, distance=Distance.COSINE))
    points, _ = client.scroll(NAME, limit=1)  # every point names its contract; one is enough, as all are the same
    contract_id = points[0].payload["contract_id"] if points else known.contract_id
    known.of_contract(contract_id)  # raises ContractMismatch, and nothing is stored
    asked.of_contract(contract_id)
    client.upload_points(
        NAME,
        [
            PointStruct(
                id=str(uuid.uuid5(uuid.NAMESPACE_URL, path)),  # the same path again replaces its point
                vector=row.tolist(),
                payload={"path": path, "contract_id": contract_id},
            )
            for path, row in zip(known.paths or (), known.embeddings, strict=True)
        ],
        wait=True,
    )
    for path, row in zip(asked.paths or (), asked.embeddings, strict=True):
        (nearest,) = client.query_points(NAME, query=row.tolist(), limit=1).points
        print(f"{path}: {nearest.payload['path']}, distance {1 - nearest.score:.3f}")
    client.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
