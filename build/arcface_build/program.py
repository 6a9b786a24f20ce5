"""The entry point of `arcface`: Ctrl-C ends it without a traceback even while Python is still importing."""

from __future__ import annotations

import _signal  # not `signal`: importing that takes long enough to be interrupted


def main() -> None:
    """Run the command line; until it takes over, Ctrl-C kills the process (exit code 130)."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # unless the caller ignores it
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from arcface_build.cli import main

    main()
