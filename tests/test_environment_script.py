"""scripts/environment.sh: what a first run says while packages are installed, and when that fails."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import REPO

PYTHON = """#!/bin/sh
case "$*" in
  *insightface) echo "  Downloading insightface-2.1.whl (1.2 MB)" ;;
  "-m pip install"*)
    echo "Collecting onnx"
    echo "  Downloading onnx-1.22.0.whl (19.1 MB)"
    echo "  Downloading click-8.whl (100 kB)"
    [ -z "$PIP_FAILS" ] || { echo "ERROR: no matching distribution"; exit 1; }
    echo "Installing collected packages: onnx, click" ;;
  *) cat >/dev/null ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the script, requirements, and a .venv whose Python only speaks like pip."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(PYTHON)
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt", "scripts/environment.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(REPO / name, tmp_path / name)
    return tmp_path


def prepare(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    line = "set -euo pipefail; source scripts/environment.sh; prepare_environment serve"
    everything = {**os.environ, "PIP_FAILS": "", **environment}
    return subprocess.run(
        ["bash", "-c", line, "scripts/serve"], cwd=checkout, env=everything, capture_output=True, text=True, check=False
    )


def test_a_first_run_says_what_it_downloads_and_how_to_enter_and_a_second_one_nothing(checkout: Path) -> None:
    done = prepare(checkout)
    assert done.returncode == 0, done.stderr
    first, *progress, last = done.stderr.splitlines()
    assert first.startswith("installing what scripts/serve needs (serve) into .venv: a first run downloads about ")
    assert progress == [
        "  package 1: onnx-1.22.0.whl (19.1 MB)",
        "  unpacking what was downloaded: 2",
        "  package 1: insightface-2.1.whl (1.2 MB)",
    ]
    assert last.startswith("installed in ") and ", 20 MB downloaded. To have `arcface" in last
    assert last.endswith("in this shell: source .venv/bin/activate")
    assert "Collecting onnx" in (checkout / ".venv" / "install.log").read_text()
    again = prepare(checkout)
    assert (again.returncode, again.stderr) == (0, "")


def test_a_failed_installation_names_the_log_and_repeats_its_last_words(checkout: Path) -> None:
    done = prepare(checkout, PIP_FAILS="1")
    assert done.returncode == 3
    assert "all that pip said is in .venv/install.log" in done.stderr
    assert "  ERROR: no matching distribution\nNext: check the network" in done.stderr
    assert prepare(checkout).returncode == 0


@pytest.mark.parametrize(
    ("host", "on_path", "status"),
    [("Linux aarch64", False, 3), ("Darwin arm64", False, 3), ("Linux aarch64", True, 0), ("Linux x86_64", False, 0)],
)
def test_where_no_wheel_holds_a_tritonserver_it_says_so_before_it_downloads(
    checkout: Path, host: str, on_path: bool, status: int
) -> None:
    programs = checkout / "bin"
    programs.mkdir()
    for name, text in {"uname": f"#!/bin/sh\necho {host}\n", "tritonserver": "#!/bin/sh\n" if on_path else ""}.items():
        if text:
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", "set -euo pipefail; source scripts/environment.sh; require_tritonserver"],
        cwd=checkout,
        env={"PATH": f"{programs}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    if status:
        assert f"the wheel that holds one is for Linux x86_64; this is {host}.\nNext: " in done.stderr
