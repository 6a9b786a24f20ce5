"""The key that a server of this host asks for before it loads models or opens shared memory, found without a word.

`arcface serve` keeps the key in a file for each of its ports, in a folder that only its user can enter. A client of the
same user reads it there each time it is needed: a server that was started again has another one.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from pathlib import Path

from arcface_clients.errors import ConfigError
from arcface_clients.triton.address import Address, Connection
from arcface_clients.triton.memory.system import is_local

VARIABLE = "ARCFACE_ADMIN_KEY"
HTTP_HEADER = "admin-key"
GRPC_HEADER = f"triton-grpc-protocol-{HTTP_HEADER}"  # Triton's prefix for --grpc-restricted-protocol
_KEY = re.compile(r"[A-Za-z0-9_-]{8,128}")  # Triton's option has ":" and "=" for itself


def admin_headers(connection: Connection) -> dict[str, str]:
    """The connection's headers, and the key where one is known; for calls that a server may restrict, no others."""
    key = find_key(connection.address)
    header = GRPC_HEADER if connection.address.protocol == "grpc" else HTTP_HEADER
    return {**({header: key} if key else {}), **connection.headers}


def find_key(address: Address) -> str | None:
    """ARCFACE_ADMIN_KEY, else what the server on this port has left for this user; None for another host's server.

    Raises:
        ConfigError: ARCFACE_ADMIN_KEY cannot be a key.
    """
    if not is_local(address.host):
        return None
    return given_key() or next(filter(None, (_read(folder / str(address.port)) for folder in key_folders())), None)


def given_key() -> str | None:
    """ARCFACE_ADMIN_KEY, None where it is not set.

    Raises:
        ConfigError: it cannot be a key.
    """
    key = os.environ.get(VARIABLE)
    if key and not _KEY.fullmatch(key):
        raise ConfigError(
            f"{VARIABLE} cannot be a key: expected 8 to 128 letters, digits, - or _. Make one: openssl rand -hex 16"
        )
    return key or None


def key_folders() -> list[Path]:
    """Where keys are kept, best first: the session's own folder, else one of this user among the temporary files."""
    session = os.environ.get("XDG_RUNTIME_DIR")
    shared = Path(tempfile.gettempdir()) / f"arcface-triton-{os.getuid()}"
    return [*([Path(session) / "arcface-triton"] if session else []), shared]


def is_private(path: Path) -> bool:
    """Whether a file or folder is this user's, no link, and shut for everybody else."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return not stat.S_ISLNK(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def _read(file: Path) -> str | None:
    """A kept key; None where there is none, or where somebody else could have put it there."""
    if not (is_private(file.parent) and is_private(file)):
        return None
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = file.read_text().strip()
        return text if _KEY.fullmatch(text) else None
    return None
