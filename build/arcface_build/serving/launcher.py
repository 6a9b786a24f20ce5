"""How a tritonserver is started so that nothing of it outlives whoever started it."""

from __future__ import annotations

import os
import signal
import sys

from arcface_build.host_memory import launch_limit

GRACE_S = 5.0  # beyond the time that running requests have, for a server whose parent was killed
# Beside tritonserver, in its group. When that is gone, or some seconds after we are (standard input ends), it ends
# the rest: Triton may wait for a python stub in the middle of a batch for ever, and such a stub outlives Triton. One
# that is told to end while it starts leaves its shared memory.
_END_THE_REST = (
    "import glob, os, select, signal, sys, time; server, grace_s = int(sys.argv[1]), float(sys.argv[2])\n"
    "while os.getppid() == server and not select.select([0], [], [], 1)[0]: pass\n"
    "end_s = time.monotonic() + grace_s\n"
    "while os.getppid() == server and time.monotonic() < end_s: time.sleep(0.1)\n"
    "for region in glob.glob('/dev/shm/' + sys.argv[3] + '*' if sys.argv[3] else ''):\n"
    "    try: os.unlink(region)\n"
    "    except OSError: pass\n"
    "os.killpg(0, signal.SIGKILL)"
)
# Run before tritonserver takes its place: asks Linux (PR_SET_PDEATHSIG = 1) to end it when we are killed ourselves, so
# that no process is left. The kernel means the thread that started it: start a server from a thread that lives as long
# as it should. Linux does not tell of a parent that was gone before it was asked: hence the comparison.
# Not a preexec_fn: that forks this process, and gRPC's fork handlers abort one child in sixty where a
# client of ours is connecting (ev_epoll1_linux: "epoll_wait error: Bad file descriptor").
# The limit of open files is raised as far as it may be: each connection takes one. That of memory is lowered.
_DIE_WITH_PARENT = (
    f"import ctypes, os, sys; ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)}); me = os.getpid(); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(); "
    f"os.fork() or os.execv(sys.executable, [sys.executable, '-ISc', {_END_THE_REST!r}, str(me), *sys.argv[2:4]]); "
    "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (r.getrlimit(r.RLIMIT_NOFILE)[1],) * 2); "
    "had = [n for n in r.getrlimit(r.RLIMIT_DATA) if n != r.RLIM_INFINITY]; "
    "r.setrlimit(r.RLIMIT_DATA, (min([int(sys.argv[4]), *had]),) * 2); "
    "os.execv(sys.argv[5], sys.argv[5:])"
)


def launcher(exit_timeout_s: float, parent: int | None = None, regions: str = "") -> list[str]:
    """What stands before tritonserver's command line; it leads a session, and nothing is ever written to its input.

    Args:
        exit_timeout_s: how long running requests may take to finish when we are killed.
        parent: the process to end with; default: this one.
        regions: how the names of its shared memory begin, which is removed at its end; empty: none is.
    """
    parent_pid, grace = str(parent or os.getpid()), str(exit_timeout_s + GRACE_S)
    return [sys.executable, "-ISc", _DIE_WITH_PARENT, parent_pid, grace, regions, str(launch_limit())]
