"""Runs something in a forked child that dies, without a word, just before its k-th operation on files."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate"}
KILLED = 99


def operations(act: Callable[[], None], under: Path) -> list[str]:
    """Every operation on files below `under` that `act` does, in order, as "event path"."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        with os.fdopen(write, "w") as told:
            _watch(under, lambda count, event: told.write(event + "\n"))
            code = _done(act)
            told.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as told:
        found = told.read().splitlines()
    assert _status(pid) == 0, "the undisturbed run failed"
    return found


def kill_before(act: Callable[[], None], under: Path, position: int) -> bool:
    """Run `act` and die before operation number `position` (from 0) below `under`; whether it came so far."""
    pid = os.fork()
    if pid == 0:
        _watch(under, lambda count, event: os._exit(KILLED) if count == position else None)
        os._exit(_done(act))
    return _status(pid) == KILLED


def _watch(under: Path, tell: Callable[[int, str], None]) -> None:
    root, seen = str(under), [0]

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in WRITES:
            path = arguments[0]
        else:
            return
        with contextlib.suppress(TypeError):
            if os.fsdecode(path).startswith(root):
                tell(seen[0], f"{event} {os.fsdecode(path)[len(root) :]}")
                seen[0] += 1

    sys.addaudithook(hook)


def _done(act: Callable[[], None]) -> int:
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            act()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
