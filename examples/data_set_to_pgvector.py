"""Copy a data set of `arcface embed` into PostgreSQL with pgvector, a part at a time; a run that was killed goes on.

arcface embed s3://data/crops/ -o s3://data/embeddings/
python examples/data_set_to_pgvector.py s3://data/embeddings/ postgresql://localhost/mine

Needs psycopg, and pgvector installed in the server. A part and the note that it is stored are one transaction.
"""

from __future__ import annotations

import json
import sys

import psycopg

from arcface_clients.bulk.files import Files
from arcface_clients.bulk.parts import SUCCESS, parts_of, read_embeddings
from arcface_clients.errors import ContractMismatch

TABLES = """
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE IF NOT EXISTS contract (id text NOT NULL, only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row));
CREATE TABLE IF NOT EXISTS stored_part (name text PRIMARY KEY);
CREATE TABLE IF NOT EXISTS embedded_face (path text NOT NULL, identity text, embedding vector NOT NULL);
"""
INDEX = """
CREATE INDEX IF NOT EXISTS embedded_face_by_cosine
ON embedded_face USING hnsw ((embedding::vector({dim})) vector_cosine_ops)
"""


def main(data_set: str, url: str = "postgresql://localhost/postgres") -> None:
    """Store what is not stored yet, then build the index: that is faster than keeping one up to date."""
    parts, stored, dim = parts_of(data_set), 0, 0
    contract_id = json.loads(Files().folder(data_set).read(SUCCESS) or b"")["contract_id"]
    with psycopg.connect(url, autocommit=True) as database:
        database.execute(TABLES)
        database.execute("INSERT INTO contract VALUES (%s) ON CONFLICT DO NOTHING", [contract_id])
        if database.execute("SELECT id FROM contract").fetchone() != (contract_id,):
            raise ContractMismatch(
                f"the database holds embeddings of another model than {contract_id}: take another one"
            )
        before = {name for (name,) in database.execute("SELECT name FROM stored_part")}
        for part in filter(lambda part: part not in before, parts):
            with database.transaction(), database.cursor() as cursor:
                with cursor.copy("COPY embedded_face FROM STDIN") as copy:
                    for paths, identities, rows in read_embeddings(part):
                        dim = rows.shape[1]
                        for path, identity, row in zip(paths, identities, rows, strict=True):
                            copy.write_row((path, identity, str(row.tolist())))
                cursor.execute("INSERT INTO stored_part VALUES (%s)", [part])
            stored += 1
        if dim:
            database.execute(INDEX.format(dim=dim))
    print(f"{stored} parts stored, {len(parts) - stored} were there")


if __name__ == "__main__":
    main(*sys.argv[1:])
