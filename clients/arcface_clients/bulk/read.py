"""A unit in; its faces, one at a time, out: name, identity, and either the face or why there is none."""

from __future__ import annotations

import struct
import zipfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from arcface_clients.arrays import DAMAGED, Array
from arcface_clients.bulk.files import Files, is_url
from arcface_clients.bulk.tars import read_samples
from arcface_clients.contract import FACE_BYTES, FACE_SHAPE
from arcface_clients.errors import ArcFaceError, DependencyMissing, InvalidFaces, StoreUnreachable
from arcface_clients.extras import importing
from arcface_clients.faces.check import check_faces
from arcface_clients.faces.detect import CROPS_NOT_PHOTOS, detect_in
from arcface_clients.faces.images import Found, decode_face

if TYPE_CHECKING:
    import pyarrow.parquet as pq

    from arcface_clients.faces.detect import FaceDetector

READ_ROWS = 256  # 9.6 MB of faces at a time
READERS = 16  # objects fetched at a time, where each image is an object: a store answers late, not slowly
FACE_COLUMNS = ("face", "image", "bytes")


@dataclass(frozen=True)
class Item:
    """One face of a unit; `face` is None where `refused` says why."""

    name: str
    identity: str | None
    face: Array | None
    refused: str = ""
    found: Found | None = None  # where a detector found it


@dataclass(frozen=True)
class Raw:
    """One entry of a source: an encoded image, or a face as it is, or why there is neither."""

    name: str
    identity: str | None
    data: bytes | Array | None
    refused: str = ""


def read_unit(unit: dict[str, Any], detector: FaceDetector | None = None, files: Files | None = None) -> Iterator[Item]:
    """The items of a unit in order; with a detector, every face of each photo (`path[0]`, `path[1]` …).

    Raises:
        What `read_raw` raises.
    """
    for raw in read_raw(unit, files):
        if detector is None:
            yield face_of(raw)
        elif isinstance(raw.data, bytes):
            for crop in detect_in(raw.name, raw.data, detector):
                yield Item(crop.name, raw.identity, crop.face, crop.refused, crop.found)
        else:
            yield no_photo(raw)


def read_raw(unit: dict[str, Any], files: Files | None = None) -> Iterator[Raw]:
    """The entries of a unit in order, as its sources hold them.

    A damaged file costs the rows from the damage on, each listed with the reason.

    Raises:
        StoreUnreachable: the object store does not answer; nothing is refused for that.
        DependencyMissing: a package that reads this kind of source is missing.
    """
    done = 0
    try:
        for raw in _SOURCES[unit["kind"]](unit, files or Files()):
            yield raw
            done += 1
    except (DependencyMissing, StoreUnreachable):
        raise
    except (ArcFaceError, OSError, *DAMAGED) as exc:
        if unit["kind"] == "files":  # each is refused alone, so this is no file's fault
            raise
        why = f"the file became unreadable here ({exc})"
        if "stop" not in unit:
            yield Raw(unit["path"], None, None, why)
            return
        for row in range(unit["start"] + done, unit["stop"]):
            yield Raw(f"{unit['path']}[{row}]", None, None, why)


def face_of(raw: Raw) -> Item:
    """An entry that is an aligned face, or nothing."""
    if raw.data is None:
        return Item(raw.name, raw.identity, None, raw.refused or "no bytes in this row")
    try:
        return Item(raw.name, raw.identity, _face(raw.data))
    except InvalidFaces as exc:
        return Item(raw.name, raw.identity, None, str(exc))


def no_photo(raw: Raw) -> Item:
    """An entry without a file's bytes, where photos are wanted."""
    return face_of(raw) if raw.data is None else Item(raw.name, raw.identity, None, CROPS_NOT_PHOTOS)


def _face(data: bytes | Array) -> Array:
    """A face from an array, from raw BGR bytes or from an encoded image."""
    if not isinstance(data, bytes):
        checked: Array = check_faces(data)[0]
        return checked
    if len(data) == FACE_BYTES:
        return np.frombuffer(data, np.uint8).reshape(FACE_SHAPE)
    return decode_face(np.frombuffer(data, np.uint8))


def _file_rows(unit: dict[str, Any], files: Files) -> Iterator[Raw]:
    entries = iter(unit["items"])
    if not any(is_url(path) for path, _, _ in unit["items"]):
        for entry in entries:
            yield _whole(entry, files)
        return
    with ThreadPoolExecutor(READERS, thread_name_prefix="arcface-read") as pool:
        ahead: deque[Future[Raw]] = deque(pool.submit(_whole, entry, files) for entry in islice(entries, 2 * READERS))
        try:
            while ahead:
                raw = ahead.popleft().result()
                ahead.extend(pool.submit(_whole, entry, files) for entry in islice(entries, 1))
                yield raw
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _whole(entry: tuple[str, str | None, str], files: Files) -> Raw:
    path, identity, reason = entry
    if reason:
        return Raw(path, identity, None, reason)
    try:
        return Raw(path, identity, files.read(path))
    except OSError as exc:
        return Raw(path, identity, None, exc.strerror or str(exc))


