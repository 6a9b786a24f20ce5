"""Files and folders of a bulk job by path or URL: a path is this host's, a URL (s3://, gs:// …) an object store's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from arcface_clients.bulk.folders import Folder, LocalFolder
from arcface_clients.bulk.objects import ObjectFolder, ObjectStore
from arcface_clients.s3 import S3Options

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")


def is_url(path: str) -> bool:
    """Whether this is a URL, and not a path of this host."""
    return _URL.match(path) is not None


def plain(path: str) -> str:
    """The path of a file:// URL; anything else as it is."""
    return unquote(urlsplit(path).path) if path.startswith("file://") else path


@dataclass(frozen=True)
class Files:
    """Opens files and folders by path or URL; small enough to be sent to another process.

    Attributes:
        s3: how S3 is reached.
        patience_s: how long an object store that does not answer is asked again.
        below: the folder that relative paths of files count from; "": that in which a process works.
    """

    s3: S3Options = field(default_factory=S3Options)
    patience_s: float = 120.0
    below: str = ""

    @property
    def store(self) -> ObjectStore:
        """What opens URLs."""
        return ObjectStore(self.s3, self.patience_s)

    def folder(self, path: str) -> Folder:
        """A folder by path or URL; it need not exist."""
        path = plain(path)
        return ObjectFolder(path, self.store) if is_url(path) else LocalFolder(path)

    def open(self, path: str) -> IO[bytes]:
        """A file to read from, seekable.

        Raises:
            OSError: it is not there, or may not be read.
            StoreUnreachable: the object store does not answer.
        """
        path = plain(path)
        return self.store.open(path) if is_url(path) else Path(self.below, path).open("rb")

    def read(self, path: str) -> bytes:
        """A whole file; raises what `open` raises."""
        path = plain(path)
        return self.store.read(path) if is_url(path) else Path(self.below, path).read_bytes()


def walk_url(url: str, store: ObjectStore) -> Iterator[tuple[str, int]]:
    """Every file (URL, bytes) at or below a URL, sorted within each folder; one folder's names are in memory at a time.

    Names that begin with "_" or "." are left out below a folder, as every reader of data sets does.
    """
    if not url.endswith("/") and store.is_file(url):
        yield url, store.size(url)
        return
    objects, folders = store.listed(url)
    entries: list[tuple[str, int | None]] = [*objects, *((folder, None) for folder in folders)]
    for path, size in sorted(entries, key=lambda entry: entry[0]):
        if path.rsplit("/", 1)[1].startswith(("_", ".")):
            continue
        if size is None:
            yield from walk_url(f"{path}/", store)
        else:
            yield path, size
