"""What the `arcface plan` commands share: the options that say where plans are, a table, and a byte progress bar."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from arcface_build.store.objects import Progress
    from arcface_clients.plans.manifest import PlanManifest

_PATH = click.Path(path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


def place_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --store, --cache, --public-key and --config, and call the command with `places` instead of them."""

    @click.option(
        "--store", envvar="ARCFACE_PLAN_STORE", help="s3://bucket/prefix or a folder. [storage.* in --config]"
    )
    @click.option("--cache", type=_PATH, envvar="ARCFACE_PLAN_CACHE", help="Folder of this host's plans.")
    @click.option("--public-key", type=_PATH, help="PEM; plans not signed by its private key are refused.")
    @click.option("--config", "config_file", type=_PATH, help="Default: config/embedding.yaml where it is there.")
    @functools.wraps(function)
    def with_places(
        *args: Any,
        store: str | None,
        cache: Path | None,
        public_key: Path | None,
        config_file: Path | None,
        **kwargs: Any,
    ) -> Any:
        from arcface_build.plans.places import open_places

        return function(*args, places=open_places(config_file, store, cache, public_key), **kwargs)

    return with_places


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Left-aligned columns, two spaces apart."""
    cells = [header, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def megabytes(size: int) -> str:
    """A size for readers: 87.3 MB."""
    return f"{size / 1e6:.1f} MB"


def summary(manifest: PlanManifest) -> dict[str, Any]:
    """The row of a plan: what a list shows."""
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


@contextmanager
def byte_progress(what: str, total: int) -> Iterator[Progress]:
    """A progress bar on stderr, where that is a terminal, fed with bytes moved."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda moved: bar.advance(task, moved)