def _tar_rows(unit: dict[str, Any], files: Files) -> Iterator[Raw]:
    with files.open(unit["path"]) as file:
        for sample in read_samples(file, unit["offset"], unit.get("count")):
            yield Raw(f"{unit['path']}/{sample.name}", sample.identity, sample.image, "no image in this sample")


def count_rows(kind: str, path: str, files: Files | None = None) -> int:
    """Faces in an array or Parquet file, from its header alone.

    Raises:
        InvalidFaces: it holds no faces, or is damaged.
        OSError, StoreUnreachable: it cannot be read.
    """
    files = files or Files()
    if kind == "array":
        with _open_array(path, files) as array:
            return array.count
    with files.open(path) as source, _open_parquet(source) as file:
        _face_column(file, path)
        return int(file.metadata.num_rows)


@dataclass
class _Array:
    """An open .npy, or the array in a .npz, positioned at its first face."""

    opened: list[Any]  # to be closed, the last first
    file: IO[bytes]
    count: int
    item_bytes: int
    dtype: np.dtype[Any]

    def __enter__(self) -> _Array:
        return self

    def __exit__(self, *_: object) -> None:
        _close(self.opened)


def _close(opened: list[Any]) -> None:
    for each in reversed(opened):
        each.close()


def _open_array(path: str, files: Files) -> _Array:
    """Reads the header only: an .npz of a million faces (37 GB) is never loaded."""
    opened: list[Any] = [files.open(path)]
    file: IO[bytes] = opened[0]
    try:
        if path.lower().endswith(".npz"):
            container = zipfile.ZipFile(file)
            opened.append(container)
            names = [name for name in container.namelist() if name == "faces.npy"] or container.namelist()
            if len(names) != 1:
                raise InvalidFaces(f"expected an array `faces` in it, found: {', '.join(names) or 'nothing'}")
            file = _member(container, container.getinfo(names[0]), file)
            opened.append(file)
        npy: Any = np.lib.format  # NumPy has no types for it
        version = npy.read_magic(file)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = header(file)
        if len(shape) != 4 or shape[1:] != FACE_SHAPE or fortran or dtype.hasobject:
            raise InvalidFaces(f"expected faces of shape (N, 112, 112, 3) in C order, got {dtype} {shape}")
    except DAMAGED as exc:
        _close(opened)
        raise InvalidFaces(str(exc) if isinstance(exc, InvalidFaces) else f"not a NumPy file ({exc})") from exc
    except BaseException:
        _close(opened)
        raise
    return _Array(opened, file, shape[0], FACE_BYTES * dtype.itemsize, dtype)


def _member(container: zipfile.ZipFile, info: zipfile.ZipInfo, file: IO[bytes]) -> IO[bytes]:
    """A member of a .npz to read from; where it is stored as it is, the file itself at the member's first byte.

    zipfile reads all that is before a position that is sought, which is a download where the file is an object.
    """
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        return container.open(info)
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise zipfile.BadZipFile("damaged header")
    name, extra = struct.unpack("<HH", header[26:30])
    file.seek(info.header_offset + 30 + name + extra)
    return file


def _array_rows(unit: dict[str, Any], files: Files) -> Iterator[Raw]:
    path, start, stop = unit["path"], unit["start"], unit["stop"]
    with _open_array(path, files) as array:
        array.file.seek(start * array.item_bytes, 1)  # of a compressed .npz this reads, and drops, what is before
        for first in range(start, stop, READ_ROWS):
            count = min(READ_ROWS, stop - first)
            data = array.file.read(count * array.item_bytes)
            if len(data) != count * array.item_bytes:
                raise InvalidFaces("cut off")
            faces = np.frombuffer(data, array.dtype).reshape(count, *FACE_SHAPE)
            for row, face in enumerate(faces, start=first):
                yield Raw(f"{path}[{row}]", None, face)


@contextmanager
def _open_parquet(source: IO[bytes]) -> Iterator[pq.ParquetFile]:
    """A Parquet file; what pyarrow says of a damaged one, also while it is read, becomes InvalidFaces."""
    with importing("Parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    try:
        with pq.ParquetFile(source) as file:
            yield file
    except pa.ArrowException as exc:
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


def _parquet_rows(unit: dict[str, Any], files: Files) -> Iterator[Raw]:
    path, start, stop = unit["path"], unit["start"], unit["stop"]
    with files.open(path) as source, _open_parquet(source) as file:
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
                    data = record[column]
                    bytes_or_none = data if isinstance(data, bytes) else None
                    yield Raw(name, None if identity is None else str(identity), bytes_or_none)
                row += 1


_SOURCES = {"files": _file_rows, "array": _array_rows, "parquet": _parquet_rows, "tar": _tar_rows}
