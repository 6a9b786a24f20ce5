"""A unit in; its faces, one at a time, out: name, identity, and either the face or why there is none."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.contract import FACE_BYTES, FACE_SHAPE
from arcface_clients.errors import ArcFaceError, DependencyMissing, InvalidFaces
from arcface_clients.extras import how_to_get
from arcface_clients.faces.check import check_faces
from arcface_clients.faces.detect import detect_crops
from arcface_clients.faces.images import Found, decode_face, read_crops

if TYPE_CHECKING:
    import pyarrow.parquet as pq

    from arcface_clients.faces.detect import FaceDetector

READ_ROWS = 256  # 9.6 MB of faces at a time
FACE_COLUMNS = ("face", "image", "bytes")


@dataclass(frozen=True)
class Item:
    """One face of a unit; `face` is None where `refused` says why."""

    name: str
    identity: str | None
    face: Array | None
    refused: str = ""
    found: Found | None = None  # where a detector found it


def read_unit(unit: dict[str, Any], detector: FaceDetector | None = None) -> Iterator[Item]:
    """The items of a unit in order; with a detector, every face of each image file (`path[0]`, `path[1]` …)."""
    if unit["kind"] == "files":
        for path, identity, reason in unit["items"]:
            if reason:
                yield Item(path, identity, None, reason)
                continue
            for crop in detect_crops([path], detector) if detector else read_crops([path]):
                yield Item(crop.name, identity, crop.face, crop.refused, crop.found)
        return
    rows = _array_rows if unit["kind"] == "array" else _parquet_rows
    done = unit["start"]
    try:
        for item in rows(unit["path"], unit["start"], unit["stop"]):
            yield item
            done += 1
    except DependencyMissing:
        raise
    except (ArcFaceError, OSError, ValueError, EOFError, zipfile.BadZipFile) as exc:
        for row in range(done, unit["stop"]):
            yield Item(f"{unit['path']}[{row}]", None, None, f"the file became unreadable here ({exc})")


def count_rows(kind: str, path: str) -> int:
    """Faces in an array or Parquet file, from its header alone.

    Raises:
        InvalidFaces: it holds no faces, or is damaged.
        OSError: it cannot be read.
    """
    if kind == "array":
        with _open_array(path) as array:
            return array.count
    with _open_parquet(path) as file:
        _face_column(file, path)
        return int(file.metadata.num_rows)


@dataclass
class _Array:
    """An open .npy, or the array in a .npz, positioned at its first face."""

    file: IO[bytes]
    container: zipfile.ZipFile | None
    count: int
    item_bytes: int
    dtype: np.dtype[Any]

    def __enter__(self) -> _Array:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.container:
            self.container.close()


def _open_array(path: str) -> _Array:
    """Reads the header only: an .npz of a million faces (37 GB) is never loaded."""
    container: zipfile.ZipFile | None = None
    try:
        if path.lower().endswith(".npz"):
            container = zipfile.ZipFile(path)
            names = [name for name in container.namelist() if name == "faces.npy"] or container.namelist()
            if len(names) != 1:
                raise InvalidFaces(f"expected an array `faces` in it, found: {', '.join(names) or 'nothing'}")
            file: IO[bytes] = container.open(names[0])
        else:
            file = Path(path).open("rb")  # noqa: SIM115  closed by _Array
        npy: Any = np.lib.format  # NumPy has no types for it
        version = npy.read_magic(file)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = header(file)
    except (ValueError, EOFError, zipfile.BadZipFile) as exc:
        if container:
            container.close()
        raise InvalidFaces(str(exc) if isinstance(exc, InvalidFaces) else f"not a NumPy file ({exc})") from exc
    if len(shape) != 4 or shape[1:] != FACE_SHAPE or fortran or dtype.hasobject:
        raise InvalidFaces(f"expected faces of shape (N, 112, 112, 3) in C order, got {dtype} {shape}")
    return _Array(file, container, shape[0], FACE_BYTES * dtype.itemsize, dtype)


def _array_rows(path: str, start: int, stop: int) -> Iterator[Item]:
    with _open_array(path) as array:
        array.file.seek(start * array.item_bytes, 1)  # of a compressed .npz this reads, and drops, what is before
        for first in range(start, stop, READ_ROWS):
            count = min(READ_ROWS, stop - first)
            data = array.file.read(count * array.item_bytes)
            if len(data) != count * array.item_bytes:
                raise InvalidFaces("cut off")
            faces = np.frombuffer(data, array.dtype).reshape(count, *FACE_SHAPE)
            for row, face in enumerate(faces, start=first):
                yield _checked(f"{path}[{row}]", None, face)


def _open_parquet(path: str) -> pq.ParquetFile:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise DependencyMissing(f"Parquet needs pyarrow ({exc}). Next: {how_to_get('pyarrow')}") from exc
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as exc:
        raise InvalidFaces(f"not a Parquet file, or cut off ({exc})") from exc


def _face_column(file: pq.ParquetFile, path: str) -> str:
    names = file.schema_arrow.names
    found = [name for name in FACE_COLUMNS if name in names]
    if not found:
        raise InvalidFaces(
            f"{path} has the columns {', '.join(names)}: expected one of {', '.join(FACE_COLUMNS)} with encoded images "
            "or raw 112×112×3 bytes (BGR)"
        )
    return found[0]


def _parquet_rows(path: str, start: int, stop: int) -> Iterator[Item]:
    with _open_parquet(path) as file:
        column = _face_column(file, path)
        names = [name for name in ("path", "identity") if name in file.schema_arrow.names]
        groups, before = [], 0
        skip = start
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if before + rows <= start:
                skip -= rows
            elif before < stop:
                groups.append(group)
            before += rows
        row = start - skip
        for batch in file.iter_batches(READ_ROWS, row_groups=groups, columns=[column, *names]):
            for record in batch.to_pylist():
                if start <= row < stop:
                    name, identity = record.get("path"), record.get("identity")  # numbers in many a data set
                    name = f"{path}[{row}]" if name in (None, "") else str(name)
                    yield _decoded(name, None if identity is None else str(identity), record[column])
                row += 1


def _decoded(name: str, identity: str | None, data: bytes | None) -> Item:
    """A face from raw BGR bytes or from an encoded image."""
    if isinstance(data, bytes) and len(data) == FACE_BYTES:
        return Item(name, identity, np.frombuffer(data, np.uint8).reshape(FACE_SHAPE))
    if not isinstance(data, bytes):
        return Item(name, identity, None, "no bytes in this row")
    try:
        return Item(name, identity, decode_face(np.frombuffer(data, np.uint8)))
    except InvalidFaces as exc:
        return Item(name, identity, None, str(exc))


def _checked(name: str, identity: str | None, face: Array) -> Item:
    try:
        return Item(name, identity, check_faces(face)[0])
    except InvalidFaces as exc:
        return Item(name, identity, None, str(exc))
