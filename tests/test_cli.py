"""The command line as a whole: help for each subcommand, exit codes, one line for an error."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

from arcface_build.cli import COMMANDS
from conftest import REPO
from deadlines import HANG_S


def arcface(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from arcface_build.cli import main; main(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=HANG_S)


def test_ctrl_c_while_python_imports_shows_no_traceback():
    code = """
import sys
class Slow:  # finds nothing, and is interrupted while it looks for click
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            import os, signal
            os.kill(os.getpid(), signal.SIGINT)
import arcface_build.program
sys.meta_path.insert(0, Slow())
arcface_build.program.main()
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S)
    assert (answer.returncode, answer.stderr) == (-signal.SIGINT, ""), "a shell calls this 130"


def test_a_current_folder_that_was_removed_is_named_as_the_cause(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    code = f"import os; os.chdir({str(here)!r}); os.rmdir({str(here)!r})\n"
    code += "from arcface_build.cli import main\nmain(['serve'])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S)
    assert answer.returncode == 3 and answer.stderr.count("\n") == 1
    assert "Next: cd into a folder that exists: the one in which this runs was removed" in answer.stderr


def test_an_unknown_subcommand_is_wrong_use():
    answer = arcface("servve")
    assert answer.returncode == 2
    assert "no such command 'servve': did you mean 'serve'?" in answer.stderr


def test_an_error_is_one_line_with_its_class_and_exit_code(tmp_path):
    (tmp_path / "somebody's").touch()  # an empty folder would be made into one
    answer = arcface("serve", "--model-repository", str(tmp_path))
    assert answer.returncode == 3
    assert answer.stderr == (f"Missing: {tmp_path} is not our model repository: expected arcface/config.pbtxt in it.\n")


def test_every_command_module_is_registered():
    folder = REPO / "build" / "arcface_build" / "commands"
    modules = {
        path.stem
        for path in folder.glob("*.py")
        if "\ncommand" in path.read_text() or "\ndef command(" in path.read_text()
    }
    assert modules == {module for module, _ in COMMANDS.values()}


def test_readme_names_every_subcommand_and_no_other():
    named = set(re.findall(r"\barcface ([a-z][a-z-]*)", (REPO / "README.md").read_text()))
    assert named <= set(COMMANDS), f"README names subcommands that do not exist: {named - set(COMMANDS)}"
    assert named >= set(COMMANDS), f"README does not mention: {set(COMMANDS) - named}"


def test_readme_names_every_subcommand_of_plan():
    from arcface_build.commands.plan import COMMANDS as PLAN_COMMANDS

    (line,) = re.findall(r"^\| `arcface plan` \| .*: (.*) \|$", (REPO / "README.md").read_text(), re.MULTILINE)
    assert set(line.split(", ")) == set(PLAN_COMMANDS)
