"""A perf_analyzer that is nowhere on the host is fetched once, by the real pip from a real folder of wheels."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deadlines import HANG_S

REPO = Path(__file__).resolve().parent.parent
FIND = """
import os, sys
from functools import partial
from pathlib import Path
from arcface_build.bench.perf_analyzer import find_perf_analyzer
from arcface_build.errors import Missing
try:
    say = partial(print, file=sys.stderr)
    print(find_perf_analyzer(Path(os.environ["CACHE"]), say).path)
except Missing as exc:
    sys.exit(f"Missing: {exc}")
"""
SCRIPTS = "tritonclient-2.50.0.data/scripts/"


def write_wheel(folder: Path, *programs: str) -> Path:
    """A wheel named as the real one, with programs that only answer --version."""
    folder.mkdir()
    info = "tritonclient-2.50.0.dist-info"
    with zipfile.ZipFile(folder / "tritonclient-2.50.0-py3-none-any.whl", "w") as wheel:
        for program in programs:
            wheel.writestr(SCRIPTS + program, "#!/bin/sh\necho 'Perf Analyzer Version 2.50.0'\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tritonclient\nVersion: 2.50.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this Python has installed, without tritonclient: links, so that pip and our own needs are there."""
    import numpy
    import pip

    folder = tmp_path_factory.mktemp("packages")
    for place in {Path(module.__file__).parent.parent for module in (pip, numpy)}:
        for item in place.iterdir():
            if not item.name.startswith("tritonclient") and not (folder / item.name).exists():
                (folder / item.name).symlink_to(item)
    return folder


def find(packages: Path, cache: Path, wheels: Path) -> subprocess.CompletedProcess[str]:
    """`find_perf_analyzer` in a Python that has none: the one below our environment, with the linked packages."""
    below = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    if not below.exists() or below.with_name("perf_analyzer").exists():
        pytest.skip(f"{below} is not there, or has a perf_analyzer of its own")
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
    places = {"PATH": "/nonexistent", "PYTHONPATH": f"{REPO / 'clients'}:{REPO / 'build'}:{packages}"}
    environment = {"HOME": str(cache.parent), "CACHE": str(cache), **pip, **places}
    line = [str(below), "-S", "-c", FIND]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=HANG_S, check=False)


def test_it_is_fetched_once_said_and_found_from_then_on(packages: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    program = cache / "perf_analyzer-2.50.0" / "perf_analyzer"
    first = find(packages, cache, write_wheel(tmp_path / "wheels", "perf_client", "perf_analyzer"))
    assert (first.returncode, first.stdout) == (0, f"{program}\n"), first.stderr
    assert first.stderr == (
        f"no perf_analyzer on this host: fetching it from tritonclient==2.50.0 into {cache}/perf_analyzer-2.50.0\n"
    )
    assert program.stat().st_mode & 0o777 == 0o755
    again = find(packages, cache, tmp_path / "no index any more")
    assert (again.stdout, again.stderr) == (f"{program}\n", "")


@pytest.mark.parametrize(
    ("programs", "why"),
    [
        (None, "pip says: No matching distribution found for tritonclient==2.50.0"),
        (("perf_client",), "tritonclient-2.50.0-py3-none-any.whl does not contain it"),
    ],
)
def test_what_cannot_be_fetched_is_said_and_leaves_nothing(
    packages: Path, tmp_path: Path, programs: tuple[str, ...] | None, why: str
) -> None:
    wheels = tmp_path / "wheels"
    write_wheel(wheels, *programs) if programs else wheels.mkdir()
    done = find(packages, tmp_path / "cache", wheels)
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:] == [
        "Missing: no perf_analyzer: it is neither on PATH nor in this Python environment, and fetching it failed "
        f"({why}). Install a wheel that contains it (newer ones do not): pip install 'tritonclient[grpc,http]==2.50.0'"
    ]
    assert not list((tmp_path / "cache").rglob("*"))
