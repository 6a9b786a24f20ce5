"""Finds the files that come with the code: the hand-written model repository, the stand-in backends, config/."""

from __future__ import annotations

from pathlib import Path

from arcface_clients.planted import refuse_planted

_PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """`model_repository`, `backends` or `config`: that of the checkout, or the copy that a wheel brings."""
    carried = _PACKAGE / "data" / name
    return carried if carried.is_dir() else _PACKAGE.parent.parent / name


def config_table(name: str) -> Path:
    """A table of config/: the one in this folder or above it, else the shipped one.

    Raises:
        WrongUse: another user put it there.
    """
    for folder in (Path.cwd(), *Path.cwd().parents):
        path = folder / "config" / name
        if path.is_file():
            refuse_planted(path, folder, "copy it to config/ here")
            return path
    return shipped("config") / name
