"""What is said when a package is missing: a command that works from where this copy of the package runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from arcface_clients import extras
from arcface_clients.errors import DependencyMissing
from conftest import REPO

ASK = "from arcface_clients.extras import install_command; print(install_command('store'))"


def test_in_a_checkout_the_command_names_the_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(REPO)
    assert extras.install_command("store").endswith("pip install -c constraints.txt -e '.[store]'")
    monkeypatch.chdir(tmp_path)
    assert extras.install_command("store").endswith(f"pip install -c {REPO}/constraints.txt -e '{REPO}[store]'")


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


def test_a_failed_import_says_what_needs_it_and_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)  # what Python itself does for "this import is known to fail"
    with pytest.raises(DependencyMissing) as raised, extras.importing("reading photos"):
        import PIL.Image  # noqa: F401
    assert (
        str(raised.value)
        == f"reading photos needs PIL, which is not installed. Next: {extras.install_command('images')}"
    )


def test_a_package_that_is_there_but_does_not_load_is_not_called_missing():
    with (
        pytest.raises(DependencyMissing, match=r"^faces needs cv2, which does not load here \(libGL.so.1: .*headless$"),
        extras.importing("faces"),
    ):
        raise ImportError("libGL.so.1: cannot open shared object file", name="cv2")


def test_a_failure_without_a_name_sends_nobody_to_an_index():
    assert extras.how_to_mend(ImportError("no name")).endswith("pip check")


def test_every_extra_that_a_message_names_exists():
    declared = (REPO / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert set(extras._EXTRA_OF.values()) | {"tensorrt"} <= set(re.findall(r"^([\w-]+) = \[", declared, re.MULTILINE))


def test_no_text_sends_anyone_to_an_index_that_does_not_have_us():
    folders = ("clients", "build", "tools", "docs", "backends", "model_repository", "examples")
    files = [path for folder in folders for path in (REPO / folder).rglob("*.*")]
    texts = {path: path.read_text() for path in [*files, REPO / "README.md"] if path.suffix in (".py", ".md")}
    assert not [str(path) for path, text in texts.items() if re.search(r"pip install '?arcface-triton", text)]
