"""Every code block of README.md and docs/*.md, in order, each page in a folder of its own, against one real server.

A ```console block is run line by line, and has to print what the page shows ("…" stands for what varies). In an
indented block the `arcface` lines are run. A ```python block is run; `print(…)  # text` has to print a text with "…".
The server is the one that `scripts/serve` starts. Not run are: what the page itself says needs a GPU, Docker, S3 or a
cluster (skipped), and what NOT_RUN names with its reason; of those, every option has to exist.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import onnx
import pytest

from arcface_build.cli import cli, main
from arcface_build.serving.ports import free_ports
from arcface_clients import TritonEmbedder
from arcface_clients.faces.synthetic import synthetic_faces, synthetic_people
from conftest import REPO, copy_repository
from deadlines import HANG_S
from tiny_nets import tiny_net

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (REPO / "docs").glob("*.md"))]
ELSEWHERE = re.compile(r"\bGPU\b|Docker|\bS3\b|Kubernetes|kubectl|s3://")  # a page that says so tells its reader, too
PROGRAM = re.compile(r"([A-Z_]+=\S+ )*(arcface|scripts/|tritonserver|kubectl|aws|docker|source|\()")
NOT_RUN = {  # beginning of a line → why it is not run here; its options are looked at
    "scripts/serve": "the fixture runs it",
    "scripts/test": "it runs this; .ci/run calls it",
    "arcface serve": "scripts/serve ends in it",
    "arcface bench": "measures for minutes",
    "arcface compare insightface onnx --faces crops/ --pairs": "wants 200 pairs: tests/test_calibration.py",
    "arcface import-detector": "a detector's file is not in git: tests/test_import_detector.py",
    "arcface import buffalo_l": "downloads",
    "arcface import mobilefacenet": "downloads",
    "arcface import FOLDER": "stands for a folder",
    "arcface import backbone.pth": "tests/test_checkpoint.py makes one",
    "source .venv": "the pasted lines of serve do",
    "tritonserver": "tests/test_plain_tritonserver.py runs it",
}


@dataclass(frozen=True)
class Block:
    """A code block: where it is, its language ("" if indented), its text, and the paragraph before it."""

    page: str
    line: int
    language: str
    text: str
    before: str

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Its command lines without their comments, and what the page shows after each."""
        if self.language == "console":
            parts = re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]
            return [(_without_comment(p.partition("\n")[0]), p.partition("\n")[2]) for p in parts]
        text = self.text.replace("\\\n", " ")
        return [(_without_comment(line), "") for line in text.splitlines() if PROGRAM.match(line)]


def blocks_of(page: str) -> Iterator[Block]:
    lines, before, number = (REPO / page).read_text().splitlines(), "", 0
    while number < len(lines):
        first, inside = number, []
        if fence := re.match(r"```(\w*)", lines[number]):
            number += 1
            while not lines[number].startswith("```"):
                inside.append(lines[number])
                number += 1
            number += 1
            yield Block(page, first + 1, fence[1], "\n".join(inside) + "\n", before)
        elif re.match(r" {4}\S", lines[number]) and not lines[number - 1].strip():
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                inside.append(lines[number].removeprefix("    "))
                number += 1
            yield Block(page, first + 1, "", "\n".join(inside), before)
        else:
            before = lines[number] if not lines[number - 1].strip() else f"{before} {lines[number]}"
            number += 1


def _without_comment(line: str) -> str:
    """`arcface import x.onnx    a file; …` and `arcface serve  # picks …` without what follows."""
    return re.split(r"\s+#\s|\s{2,}", line)[0].strip()


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUNNABLE = [block for block in BLOCKS if block.language == "python" or block.commands]


@dataclass
class Serving:
    """What `scripts/serve` printed, where, and its addresses."""

    printed: str
    folder: Path
    as_served: Path  # a copy of what was in it then
    grpc: str
    by_script: bool


