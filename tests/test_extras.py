"""What is said when a package is missing: a command that works from where this copy of the package runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from arcface_clients import extras
from conftest import REPO

ASK = "from arcface_clients.extras import install; print(install('store'))"


def test_in_a_checkout_the_command_names_the_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(REPO)
    assert extras.install("store").endswith("pip install -c constraints.txt -e '.[store]'")
    monkeypatch.chdir(tmp_path)
    assert extras.install("store").endswith(f"pip install -c {REPO}/constraints.txt -e '{REPO}[store]'")


def installed(folder: Path, origin: Path | None) -> str:
    """What a wheel's copy says, unpacked as pip leaves it; `origin`: the file that pip notes it came from."""
    site = folder / "site-packages"
    info = site / "arcface_triton-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: arcface-triton\nVersion: 0.1.0\n")
    if origin:
        (info / "direct_url.json").write_text(f'{{"archive_info": {{}}, "url": "{origin.as_uri()}"}}')
    (site / "arcface_clients").mkdir()
    for name in ("extras.py", "errors.py"):
        (site / "arcface_clients" / name).write_text((REPO / "clients" / "arcface_clients" / name).read_text())
    (site / "arcface_clients" / "__init__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    line = [sys.executable, "-c", ASK]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=folder, check=True).stdout.rstrip()


def test_an_installed_wheel_names_the_file_that_it_came_from(tmp_path):
    wheel = tmp_path / "my wheels" / "arcface_triton-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"")
    assert installed(tmp_path, wheel).endswith(f"pip install '{wheel}[store]'")


@pytest.mark.parametrize("origin", [None, Path("/gone/arcface_triton-0.1.0-py3-none-any.whl")])
def test_a_wheel_that_is_gone_is_named_without_a_folder(tmp_path, origin):
    assert installed(tmp_path, origin).endswith("pip install 'arcface_triton-0.1.0-py3-none-any.whl[store]'")


def test_every_extra_that_a_message_names_exists():
    declared = (REPO / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert set(extras._EXTRA_OF.values()) | {"tensorrt"} <= set(re.findall(r"^(\w+) = \[", declared, re.MULTILINE))


def test_no_text_sends_anyone_to_an_index_that_does_not_have_us():
    files = [path for folder in ("clients", "build", "tools", "docs") for path in (REPO / folder).rglob("*.*")]
    texts = {path: path.read_text() for path in [*files, REPO / "README.md"] if path.suffix in (".py", ".md")}
    assert not [str(path) for path, text in texts.items() if re.search(r"pip install '?arcface-triton", text)]
