"""The program `arcface`: a Ctrl-C ends it without a traceback from its first moment, while Python still imports."""

from __future__ import annotations

import _signal  # not `signal`: importing that takes long enough to be interrupted in


def main() -> None:
    """Run the command line; until that has taken over, Ctrl-C kills the process (a shell says 130)."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # not where the caller has it ignored
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from arcface_build.cli import main

    main()
