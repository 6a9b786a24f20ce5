"""What the pages name is there: files, folders, modules and links."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from conftest import REPO

PAGES = ["CONTRIBUTING.md", "ARCHITECTURE.md", "README.md", "CHANGELOG.md", "examples/README.md"]
PAGES += sorted(str(path.relative_to(REPO)) for path in (REPO / "docs").rglob("*.md"))
ROOTS = {path.name for path in REPO.iterdir() if not path.name.startswith(".")} | {".github", ".ci"}
MADE = ("models/", "reports/", "docs/measured/<", "deploy/tls/tls.", "model_repository/.")  # not held by git
SUFFIXES = (".py", ".sh", ".md", ".yaml", ".yml", ".toml", ".pbtxt", ".txt")


def _named(text: str) -> set[str]:
    """What stands in backticks and looks like a file or folder of ours: `docs/x.md`, `errors.py`."""
    words = {word.rstrip("/,;") for quoted in re.findall(r"`([^`\n]+)`", text) for word in quoted.split()}
    paths = {word for word in words if re.fullmatch(r"[\w./-]*\w[\w./-]*", word) and not word.startswith(".")}
    return {path for path in paths if path.endswith(SUFFIXES) or ("/" in path and path.split("/")[0] in ROOTS)}


def _exists(name: str, page: Path) -> bool:
    """From the root, beside the page, or as the end of a path inside one of our packages (`engines/fallback.py`)."""
    if (REPO / name).exists() or (page.parent / name).exists():
        return True
    packages = ("clients", "build", "tools", "backends", "model_repository", "deploy", "tests", "scripts")
    return any(next((REPO / package).rglob(name), None) for package in packages)


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_exists(page: str) -> None:
    path = REPO / page
    missing = [n for n in _named(path.read_text()) if not n.startswith(MADE) and not _exists(n, path)]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    path = REPO / page
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", path.read_text())
    assert not [target for target in targets if not (path.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_every_module_that_a_page_names_can_be_found(page: str) -> None:
    names = set(re.findall(r"\b(arcface_(?:clients|build|tools)(?:\.[a-z_0-9]+)+)", (REPO / page).read_text()))
    assert not [name for name in names if not _importable(name)]


def _importable(name: str) -> bool:
    """A module, or a name in one (`arcface_build.plans.get_or_build`)."""
    try:
        if importlib.util.find_spec(name):
            return True
    except ModuleNotFoundError:
        pass
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ImportError:
        return False


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("see `docs/nowhere.md`", ["docs/nowhere.md"]),
        ("`scripts/tset -k x`", ["scripts/tset"]),
        ("`engines/fallback.py` and `scripts/test -k x` and `backend: onnx`", []),
        ("`fallbakc.py`", ["fallbakc.py"]),
        ("`arcface plan pull KEY`, `models/NAME/`, a/b", []),
    ],
)
def test_a_path_that_is_not_there_is_found(text: str, missing: list[str]) -> None:
    page = REPO / "README.md"
    assert [name for name in _named(text) if not name.startswith(MADE) and not _exists(name, page)] == missing
