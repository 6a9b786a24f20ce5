"""Rows of a unit in, one Parquet part out, whole or not at all; all parts in, one Parquet file out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.atomic import new_file
from arcface_clients.errors import DependencyMissing
from arcface_clients.extras import how_to_get
from arcface_clients.faces.images import Found

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT, VERSION = "arcface-embeddings", 1
ROW_GROUP_ROWS = 16_384  # 34 MB of 512-d embeddings; small enough to merge, large enough to scan


def schema(dim: int, contract_id: str | None, found: bool = False) -> pa.Schema:
    """Columns of the output, with those of detection where faces were `found` in photos.

    Format, version and contract id are in its metadata too.
    """
    pa = _pyarrow()
    columns = [
        ("path", pa.string()),
        ("identity", pa.string()),
        ("embedding", pa.list_(pa.float32(), dim)),
        ("contract_id", pa.dictionary(pa.int32(), pa.string())),
        ("digest", pa.binary(32)),  # sha256 of the face's pixels
    ]
    if found:
        columns += [
            ("score", pa.float32()),
            ("box", pa.list_(pa.float32(), 4)),  # x, y, width, height
            ("landmarks", pa.list_(pa.float32(), 10)),  # x, y of eye, eye, nose, mouth corners
        ]
    metadata = {"format": FORMAT, "version": str(VERSION), "contract_id": contract_id or ""}
    return pa.schema(columns, metadata=metadata)


def part_path(folder: Path, number: int) -> Path:
    """Where the part of a unit is, once it is written."""
    return folder / f"part-{number:08d}.parquet"


def write_part(
    path: Path,
    names: list[str],
    identities: list[str | None],
    embeddings: Array,
    digests: list[bytes],
    refused: list[tuple[str, str]],
    contract_id: str | None,
    found: Sequence[Found] | None = None,
) -> None:
    """Write a unit's rows and what was refused in it (in the metadata), atomically and synced to disk.

    Args:
        path: its final name.
        names: N.
        identities: N.
        embeddings: float32 (N,D).
        digests: N of 32 bytes.
        refused: (path, reason) of what gave no row.
        contract_id: of the engine.
        found: N, where the faces were found in photos.
    """
    pa = _pyarrow()
    import pyarrow.parquet as pq

    columns = schema(embeddings.shape[1], contract_id, found is not None)
    columns = columns.with_metadata({**columns.metadata, b"refused": json.dumps(refused).encode()})
    values = pa.array(np.ascontiguousarray(embeddings, np.float32).reshape(-1))
    arrays = [
        pa.array(names, pa.string()),
        pa.array(identities, pa.string()),
        pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1]),
        pa.array([contract_id] * len(names), pa.string()).dictionary_encode(),
        pa.array(digests, pa.binary(32)),
    ]
    if found is not None:
        boxes = np.array([each.box for each in found], np.float32).reshape(-1)
        landmarks = np.array([each.landmarks for each in found], np.float32).reshape(-1)
        arrays += [
            pa.array([each.score for each in found], pa.float32()),
            pa.FixedSizeListArray.from_arrays(pa.array(boxes), 4),
            pa.FixedSizeListArray.from_arrays(pa.array(landmarks), 10),
        ]
    with new_file(path) as temporary:
        pq.write_table(pa.Table.from_arrays(arrays, schema=columns), temporary, **_options())


def is_whole(path: Path) -> bool:
    """Whether a part is there and its footer can be read."""
    if not path.is_file():
        return False
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError):
        return False
    return True


def merge_parts(paths: Iterable[Path], output: Path, columns: pa.Schema) -> tuple[int, int]:
    """All parts as one file in row groups, and what they refused beside it; returns rows and refusals.

    One part is in memory at a time, and up to a row group of rows. Refusals go to `bad_path(output)`, which is there
    only if there are any; it gets its name before the output does.
    """
    pa = _pyarrow()
    import pyarrow.parquet as pq

    rows = bad = 0
    waiting: list[Any] = []
    held = 0
    with (
        new_file(output) as temporary,
        new_file(bad_path(output)) as bad_temporary,
        pq.ParquetWriter(temporary, columns, **_options()) as writer,
        bad_temporary.open("w") as bad_file,
    ):
        for path in paths:
            table = pq.read_table(path, memory_map=False)
            for name, reason in json.loads(table.schema.metadata[b"refused"]):
                bad_file.write(json.dumps({"path": name, "reason": reason}) + "\n")
                bad += 1
            rows += len(table)
            held += len(table)
            waiting.append(table.replace_schema_metadata(columns.metadata))
            if held >= ROW_GROUP_ROWS:
                _write_group(writer, waiting, pa)
                waiting, held = [], 0
        if held:
            _write_group(writer, waiting, pa)
    if not bad:
        bad_path(output).unlink()
    return rows, bad


def bad_path(output: Path) -> Path:
    """The side file: JSON lines {path, reason}."""
    return output.with_name(f"{output.name}.bad.jsonl")


def read_embeddings(path: Path | str) -> Iterator[tuple[list[str], list[str | None], Array]]:
    """(paths, identities, embeddings float32 (n,D)) of a finished file, a row group at a time."""
    _pyarrow()
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["path", "identity", "embedding"])
            column = table.column("embedding").combine_chunks()
            values = column.flatten().to_numpy(zero_copy_only=False)
            yield (
                table.column("path").to_pylist(),
                table.column("identity").to_pylist(),
                values.reshape(len(table), column.type.list_size),
            )


def _write_group(writer: Any, tables: list[Any], pa: Any) -> None:
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    writer.write_table(table, row_group_size=len(table))


def _options() -> dict[str, Any]:
    """Embeddings and digests do not compress: time spent on them is lost."""
    plain = {"embedding.list.element": "NONE", "digest": "NONE"}
    others = dict.fromkeys(("path", "identity", "contract_id"), "ZSTD")
    return {
        "compression": {**plain, **others},
        "use_dictionary": ["identity", "contract_id"],
        "write_statistics": ["path", "identity", "contract_id"],
    }


def _pyarrow() -> Any:
    try:
        import pyarrow as pa
    except ImportError as exc:
        raise DependencyMissing(f"Parquet needs pyarrow ({exc}). Next: {how_to_get('pyarrow')}") from exc
    return pa
