"""What the `arcface plan` commands share: the options for where plans are, and how plans are shown."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arcface_build.commands.options.settings import settings

if TYPE_CHECKING:
    from arcface_clients.plans.manifest import PlanManifest

_PATH = click.Path(path_type=Path)


def place_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --store, --cache and --public-key, and pass the command `places` instead of them."""

    @click.option(
        "--store", envvar="ARCFACE_PLAN_STORE", help="s3://bucket/prefix or a folder.  [default: storage.type, …]"
    )
    @click.option("--cache", type=_PATH, help="Folder of this host's plans.  [default: storage.plans]")
    @click.option(
        "--public-key",
        type=_PATH,
        help="PEM; plans not signed by its private key are refused.  [default: storage.public_key]",
    )
    @functools.wraps(function)
    def with_places(*args: Any, store: str | None, cache: Path | None, public_key: Path | None, **kwargs: Any) -> Any:
        from arcface_build.plans.places import open_places

        return function(*args, places=open_places(settings(), store, cache, public_key), **kwargs)

    return with_places


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Left-aligned columns, two spaces apart."""
    cells = [header, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def megabytes(size: int) -> str:
    """A size for people: 87.3 MB."""
    return f"{size / 1e6:.1f} MB"


def summary(manifest: PlanManifest) -> dict[str, Any]:
    """A plan as a row of a list."""
    spec, drift = manifest.spec, manifest.drift
    return {
        "plan": spec.file_name,
        "sm": spec.sm,
        "tensorrt": spec.tensorrt,
        "batch": f"{spec.min_batch}/{spec.opt_batch}/{spec.max_batch}",
        "size": megabytes(manifest.size_bytes),
        "max drift": f"{drift['max_drift']:.1e}" if drift else "not measured",
        "signed": "yes" if manifest.signature else "no",
        "key": manifest.key[:12],
    }
