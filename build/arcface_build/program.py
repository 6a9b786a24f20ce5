"""The entry point of `arcface`: Ctrl-C ends it without a traceback even while Python is still importing."""

from __future__ import annotations

import _signal  # not `signal`: importing that takes long enough to be interrupted


def main() -> None:
    """Run the command line; until it takes over, Ctrl-C kills the process (exit code 130)."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # unless the caller ignores it
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    try:
        from arcface_build.cli import main
    except ModuleNotFoundError as exc:
        if exc.name not in ("click", "pydantic", "yaml", "rich"):
            raise
        _end_without(exc.name)
    else:
        main()


def _end_without(module: str) -> None:
    """One sentence and exit code 3: the client was installed, without what its command line needs."""
    import sys

    from arcface_clients.extras import how_to_get

    print(
        f"DependencyMissing: arcface needs {module}, which is not installed. Next: {how_to_get('click')}",
        file=sys.stderr,
    )
    sys.exit(3)
