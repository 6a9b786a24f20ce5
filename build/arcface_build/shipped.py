"""Finds the files that come with the code: the hand-written model repository, the stand-in backends, config/."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """`model_repository`, `backends` or `config`: that of the checkout, or the copy that a wheel brings."""
    carried = _PACKAGE / "data" / name
    return carried if carried.is_dir() else _PACKAGE.parent.parent / name


def config_table(name: str) -> Path:
    """A table of config/: the one in this folder or above it, else the shipped one."""
    here = (folder / "config" / name for folder in (Path.cwd(), *Path.cwd().parents))
    return next((path for path in here if path.is_file()), shipped("config") / name)
