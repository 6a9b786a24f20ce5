"""The Parquet of a job: a unit's rows as a part, what a part says of itself, all parts as one file, reading them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.atomic import new_file
from arcface_clients.bulk.files import Files, is_url
from arcface_clients.bulk.folders import Folder
from arcface_clients.errors import WrongUse
from arcface_clients.extras import importing
from arcface_clients.faces.images import Found

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT, VERSION = "arcface-embeddings", 1
Group = tuple[list[str], "list[str | None]", Array]  # paths, identities, embeddings
SUCCESS = "_SUCCESS"  # in a data set: JSON of what is in it, written last
ROW_GROUP_ROWS = 16_384  # 34 MB of 512-d embeddings; small enough to merge, large enough to scan


def schema(dim: int, contract_id: str | None, found: bool = False, detector_id: str | None = None) -> pa.Schema:
    """Columns of the output, with those of detection where faces were `found` in photos.

    Format, version, contract id and the detector's are in its metadata too.
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
    metadata |= {} if detector_id is None else {"detector_id": detector_id}
    return pa.schema(columns, metadata=metadata)


def part_name(number: int) -> str:
    """The name of a unit's part."""
    return f"part-{number:08d}.parquet"


def refused_name(number: int) -> str:
    """The name of the list of what a unit refused: JSON lines {path, reason}; there only if there is any."""
    return f"_refused/{number:08d}.jsonl"


@dataclass(frozen=True)
class Part:
    """What a part says of itself in its footer."""

    rows: int
    refused: int
    contract_id: str | None
    set_aside: str = ""  # why the unit was given up; "": it was not
    detector_id: str | None = None  # None: crops, or it does not say


def put_part(folder: Folder, number: int, part: bytes, refused: Sequence[tuple[str, str]]) -> None:
    """Write what a unit refused, then its part; the part is the commit, so the list is there when it is."""
    if refused:
        lines = (json.dumps({"path": _text(name), "reason": reason}) + "\n" for name, reason in refused)
        folder.write(refused_name(number), "".join(lines).encode())
    folder.write(part_name(number), part)


def part_bytes(
    names: list[str],
    identities: list[str | None],
    embeddings: Array,
    digests: list[bytes],
    part: Part,
    found: Sequence[Found] | None = None,
) -> bytes:
    """A unit's rows as a Parquet file.

    Args:
        names: N.
        identities: N.
        embeddings: float32 (N,D).
        digests: N of 32 bytes.
        part: what it says of itself.
        found: N, where the faces were found in photos.
    """
    pa = _pyarrow()
    import pyarrow.parquet as pq

    columns = schema(embeddings.shape[1], part.contract_id, found is not None, part.detector_id)
    own = {"refused": str(part.refused), "set_aside": part.set_aside}
    columns = columns.with_metadata({**columns.metadata, **{k.encode(): v.encode() for k, v in own.items()}})
    values = pa.array(np.ascontiguousarray(embeddings, np.float32).reshape(-1))
    arrays = [
        pa.array(map(_text, names), pa.string()),
        pa.array((None if name is None else _text(name) for name in identities), pa.string()),
        pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1]),
        pa.array([part.contract_id] * len(names), pa.string()).dictionary_encode(),
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
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=columns), sink, **_options())
    return bytes(sink.getvalue())


def look_at_part(source: IO[bytes]) -> Part | None:
    """What the footer of a part says; None if it is torn or none of ours.

    The footer must fit the file's size: an upload in pieces that lost one in the middle has a footer too.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer = pq.read_metadata(source)
        told = footer.metadata
        if _bytes_of(footer) != source.seek(0, 2):
            return None
        return Part(
            footer.num_rows,
            int(told[b"refused"]),
            told[b"contract_id"].decode() or None,
            told[b"set_aside"].decode(),
            told.get(b"detector_id", b"").decode() or None,
        )
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None


def _text(name: str) -> str:
    r"""A name as Parquet can hold it: bytes of a file's name that are no UTF-8 are written as \xe9."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _bytes_of(footer: Any) -> int:
    """The size of a Parquet file by its footer: the last column's end, the footer, its length and the magic number."""
    end = 4
    for group in map(footer.row_group, range(footer.num_row_groups)):
        for column in map(group.column, range(footer.num_columns)):
            first = column.dictionary_page_offset or column.data_page_offset
            end = max(end, min(first, column.data_page_offset) + column.total_compressed_size)
    return int(end + footer.serialized_size + 8)


def merge_parts(folder: Folder, count: int, output: Path, columns: pa.Schema) -> None:
    """The first `count` parts as one file in row groups, and what they refused beside it.

    One part is in memory at a time, and up to a row group of rows. Refusals go to `bad_path(output)`, which is there
    only if there are any; it gets its name before the output does.
    """
    pa = _pyarrow()
    import pyarrow.parquet as pq

    waiting: list[Any] = []
    held = bad = 0
    with (
        new_file(output) as temporary,
        new_file(bad_path(output)) as bad_temporary,
        pq.ParquetWriter(temporary, columns, **_options()) as writer,
        bad_temporary.open("wb") as bad_file,
    ):
        for number in range(count):
            table = pq.read_table(folder.of(part_name(number)), memory_map=False)
            if int(table.schema.metadata[b"refused"]):
                bad += bad_file.write(folder.read(refused_name(number)) or b"")
            held += len(table)
            waiting.append(table.replace_schema_metadata(columns.metadata))
            if held >= ROW_GROUP_ROWS:
                _write_group(writer, waiting, pa)
                waiting, held = [], 0
        if held:
            _write_group(writer, waiting, pa)
    if not bad:
        bad_path(output).unlink()


def bad_path(output: Path) -> Path:
    """The side file of a one-file output: JSON lines {path, reason}."""
    return output.with_name(f"{output.name}.bad.jsonl")


def read_embeddings(
    path: Path | str, files: Files | None = None
) -> Iterator[tuple[list[str], list[str | None], Array]]:
    """(paths, identities, embeddings float32 (n,D)) of a finished file or data set, a row group at a time.

    Raises:
        WrongUse: a data set that is not finished.
        OSError, StoreUnreachable: it cannot be read.
    """
    files = files or Files()
    for part in parts_of(str(path), files):
        with files.open(part) as source:
            yield from _groups(source)


def parts_of(path: str, files: Files | None = None) -> list[str]:
    """The Parquet files of an output: itself, or the parts of a finished data set in their order.

    Raises:
        WrongUse: a data set that is not finished.
    """
    if not (is_url(path) or Path(path).is_dir()) or path.lower().endswith(".parquet"):
        return [path]
    folder = (files or Files()).folder(path)
    if not folder.has(SUCCESS):
        raise WrongUse(f"{path} is not finished: expected {SUCCESS} in it. Run the same `arcface embed` again")
    return [folder.of(name) for name in sorted(folder.names()) if is_part(name)]


def is_part(name: str) -> bool:
    """Whether this is a part's name."""
    return name.startswith("part-") and name.endswith(".parquet")


def _groups(source: IO[bytes]) -> Iterator[Group]:
    _pyarrow()
    import pyarrow.parquet as pq

    with pq.ParquetFile(source) as file:
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
    with importing("Parquet"):
        import pyarrow as pa
    return pa