@pytest.fixture(scope="module")
def serving(triton_binary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A checkout's folder without weights, in which README's first command runs; without our .venv, `arcface serve`."""
    folder = tmp_path_factory.mktemp("checkout")
    copy_repository(folder)
    for name in ("scripts", "config"):
        shutil.copytree(REPO / name, folder / name)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copyfile(REPO / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    wanted = "$(cat pyproject.toml constraints.txt scripts/environment.sh | cksum | cut -d' ' -f1)"
    ask = f'source scripts/environment.sh; installed serve,build,images,reference "{wanted}"'
    by_script = subprocess.run(["bash", "-c", ask], cwd=folder, check=False).returncode == 0
    ports = free_ports()
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "ARCFACE_SERVE_HTTP_PORT": str(ports.http),
        "ARCFACE_SERVE_GRPC_PORT": str(ports.grpc),
        "ARCFACE_SERVE_METRICS_PORT": str(ports.metrics),
    }
    line = ["scripts/serve"] if by_script else [".venv/bin/python", "-m", "arcface_build", "serve"]
    log = folder / "serve.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(line, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        printed, as_served = _until_it_serves(process, log), tmp_path_factory.mktemp("as-served")
        for name in ("models", "model_repository", "config"):
            shutil.copytree(folder / name, as_served / name)
        yield Serving(printed, folder, as_served, f"127.0.0.1:{ports.grpc}", by_script)
    finally:
        process.terminate()
        process.wait(HANG_S)


def _until_it_serves(process: subprocess.Popen[bytes], log: Path, timeout_s: float = HANG_S) -> str:
    deadline = time.monotonic() + timeout_s
    while not (printed := log.read_text()).endswith("Ctrl-C stops it.\n"):
        assert process.poll() is None and time.monotonic() < deadline, f"it does not serve:\n{printed}"
        time.sleep(0.1)
    return printed


@dataclass
class Page:
    """A page's folder and the names that its Python blocks have defined so far."""

    folder: Path
    names: dict[str, Any]


@pytest.fixture(scope="module")
def page_of(serving: Serving, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Page]]:
    """page_of(page): its folder, with the models that `scripts/serve` left, and what the page takes for granted."""
    pages: dict[str, Page] = {}

    def page_of(page: str) -> Page:
        if page not in pages:
            folder = serving.folder if page == "README.md" else tmp_path_factory.mktemp(Path(page).stem)
            if page != "README.md":
                for name in ("models", "model_repository", "config"):
                    shutil.copytree(serving.as_served / name, folder / name)
            prepare(folder)
            pages[page] = Page(folder, given(stack.enter_context(TritonEmbedder(serving.grpc))))
        return pages[page]

    with contextlib.ExitStack() as stack:
        yield page_of


def prepare(folder: Path) -> None:
    """Crops, and models of one's own: what a reader has."""
    for person, views in enumerate(synthetic_people(3, 4, seed=1)):
        for view, face in enumerate(views):
            for root in (folder / "crops", folder / "people"):
                (root / f"person-{person}").mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(root / f"person-{person}" / f"{view}.png"), face)
    for name in ("ca.pem", "me.pem", "me.key"):
        (folder / name).touch()
    onnx.save(tiny_net(), folder / "my_r50.onnx")
    onnx.save(tiny_net(seed=1), folder / "odd.onnx")


def given(engine: TritonEmbedder) -> dict[str, Any]:
    """Names that the pages use without making them."""
    faces = synthetic_faces(12)
    rows = engine.encode(faces)
    of_faces = {"faces": faces, "faces_bgr_u8": faces, "face": faces[:1], "camera": lambda: iter(faces)}
    of_rows = {"a": rows, "b": rows[:3], "memmap": np.empty((12, 3), np.float32)}
    of_people = {"embeddings": rows, "names": [f"person {i // 3}" for i in range(12)], "references": rows[:3]}
    return {"engine": engine, **of_faces, **of_rows, **of_people, "embedding": rows[0]}


