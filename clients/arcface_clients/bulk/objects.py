"""Object stores by URL (s3://, gs:// …), through pyarrow's file systems.

What is written is there whole or not at all, because an upload shows only when it is complete. Credentials never
travel, each host uses its own.
"""

from __future__ import annotations

import io
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from arcface_clients.bulk.folders import Folder
from arcface_clients.errors import StoreUnreachable, WrongUse
from arcface_clients.extras import importing
from arcface_clients.s3 import S3Options

T = TypeVar("T")
_READ_BYTES = 1 << 20  # of an object at a time
_FINAL = re.compile(  # what asking again does not change, in the words of pyarrow's AWS and GCS clients
    r"ACCESS_DENIED|NO_SUCH_BUCKET|NO_SUCH_KEY|INVALID_ACCESS_KEY|InvalidAccessKeyId|SIGNATURE|SignatureDoesNotMatch"
    r"|INVALID_CLIENT_TOKEN|PERMISSION_DENIED|HTTP status 40[0134]|HTTP status 301|[Nn]o credentials|not authori[sz]ed"
)


@dataclass(frozen=True)
class ObjectStore:
    """Reads objects by URL, lists them, and asks again while a store does not answer.

    Attributes:
        s3: how S3 is reached.
        patience_s: how long an object store that does not answer is asked again.
    """

    s3: S3Options
    patience_s: float

    def open(self, url: str) -> IO[bytes]:
        """An object to read from, seekable."""
        return io.BufferedReader(_Object(url, self), _READ_BYTES)

    def read(self, url: str) -> bytes:
        """A whole object."""
        filesystem, key = self.filesystem(url)

        def fetch() -> bytes:
            with filesystem.open_input_stream(key, compression=None) as stream:
                return bytes(stream.read())

        return self.patiently(url, fetch)

    def size(self, url: str) -> int:
        """Bytes in an object."""
        filesystem, key = self.filesystem(url)
        info = self.patiently(url, lambda: filesystem.get_file_info(key))
        if info.size is None:
            raise FileNotFoundError(2, os.strerror(2), url)
        return int(info.size)

    def listed(self, url: str) -> tuple[list[tuple[str, int]], list[str]]:
        """The files (URL, bytes) and the folders (URL) directly in the folder of a URL, sorted."""
        filesystem, key = self.filesystem(url)
        fs = _pyarrow_fs()
        selector = fs.FileSelector(key.rstrip("/"), allow_not_found=True)
        base = url[: len(url) - len(key)]
        found = self.patiently(url, lambda: filesystem.get_file_info(selector))
        files = sorted((base + each.path, int(each.size)) for each in found if each.type == fs.FileType.File)
        folders = sorted(base + each.path for each in found if each.type == fs.FileType.Directory)
        return files, folders

    def is_file(self, url: str) -> bool:
        """Whether a URL names an object."""
        filesystem, key = self.filesystem(url)
        fs = _pyarrow_fs()
        return bool(self.patiently(url, lambda: filesystem.get_file_info(key)).type == fs.FileType.File)

    def filesystem(self, url: str) -> tuple[Any, str]:
        """pyarrow's file system for a URL, and the key in it (bucket first)."""
        scheme, _, key = url.partition("://")
        return _filesystem(scheme, url if scheme not in ("s3", "gs") else "", self.s3), key

    def patiently(self, what: str, ask: Callable[[], T]) -> T:
        """The answer of an object store, asked again with growing pauses while it does not answer.

        Raises:
            StoreUnreachable: it did not for `patience_s`, or it refuses.
            OSError: there is no such object.
        """
        give_up_s = time.monotonic() + self.patience_s
        for attempt in range(1 << 16):
            try:
                return ask()
            except FileNotFoundError:
                raise
            except OSError as exc:
                wait_s = random.uniform(0.05, min(10.0, 0.2 * 2 ** min(attempt, 8)))
                if _FINAL.search(str(exc)) or time.monotonic() + wait_s > give_up_s:
                    raise StoreUnreachable(
                        f"{what}: the object store refuses or does not answer ({_short(exc)}). Check the bucket, "
                        "AWS_ACCESS_KEY_ID, AWS_PROFILE and storage.endpoint; what is done is kept"
                    ) from exc
                time.sleep(wait_s)
        raise AssertionError("unreachable")


