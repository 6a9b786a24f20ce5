"""WebDataset shards, as img2dataset writes them: neighbouring members of one base name are a sample.

Of a sample the image is taken (.jpg, .png, .webp …), and its identity from .cls (text) or the key `identity` or `label`
of .json; captions and other members are skipped.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from arcface_clients.errors import InvalidFaces
from arcface_clients.faces.images import IMAGE_SUFFIXES

TAR_SUFFIXES = (".tar",)
WHOLE_BYTES = 1 << 30  # an object up to this size is one unit: to find the samples in it, all of it has to be read


@dataclass(frozen=True)
class Sample:
    """One sample: the image's member name and bytes; no bytes where it has no image."""

    name: str
    identity: str | None
    image: bytes | None


def read_samples(file: IO[bytes], offset: int = 0, count: int | None = None) -> Iterator[Sample]:
    """The samples from a byte `offset` on, which must be the first header of one; all, or the first `count`.

    Raises:
        InvalidFaces: no tar file, or damaged or cut off.
        OSError: it cannot be read.
    """
    file.seek(offset)
    key: str | None = None
    name, identity, image = "", None, None
    given = 0
    for shard, member in _members(file):
        if _key(member.name) != key:
            if key is not None:
                yield Sample(name, identity, image)
                given += 1
                if given == count:
                    return
            key, name, identity, image = _key(member.name), member.name, None, None
        suffix = f".{member.name.rpartition('.')[2].lower()}"
        if suffix in IMAGE_SUFFIXES and image is None:
            name, image = member.name, _content(shard, member)
        elif suffix in (".cls", ".json"):
            identity = _identity(suffix, _content(shard, member)) or identity
    if key is not None:
        yield Sample(name, identity, image)


def index_samples(file: IO[bytes], rows: int) -> Iterator[tuple[int, int]]:
    """(byte offset, samples) of each run of up to `rows` samples; reads the headers alone where the file can seek.

    Raises:
        InvalidFaces: no tar file, or damaged or cut off.
        OSError: it cannot be read.
    """
    key: str | None = None
    offset = count = 0
    try:
        for _, member in _members(file):
            if _key(member.name) == key:
                continue
            key = _key(member.name)
            if count == rows:
                yield offset, count
                count = 0
            if not count:
                offset = member.offset
            count += 1
    except InvalidFaces:
        if count:
            yield offset, count
        raise
    if count:
        yield offset, count


def _members(file: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The files of a shard; the list that tarfile keeps of them is emptied."""
    try:
        with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as shard:
            while (member := shard.next()) is not None:
                shard.members = []  # type: ignore[attr-defined]  # a million of them would stay
                if member.isfile():
                    yield shard, member
            file.seek(shard.offset)  # tarfile takes a damaged header for the end
            if file.read(512).strip(b"\0"):
                raise InvalidFaces("damaged, or cut off")
    except (tarfile.TarError, EOFError) as exc:
        raise InvalidFaces(f"no tar file, or cut off ({exc})") from exc


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = shard.extractfile(member)
    try:
        data = file.read() if file else b""
    except tarfile.TarError as exc:
        raise InvalidFaces(f"cut off in {member.name}") from exc
    return data


def _key(name: str) -> str:
    """The path up to the first dot of its last part, as WebDataset groups."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _identity(suffix: str, data: bytes) -> str | None:
    try:
        text = data.decode()
        if suffix == ".cls":
            return text.strip() or None
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    values = (record.get(name) for name in ("identity", "label")) if isinstance(record, dict) else ()
    return next((str(value) for value in values if isinstance(value, (str, int))), None)
