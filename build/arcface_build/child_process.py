"""Child processes of ours: how they are started, and what they ask for first: to end with their parent, and a limit.

`python -m` puts the folder in which a command runs before all others on the path: a numpy.py that came with a download
would be executed. `module_line` leaves that folder out, on Python 3.10 too (`-P` came with 3.11).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

from arcface_build.host_memory import own_limit

_PR_SET_PDEATHSIG = 1
_RUN = "import sys; sys.path[:] = filter(None, sys.path); import runpy; runpy.run_module({!r}, None, '__main__', True)"


def module_line(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module as a program, with nothing of the current folder on its path."""
    return [sys.executable, "-c", _RUN.format(module), *arguments]


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; exits at once where that has happened already."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)


def take_at_most(limit: int) -> None:
    """Have this process ask for no more memory of its own than this many bytes (RLIMIT_DATA); a lower limit stays."""
    own = own_limit()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if own is None else min(limit, own), hard))