class ObjectFolder(Folder):
    """A prefix of a bucket. Nothing is renamed: an object is there once its upload is complete."""

    def __init__(self, path: str, store: ObjectStore) -> None:
        super().__init__(path)
        self._store = store
        _, _, key = self.path.partition("://")
        if not key:
            raise WrongUse(f"{path} names no bucket: expected s3://bucket/folder/")

    def names(self, below: str = "") -> dict[str, int]:
        """See `Folder`."""
        files, _ = self._store.listed(self.of(below) if below else self.path)
        return {url.rsplit("/", 1)[1]: size for url, size in files}

    def read(self, name: str) -> bytes | None:
        """See `Folder`."""
        try:
            return self._store.read(self.of(name))
        except FileNotFoundError:
            return None

    def has(self, name: str) -> bool:
        """See `Folder`."""
        return self._store.is_file(self.of(name))

    def write(self, name: str, data: bytes) -> None:
        """See `Folder`. pyarrow completes an upload that an exception interrupts, so all of it goes in one write."""
        url = self.of(name)
        filesystem, key = self._store.filesystem(url)

        def put() -> None:
            stream = filesystem.open_output_stream(key, compression=None)
            stream.write(data)
            stream.close()
            size = filesystem.get_file_info(key).size
            if size != len(data):
                raise OSError(f"{size} of {len(data)} bytes arrived")

        self._store.patiently(url, put)

    def delete(self, name: str) -> None:
        """See `Folder`."""
        url = self.of(name)
        filesystem, key = self._store.filesystem(url)

        def remove() -> None:
            filesystem.delete_file(key)

        try:
            self._store.patiently(url, remove)
        except FileNotFoundError:
            return


class _Object(io.RawIOBase):
    """An object to read from; a connection that is cut is opened again where it was."""

    def __init__(self, url: str, store: ObjectStore) -> None:
        self._url, self._store = url, store
        self._filesystem, self._key = store.filesystem(url)
        self._file = store.patiently(url, lambda: self._filesystem.open_input_file(self._key))
        self._at, self._size = 0, int(self._file.size())

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), self._size - self._at)
        if count <= 0:
            return 0
        data = self._store.patiently(self._url, lambda: self._file.read_at(count, self._at))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


@lru_cache(maxsize=16)
def _filesystem(scheme: str, url: str, options: S3Options) -> Any:
    fs = _pyarrow_fs()
    if scheme == "s3":
        endpoint = urlsplit(options.endpoint) if options.endpoint else None
        where = {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme or "https"} if endpoint else {}
        region = options.region or os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION")
        return fs.S3FileSystem(
            region=region or ("us-east-1" if endpoint else None),
            force_virtual_addressing=not options.is_path_style,
            request_timeout=options.read_timeout_s,
            connect_timeout=options.connect_timeout_s,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=options.max_attempts),
            background_writes=False,  # an upload has failed when `write` or `close` raises, never later
            allow_delayed_open=True,  # one request for what fits one
            **where,
        )
    if scheme == "gs":
        return fs.GcsFileSystem()
    try:
        return fs.FileSystem.from_uri(url)[0]
    except (ValueError, OSError) as exc:
        raise WrongUse(f"{url}: pyarrow knows no such place ({exc}): expected a path, s3:// or gs://") from exc


def _pyarrow_fs() -> Any:
    with importing("reading and writing object stores"):
        import pyarrow.fs
    return pyarrow.fs


def _short(exc: OSError) -> str:
    return str(exc).split(" (Request ID")[0][:300]
