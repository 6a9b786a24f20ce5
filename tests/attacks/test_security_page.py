"""SECURITY.md names a test for each threat: each of them exists, and so does what it says of options."""

from __future__ import annotations

import re

from arcface_build.serving.exposure import OURS
from conftest import REPO

PAGE = (REPO / "SECURITY.md").read_text()


def test_every_test_that_the_page_names_exists_where_it_says():
    written = {path: path.read_text() for path in (REPO / "tests").rglob("test_*.py")}
    for line in PAGE.splitlines():
        names = re.findall(r"`(test_\w+)`", line)
        places = {REPO / place for place in re.findall(r"`(tests/test_\w+\.py)`", line)} or {REPO / "tests" / "attacks"}
        for name in names:
            held = [path for path, text in written.items() if f"def {name}(" in text]
            assert held, f"SECURITY.md names {name}, which does not exist"
            assert any({path, path.parent} & places for path in held), f"{name} is in {held}"


def test_every_threat_has_a_test():
    (table,) = re.findall(r"^\| who \| how \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    rows = [[cell.strip() for cell in re.split(r"(?<!\\\\)\|", row)[1:-1]] for row in table.splitlines()]
    assert len(rows) > 20
    assert all(len(row) == 4 and all(row) and ("test_" in row[3] or row[3] == "the same") for row in rows)


def test_every_option_of_tritons_guide_that_we_decide_is_refused_after_the_dashes():
    assert {"--allow-sagemaker", "--allow-vertex-ai"} <= set(OURS)
    for option in ("--grpc-use-ssl", "--http-restricted-api", "--allow-sagemaker", "--allow-vertex-ai"):
        assert f"`{option}" in PAGE and option in OURS
