"""Fetches perf_analyzer, Triton's load generator, from tritonclient's wheel into our cache."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from arcface_build.child_process import module_line
from arcface_clients.atomic import new_folder
from arcface_clients.errors import Missing

VERSION = "2.50.0"  # its binary runs on glibc 2.36; that of 2.60 needs 2.38, and newer wheels have none
_BY_HAND = f"Install a wheel that contains it (newer ones do not): pip install 'tritonclient[grpc,http]=={VERSION}'"


def cached_perf_analyzer(cache: Path) -> Path:
    """Path of a fetched perf_analyzer, which need not exist."""
    return cache.expanduser() / f"perf_analyzer-{VERSION}" / "perf_analyzer"


def fetch_perf_analyzer(cache: Path, say: Callable[[str], None], timeout_s: float = 300.0) -> Path:
    """Download tritonclient's wheel with this Python's pip, and extract that one program.

    pip's own settings apply (index, proxy, PIP_NO_INDEX, PIP_FIND_LINKS). Nothing is installed: the wheel is deleted,
    and the program appears in the cache atomically.

    Args:
        cache: the folder of downloads.
        say: called with a message before the download.
        timeout_s: for the whole operation.

    Raises:
        Missing: the wheel cannot be downloaded, or contains no perf_analyzer.
    """
    target = cached_perf_analyzer(cache)
    say(f"no perf_analyzer on this host: fetching it from tritonclient=={VERSION} into {target.parent}")
    with tempfile.TemporaryDirectory(prefix="perf_analyzer-wheel-") as name:
        line = module_line("pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1")
        line += ["--no-deps", "--only-binary=:all:", "--dest", name, f"tritonclient=={VERSION}"]
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as exc:
            raise Missing(_not_there(f"pip did not finish within {timeout_s:g} s")) from exc
        wheel = next(Path(name).glob("*.whl"), None)
        if done.returncode or wheel is None:
            told = [text.strip() for text in done.stderr.splitlines() if text.strip()]
            errors = [text.removeprefix("ERROR: ") for text in told if text.startswith("ERROR: ")]
            raise Missing(_not_there(f"pip says: {(errors or told or ['nothing'])[-1]}"))
        with zipfile.ZipFile(wheel) as archive:
            member = next((item for item in archive.namelist() if item.endswith("/perf_analyzer")), None)
            if member is None:
                raise Missing(_not_there(f"{wheel.name} does not contain it"))
            with new_folder(target.parent) as folder:
                program = folder / target.name
                with archive.open(member) as source, program.open("wb") as file:
                    shutil.copyfileobj(source, file)
                program.chmod(0o755)
    return target


def _not_there(why: str) -> str:
    return (
        "no perf_analyzer: it is neither on PATH nor in this Python environment, and fetching it failed "
        f"({why.rstrip('.')}). {_BY_HAND}"
    )
