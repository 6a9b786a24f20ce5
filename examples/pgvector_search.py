"""Keep embeddings in PostgreSQL with pgvector, and search them; faces of another model are refused.

arcface embed people/ -o people.parquet && arcface embed unknown/ -o unknown.npz     (either form will do)
python examples/pgvector_search.py people.parquet unknown.npz postgresql://localhost/mine

Needs psycopg, and pgvector installed in the server: CREATE EXTENSION vector.
"""

from __future__ import annotations

import sys

import psycopg

from arcface_clients.bulk.saved import read_saved

TABLES = """
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE IF NOT EXISTS face_contract (id text NOT NULL, only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row));
CREATE TABLE IF NOT EXISTS face (path text PRIMARY KEY, embedding vector({dim}) NOT NULL);
CREATE INDEX IF NOT EXISTS face_by_cosine ON face USING hnsw (embedding vector_cosine_ops);
"""
UPSERT = "INSERT INTO face VALUES (%s, %s) ON CONFLICT (path) DO UPDATE SET embedding = excluded.embedding"
NEAREST = "SELECT path, embedding <=> %s AS distance FROM face ORDER BY distance LIMIT 1"


def main(people: str, unknown: str, url: str = "postgresql://localhost/postgres") -> None:
    """Store the faces of `people`, then print the nearest of them for each unknown face."""
    known, asked = read_saved(people), read_saved(unknown)
    with psycopg.connect(url) as database:
        database.execute(TABLES.format(dim=known.embeddings.shape[1]))
        database.execute("INSERT INTO face_contract VALUES (%s) ON CONFLICT DO NOTHING", [known.contract_id])
        (contract_id,) = database.execute("SELECT id FROM face_contract").fetchone() or [None]
        known.of_contract(contract_id)  # raises ContractMismatch, and nothing is stored
        asked.of_contract(contract_id)
        rows = [(path, str(row.tolist())) for path, row in zip(known.paths or (), known.embeddings, strict=True)]
        database.cursor().executemany(UPSERT, rows)
        for path, row in zip(asked.paths or (), asked.embeddings, strict=True):
            found, distance = database.execute(NEAREST, [str(row.tolist())]).fetchone() or ("nobody", 1.0)
            print(f"{path}: {found}, distance {distance:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
