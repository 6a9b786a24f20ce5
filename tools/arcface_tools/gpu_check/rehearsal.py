"""All stages on a host without a GPU: a host is put together from stand-ins, and the same program runs there.

The stand-ins are files in a folder that comes first on PATH and PYTHONPATH (nvidia-smi, TensorRT, a Python with torch,
libcuda), so that no stage knows whether this is a rehearsal. Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from arcface_clients.errors import Missing
from arcface_clients.gpu.driver import LIBRARY_VARIABLE
from arcface_tools.gpu_check.checkout import TESTS, load_from_tests

NVIDIA_SMI = """#!/bin/sh
case "$*" in
  *-lms*) while :; do echo "1410, 1215, 250.5, 61, 1024, 97"; sleep 0.1; done ;;
  --query*) echo "0, NVIDIA Stand-in, 8.6, 550.54.15, 23028, 312" ;;
  *) echo "CUDA Version: 12.4" ;;
esac
"""
SMALL = "--batches 1 3 --opt-batch 3 --faces 6 --sample-s 0.01 --warm-up-s 0 --replays 5 --callers 2 --gemm-size 64"


def rehearse(arguments: argparse.Namespace) -> int:
    """Run the stages on stand-ins in a process of its own; its exit code."""
    with tempfile.TemporaryDirectory(prefix="arcface-rehearsal-") as name:
        folder = Path(name)
        environment = stand_ins(folder)
        line = [sys.executable, "-m", "arcface_tools.gpu_check.run", *SMALL.split()]
        line += ["--networks", *networks(folder), "--budget-s", str(arguments.budget_s)]
        line += ["--state", str(folder / "state"), "--out", str((arguments.out or arguments.state).resolve())]
        line += [word for number in arguments.stage or () for word in ("--stage", str(number))]
        # The stub of Triton's python backend reads no PYTHONPATH, but has the server's working folder on its path.
        return subprocess.run(line, env=environment, cwd=folder, check=False).returncode


def stand_ins(folder: Path) -> dict[str, str]:
    """Make the stand-ins in a folder; the environment in which they are found.

    FAKE_TRT_VERSION, where it is set, is the version that TensorRT's stand-in is of.

    Raises:
        Missing: no C compiler for the stand-in of libcuda.
    """
    if not shutil.which("gcc"):
        raise Missing("a rehearsal compiles a stand-in for libcuda: expected gcc. Next: apt-get install gcc libc6-dev")
    places = [path for path in sys.path if path]
    # Our paths first: what imports this may be a stub without any of them.
    head = f"from __future__ import annotations\nimport sys\nsys.path[:0] = {places!r}\n"
    code = (TESTS / "fake_tensorrt.py").read_text().partition("from __future__ import annotations\n")[2]
    (folder / "tensorrt.py").write_text(head + code)
    _program(folder / "nvidia-smi", NVIDIA_SMI)
    (folder / "torch-only").mkdir()
    shutil.copyfile(TESTS / "fake_torch.py", folder / "torch-only" / "torch.py")
    paths = os.pathsep.join([str(folder / "torch-only"), *places])
    _program(folder / "python3", f'#!/bin/sh\nPYTHONPATH="{paths}" exec "{sys.executable}" "$@"\n')
    fake_cuda: Any = load_from_tests("fake_cuda")
    return {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(folder), *places]),
        "FAKE_TRT_VERSION": os.environ.get("FAKE_TRT_VERSION", "10.3.0"),
        LIBRARY_VARIABLE: str(fake_cuda.FakeCuda(folder).path),
    }


def networks(folder: Path) -> list[str]:
    """Two networks of milliseconds, as sources of an import."""
    import onnx

    tiny_nets: Any = load_from_tests("tiny_nets")
    found = []
    for seed, name in enumerate(("first", "second")):
        onnx.save(tiny_nets.tiny_net(seed=seed, dim=64), str(folder / f"{name}.onnx"))
        found.append(f"{name}={folder / f'{name}.onnx'}")
    return found


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
