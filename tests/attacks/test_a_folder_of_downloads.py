"""Whoever has a file written into the folder where a command is started does not have it run as a Python module."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from arcface_build.child_process import module_line
from arcface_build.cli import main
from arcface_build.repository.find import find_repository
from arcface_build.serving.binary import TritonBinary
from arcface_build.serving.ports import free_ports
from arcface_build.serving.process import TritonProcess
from arcface_build.shipped import config_table
from arcface_clients.config.sources import load_config
from arcface_clients.errors import WrongUse
from deadlines import HANG_S

# Of the standard library, of what we need, and of what we try to import and may not be there.
NAMES = (
    "json",
    "runpy",
    "numpy",
    "onnx",
    "onnxruntime",
    "yaml",
    "pip",
    "tritonclient",
    "arcface_clients",
    "matplotlib",
)
# As the program `arcface` is started: `python -c` has the folder on its path.
PROGRAM = "import sys; sys.path.remove(''); from arcface_build.program import main; main()"


def plant(folder: Path) -> Path:
    """Modules that say which of them was run; returns where they say it."""
    told = folder / "told"
    for name in NAMES:
        (folder / f"{name}.py").write_text(
            f"open({str(told)!r}, 'a').write(__name__ + ' '); raise SystemExit('planted')"
        )
    return told


def arcface(folder: Path, *line: str) -> None:
    """The program, run there; it has to succeed."""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_file_in_the_folder_of_a_command_is_not_run_as_a_module(triton_binary: TritonBinary, tmp_path: Path) -> None:
    told = plant(tmp_path)
    ports = [word for name, port in free_ports().named().items() for word in (f"--{name}-port", str(port))]
    arcface(tmp_path, "import", "demo")  # in a child process
    assert not told.exists(), told.read_text()
    arcface(tmp_path, "serve", "--once", *ports)  # forms measured in children, and Python models in stubs
    assert not told.exists(), told.read_text()


def test_a_module_is_run_as_a_program_without_the_current_folder(tmp_path: Path) -> None:
    told = plant(tmp_path)
    line = module_line("pip", "--version")
    done = subprocess.run(line, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("pip ") and not told.exists()
    unsafe = subprocess.run([sys.executable, "-m", "pip", "--version"], cwd=tmp_path, capture_output=True, check=False)
    assert unsafe.returncode != 0 and told.exists(), "the plant is harmless, so the test shows nothing"


def test_a_link_in_the_place_of_the_servers_log_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "of_somebody_else"
    log = tmp_path / "tritonserver-8000.log"
    for there in (False, True):
        if there:
            other.write_text("kept")
        log.symlink_to(other)
        server = TritonProcess(TritonBinary(Path("/bin/true")), tmp_path, [], log_path=log, ports=free_ports())
        with server:
            assert not log.is_symlink(), "the server writes through the link"
        assert (other.read_text() if there else not other.exists()) in ("kept", True)
        log.unlink()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make files of another user")
def test_what_another_user_put_where_a_command_looks_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, stranger = tmp_path / "shared", 65534
    for name in ("model_repository/arcface/config.pbtxt", "config/models.yaml", "config/embedding.yaml"):
        (shared / name).parent.mkdir(parents=True, exist_ok=True)
        (shared / name).write_text("")
    work = shared / "work"
    work.mkdir()
    looks = (find_repository, partial(config_table, "models.yaml"))

    def owned_by(uid: int, mode: int) -> None:
        for path in (*shared.rglob("*"), shared):
            os.chown(path, uid if path not in (work, shared) else 0, 0)
        shared.chmod(mode)

    owned_by(stranger, 0o1777)  # as /tmp
    monkeypatch.chdir(work)
    for look in looks:
        with pytest.raises(WrongUse, match="belongs to another user"):
            look()
    monkeypatch.chdir(shared)
    for look in (*looks, load_config):
        with pytest.raises(WrongUse, match="belongs to another user"):
            look()
    assert find_repository(shared / "model_repository"), "who names it means it"
    owned_by(stranger, 0o755)  # as a volume in a container
    assert find_repository() and load_config()
    os.chown(work, stranger, 0)  # a folder within somebody's project
    monkeypatch.chdir(work)
    assert find_repository()
    owned_by(0, 0o1777)
    assert find_repository()


def test_a_name_of_a_file_neither_steers_the_terminal_nor_writes_a_line_of_its_own(
    server: TritonProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "\x1b]0;title\x07a\nall is well.jpg"
    (tmp_path / name).write_bytes(b"torn")
    with pytest.raises(SystemExit):
        main(["embed", str(tmp_path / name), "-o", str(tmp_path / "out.npz"), "--url", server.grpc_url])
    told = capsys.readouterr().err
    assert "\\x1b]0;title\\x07a\\nall is well.jpg: not an image" in told
    assert "\x1b]0" not in told
