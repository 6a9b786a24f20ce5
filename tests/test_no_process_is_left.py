"""However a server ends, nothing of it goes on running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest

from arcface_build.serving.ports import free_ports
from deadlines import wait_until

SLEEPER = """
import time
import uuid
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        open("{begun}", "w").close()
        time.sleep(300)
"""
CONFIG = """
backend: "python"
max_batch_size: 0
input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""


def members(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


SOON_S = 30  # what they do takes minutes


STARTER = """
import sys, time
from pathlib import Path
from arcface_build.serving.binary import find_tritonserver
from arcface_build.serving.ports import Ports
from arcface_build.serving.process import TritonProcess

repository, log, *ports = sys.argv[1:]
server = TritonProcess(
    find_tritonserver(), Path(repository), ["sleeper"], config_name="", log_path=Path(log),
    ports=Ports(*map(int, ports)), exit_timeout_s=1,
)
server.start().wait_ready()
print(server.pid, flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("killed", ["the server", "who started it"])
def test_a_stub_in_the_middle_of_a_batch_is_ended(triton_binary, tmp_path, killed):
    from tritonclient.grpc import InferenceServerClient, InferInput

    model, begun, ports = tmp_path / "repository" / "sleeper", tmp_path / "begun", free_ports()
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(CONFIG)
    (model / "1" / "model.py").write_text(SLEEPER.format(begun=begun))
    line = [sys.executable, "-c", STARTER, model.parent, tmp_path / "log", *map(str, ports.named().values())]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as starter:
        group = int(starter.stdout.readline())
        try:
            with InferenceServerClient(f"127.0.0.1:{ports.grpc}") as client:
                x = InferInput("x", [1], "FP32")
                x.set_data_from_numpy(np.zeros(1, np.float32))
                client.async_infer("sleeper", [x], lambda result, error: None)
                wait_until(begun.exists, "the batch does not begin")
                assert len(members(group)) == 3  # the server, its stub, and what ends the rest
                os.kill(group if killed == "the server" else starter.pid, signal.SIGKILL)
                wait_until(lambda: not members(group), "processes are left", SOON_S)
        finally:
            starter.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


BEGINS = """
import subprocess, sys
from arcface_build.serving.launcher import launcher

line = [*launcher(1, regions=sys.argv[1]), sys.executable, "-c", sys.argv[2]]
subprocess.run(line, start_new_session=True, stdin=subprocess.PIPE)
"""


def test_shared_memory_goes_with_a_server_whose_starter_is_killed_before_it_is_ready_and_no_other_does(tmp_path):
    mine, another = (Path("/dev/shm") / f"arcface_{uuid.uuid4().hex}_1" for _ in range(2))
    another.touch()
    server = f"import pathlib, time; pathlib.Path({str(mine)!r}).touch(); time.sleep(60)"
    try:
        with subprocess.Popen([sys.executable, "-c", BEGINS, mine.name.removesuffix("1"), server]) as starter:
            wait_until(mine.exists, "it did not start")
            starter.kill()
        wait_until(lambda: not mine.exists(), "its shared memory is still there", SOON_S)
        assert another.exists()
    finally:
        another.unlink()
        mine.unlink(missing_ok=True)
