"""Keeps a server's administration to its user: the options that restrict it, and the key file that his clients read."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from arcface_build.errors import ServerFailed
from arcface_clients.triton.admin_key import HTTP_HEADER, given_key, is_private, key_folders

# Loading a model runs code, shared memory holds other clients' faces, trace and log settings write files.
RESTRICTED = "model-repository,shared-memory,trace,logging"


_OPTIONS = ("--http-restricted-api", "--grpc-restricted-protocol")


class Guard:
    """The key of one server, ARCFACE_ADMIN_KEY or else 256 random bits, from its start to its end.

    Attributes:
        is_hidden: whether it is gone from the command line.
    """

    def __init__(self) -> None:
        """Take or make the key.

        Raises:
            ConfigError: ARCFACE_ADMIN_KEY cannot be a key.
        """
        self._key = given_key() or secrets.token_urlsafe(32)
        self._files: list[Path] = []
        self.is_hidden = False

    def options(self) -> list[str]:
        """Triton's options that restrict the APIs above to whoever sends the key."""
        return [f"{option}={RESTRICTED}:{HTTP_HEADER}={self._key}" for option in _OPTIONS]

    def leave_key(self, ports: tuple[int, ...]) -> None:
        """See `keep_key`; the process that gets the options is a new one."""
        self._files = keep_key(ports, self._key)
        self.is_hidden = False

    def hide(self, pid: int) -> None:
        """See `hide_key`; where it fails, the caller tries again."""
        self.is_hidden = hide_key(pid, self._key)

    def forget(self) -> None:
        """See `forget_key`."""
        forget_key(self._files, self._key)


def keep_key(ports: tuple[int, ...], key: str) -> list[Path]:
    """Leave the key for this user's clients, mode 0600, a file for each port; returns the files.

    Raises:
        ServerFailed: no folder can be made that is this user's alone.
    """
    for folder in key_folders():
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            if is_private(folder):
                return [_write(folder / str(port), key) for port in ports]
    raise ServerFailed(
        f"there is no folder for the key of this server: {' and '.join(map(str, key_folders()))} cannot be made, or "
        "belong to somebody else, or are open to others. Remove what is there, or set XDG_RUNTIME_DIR to a folder of "
        "your own (mode 0700)"
    )


def _write(file: Path, key: str) -> Path:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(handle, f"{key}\n".encode())
    finally:
        os.close(handle)
    return temporary.replace(file)


def forget_key(files: list[Path], key: str) -> None:
    """Remove the files, where they still hold this key: the next server on the port may have put its own there."""
    for file in files:
        with contextlib.suppress(OSError):
            if file.read_text().strip() == key:
                file.unlink()


def hide_key(pid: int, key: str) -> bool:
    """Overwrite the key in a child's command line, which every user of the host may read; whether it is gone.

    Triton takes the key by option only. It has copied it by the time that it logs its first line.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        start, end = int(after_name[45]), int(after_name[46])  # arg_start and arg_end, fields 48 and 49 of proc(5)
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            line = memory.read(end - start)
            memory.seek(start)
            memory.write(line.replace(key.encode(), b"*" * len(key)))
    except (OSError, ValueError, IndexError):
        return False
    return key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
