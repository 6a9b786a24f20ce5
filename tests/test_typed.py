"""What a type checker sees of the clients: a user's program passes mypy --strict, a slip in it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PROGRAM = REPO / "tests" / "typed" / "pipeline.py"
SLIPS = {  # what is wrong -> what mypy says of it
    'TritonEmbedder("gpu:8001", timeout=3)': 'Unexpected keyword argument "timeout" for "TritonEmbedder"',
    'TritonEmbedder("gpu:8001", shared_memory="yes")': 'Argument "shared_memory" to "TritonEmbedder" has incompatible',
    'TritonEmbedder("gpu:8001").encode("faces.npy")': 'Argument 1 to "encode" of "TritonEmbedder" has',
    "FallbackEmbedder([object()])": "List item 0 has incompatible type",
    'rows: int = FakeEmbedder().encode("")': "Incompatible types in assignment",
}


def mypy(program: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", "--strict", str(program)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)


def test_a_users_program_passes_strict_type_checking() -> None:
    result = mypy(PROGRAM)
    assert result.returncode == 0, result.stdout + result.stderr


def test_slips_are_found(tmp_path: Path) -> None:
    program = tmp_path / "slips.py"
    program.write_text(
        "from arcface_clients import FakeEmbedder, FallbackEmbedder, TritonEmbedder\n" + "\n".join(SLIPS)
    )
    said = mypy(program).stdout.splitlines()
    for number, words in enumerate(SLIPS.values(), start=2):
        assert any(f"slips.py:{number}: error:" in line and words in line for line in said), said