@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: f"{block.page}:{block.line}")
def test_a_block_does_what_the_page_says(
    block: Block, serving: Serving, page_of: Callable[[str], Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    for line, _ in block.commands if block.language != "python" else []:
        check_options(line)
    if said := ELSEWHERE.search(block.text) or ELSEWHERE.search(block.before):
        pytest.skip(f"the page says that it needs {said[0]}; its options exist")
    if "from insightface.app" in block.text:
        pytest.skip("InsightFace downloads its pack; tests/test_insightface_habits.py runs such code on other weights")
    if block.language == "python" and (block.page == "docs/photos.md" or "PhotoEmbedder" in block.text):
        pytest.skip("it needs a detector, whose file is not in git; tests/test_photo_faces.py runs this page with one")
    page = page_of(block.page)
    monkeypatch.chdir(page.folder)
    monkeypatch.setenv("ARCFACE_TRITON__URL", serving.grpc)
    if block.language == "python":
        run_python(block, page, serving)
        return
    for line, shown in block.commands:
        if not line.startswith(tuple(NOT_RUN)):
            status, printed = run_arcface(line.replace("localhost:8001", serving.grpc))
            assert status == 0 or "Error: " in shown, f"{line}: exit code {status}\n{printed}"
            assert matches(shown, printed), f"{line}: the page shows\n{shown}\nit printed\n{printed}"


def check_options(line: str) -> None:
    """Refuse an option or a subcommand that does not exist; the line is not run."""
    if not re.match(r"([A-Z_]+=\S+ )*arcface ", line):
        return
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    command: click.Command = cli
    context = click.Context(cli)
    rest = words[1:]
    while isinstance(command, click.Group):
        found = command.get_command(context, rest[0])
        assert found is not None, f"{line}: no such command"
        command, rest = found, rest[1:]
    command.make_parser(click.Context(command)).parse_args(args=rest)


def run_arcface(line: str) -> tuple[int, str]:
    """Exit code of an `arcface` line, run in this process, and all that it printed."""
    words = shlex.split(line)
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = words[len(variables) :]
    assert words[0] == "arcface", f"not run, and not in NOT_RUN: {line}"
    printed = io.StringIO()
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main(words[1:])
    except SystemExit as exc:
        return int(exc.code or 0), printed.getvalue()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    raise AssertionError("main returned")


def run_python(block: Block, page: Page, serving: Serving) -> None:
    text = block.text.replace("localhost:8001", serving.grpc)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, f"{block.page}:{block.line}", "exec"), page.names)
    shown = re.findall(r"^ *print\(.*\)  # (.*)$", block.text, re.MULTILINE)
    for said, line in zip(shown, printed.getvalue().splitlines(), strict=False):
        assert "…" not in said or matches(said, line), f"the page shows {said!r}, it printed {line!r}"


def matches(shown: str, printed: str) -> bool:
    """Whether the lines that a page shows are printed, one after the other; "…" is anything, alone any lines."""
    shown, printed = (re.sub(" +", " ", text.rstrip() + "\n") for text in (shown, printed))
    parts = re.split(r"^…\n", shown, flags=re.MULTILINE)
    pattern = "(?s:.*?)".join(re.escape(part).replace("…", ".*") for part in parts)
    return not shown.strip() or re.search(f"^{pattern}", printed, re.MULTILINE) is not None


def test_the_lines_that_serve_prints_can_be_pasted(serving: Serving) -> None:
    lines = re.search(r"\n\n(source .*\nPY\n)", serving.printed, re.DOTALL)
    assert lines, serving.printed
    done = subprocess.run(
        ["bash", "-euc", lines[1]], cwd="/", capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "(4, 512)" in done.stdout


def test_the_first_command_of_readme_is_scripts_serve_itself(serving: Serving) -> None:
    if not serving.by_script:
        pytest.skip("this environment was not made by scripts/: arcface serve stood for scripts/serve")
    assert "arcface_reference" in serving.printed and "passed (fp32: drift" in serving.printed


@pytest.mark.parametrize("beginning", NOT_RUN)
def test_what_is_not_run_is_still_on_a_page(beginning: str) -> None:
    lines = [line for block in RUNNABLE if block.language != "python" for line, _ in block.commands]
    assert any(line.startswith(beginning) for line in lines)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a  1.0 …\n", "x\na 1.0 2.0\nb\n", True),
        ("a\n…\nc\n", "a\nb\nb\nc\n", True),
        ("a\nc\n", "a\nb\nc\n", False),
        ("passed (fp32: drift …)", "refused (fp32: drift 1)", False),
        ("", "anything", True),
    ],
)
def test_what_a_page_shows_is_compared_with_what_is_printed(shown: str, printed: str, same: bool) -> None:
    assert matches(shown, printed) is same


def test_an_option_that_does_not_exist_is_found() -> None:
    check_options("arcface embed crops/ -o x.npz --url localhost:8001")
    with pytest.raises(click.NoSuchOption):
        check_options("arcface embed crops/ --outptu x.npz")
