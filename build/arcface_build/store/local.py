"""An object store in a folder: the cache on this host, or a store on a shared disk."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arcface_build.errors import StoreUnreachable
from arcface_build.store.objects import Progress, Stored
from arcface_clients.atomic import new_file
from arcface_clients.errors import PlanRefused, WrongUse

_BLOCK = 1 << 20


class LocalStore:
    """A folder, created on the first write. It reserves names that begin with a dot (temporary files, locks)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)

    def stored(self, prefix: str = "") -> list[Stored]:
        """Files whose names begin with `prefix`, sorted; an absent folder is an empty store."""
        found = []
        with _named(self.url):
            for path in self.folder.rglob("*"):
                relative = path.relative_to(self.folder)
                if any(part.startswith(".") for part in relative.parts) or not relative.as_posix().startswith(prefix):
                    continue
                with contextlib.suppress(FileNotFoundError):  # another process removed it meanwhile
                    if path.is_file():
                        status = path.stat()
                        found.append(Stored(relative.as_posix(), status.st_size, status.st_mtime))
        return sorted(found)

    def read(self, name: str, limit_bytes: int) -> bytes | None:
        """The beginning of a file, or None."""
        with _named(self.url):
            try:
                with self._inside(name).open("rb") as file:
                    return file.read(limit_bytes)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def download(self, name: str, file: Path, progress: Progress | None = None) -> bool:
        """Copy a file out of the store."""
        with _named(self.url):
            try:
                _copy(self._inside(name), file, progress)
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def upload(self, file: Path, name: str, progress: Progress | None = None) -> None:
        """Copy a file into the store, atomically."""
        with _named(self.url), new_file(self.path(name)) as temporary:
            _copy(file, temporary, progress)

    def create(self, name: str, data: bytes) -> bool:
        """Link a finished temporary file to the name; fails if the name exists, on network disks too."""
        path = self.path(name)
        with _named(self.url):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).chmod(0o644)
                os.link(temporary, path)
            except FileExistsError:
                return False
            finally:
                Path(temporary).unlink(missing_ok=True)
        return True

    def delete(self, name: str) -> None:
        """Remove a file, and any folders that become empty."""
        path = self.path(name)
        with _named(self.url):
            path.unlink(missing_ok=True)
            for folder in path.parents:
                if folder == self.folder or not folder.is_relative_to(self.folder):
                    break
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()

    def sweep(self, prefix: str) -> None:
        """Remove leftovers of interrupted writers under `prefix`; only for the holder of that prefix's lock."""
        with _named(self.url):
            for path in list(self.path(prefix).rglob(".*")):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """Path of an object, for programs that need a file.

        Raises:
            WrongUse: the name leads out of the folder.
        """
        if name.startswith("/") or ".." in name.split("/"):
            raise WrongUse(f"object name is {name!r}: expected a relative path without '..'.")
        return self.folder / name

    def _inside(self, name: str) -> Path:
        """The file of this name, if it is a regular file inside the folder.

        Raises:
            PlanRefused: it is a link out of the store, or a pipe, a device, a folder.
            FileNotFoundError: there is none.
        """
        path = self.path(name)
        real = path.resolve()
        if not real.is_relative_to(self.folder.resolve()):
            raise PlanRefused(f"{path} is a link out of the store, to {real}. Delete it: rm {path}")
        if real.exists() and not real.is_file():
            raise PlanRefused(f"{path} is not a file. Delete it.")
        return real


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Map errors of the file system to ours, with the store's name."""
    try:
        yield
    except OSError as exc:
        raise disk_error(exc, url) from exc


def disk_error(exc: OSError, where: str) -> StoreUnreachable:
    """Our error for one of the file system: which folder, what went wrong, what to do."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        reason, step = "the disk is full", "Free some space: arcface plan gc"
    elif exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason, step = "this user may not read or write it", "Choose another folder: --cache FOLDER"
    else:
        reason, step = "the file system refused", "Choose another folder: --cache FOLDER"
    return StoreUnreachable(f"{where}: {reason} ({exc.strerror or exc}). {step}")


def _copy(source: Path, target: Path, progress: Progress | None) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(_BLOCK):
            writer.write(block)
            if progress:
                progress(len(block))
