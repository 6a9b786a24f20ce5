"""Atomic writes: a file or folder appears complete or not at all, even if its writer is killed.

Temporary names begin with a dot and contain the writer's process id, so the next writer can remove a dead one's files.
A writer in another container, or on another host with the same folder, is told by the lock that it holds on its file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TEMPORARY = re.compile(r"\..+\.(?P<pid>\d+)\.[a-z0-9_]{8}")  # _prefix, and what tempfile adds
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`: synced and renamed to `path` on a clean exit, removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers_of(path)
    handle, name = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
    temporary = Path(name)
    try:
        _lock(handle)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`: it replaces `path` on a clean exit and is removed on an error.

    An existing folder is swapped with the new one in a single step where the file system supports it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers_of(path)
    temporary = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
    handle = os.open(temporary, os.O_RDONLY)
    try:
        _lock(handle)
        yield temporary
        temporary.chmod(0o755)
        try:
            temporary.rename(path)
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            _exchange(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON with a final newline, atomically."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content, atomically."""
    with new_file(target) as temporary:
        shutil.copyfile(source, temporary)


def leftovers(folder: Path) -> list[Path]:
    """Temporary files and folders in `folder` whose writers are dead."""
    found = (
        path
        for path in sorted(folder.glob(".*"))
        if (name := _TEMPORARY.fullmatch(path.name)) is not None and not Path("/proc", name["pid"]).exists()
    )
    return [path for path in found if not _is_locked(path)]


def remove(path: Path) -> None:
    """Remove a file or folder: its name disappears in one step; what cannot be deleted stays under a hidden name."""
    aside = path.with_name(f"{_prefix(path)}removed_")
    path.rename(aside)
    discard(aside)


def discard(path: Path) -> None:
    """Delete a file or folder; whatever cannot be deleted stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _lock(handle: int) -> bool:
    """Lock an open file or folder until it is closed; False if another process has it locked."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: nobody holds one
        pass
    return True


def _is_locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:  # gone meanwhile, or not ours
        return False
    try:
        return not _lock(handle)
    finally:
        os.close(handle)


def _remove_leftovers_of(path: Path) -> None:
    for sibling in leftovers(path.parent):
        if sibling.name.startswith(f".{path.name}."):
            discard(sibling)


def _prefix(path: Path) -> str:
    return f".{path.name}.{os.getpid()}."


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step with renameat2(2), which Python does not expose."""
    sys.audit("os.rename", str(new), str(old), -1, -1)
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # not glibc ≥ 2.28
        code = errno.ENOSYS
    else:
        arguments = _AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE
        code = ctypes.get_errno() if renameat2(*arguments) else 0
    if code == 0:
        return
    if code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), str(old))
    aside = Path(tempfile.mkdtemp(prefix=_prefix(old), dir=old.parent))  # NFS, some overlays: two steps
    old.rename(aside)
    new.rename(old)
    aside.rename(new)
