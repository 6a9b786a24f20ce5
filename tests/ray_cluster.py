"""A Ray cluster of `ray start` processes on this host, each node in a process group of its own that can be killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START_S = 90  # a busy host


class RayCluster:
    """A head without CPUs for actors, and nodes with one CPU each; `environment` is what their actors see."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # the paths of Ray's sockets must be short
        # a token of this host's user must not decide whether a test's driver may connect
        self._environment = {**os.environ, **environment, "RAY_AUTH_MODE": "disabled"}
        self._environment.pop("RAY_ADDRESS", None)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.nodes: list[subprocess.Popen[bytes]] = []
        head = ["--head", "--port", self.address.rpartition(":")[2], "--num-cpus", "0", "--temp-dir", self._folder]
        head += ["--node-ip-address", "127.0.0.1"]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._start("head", *head, "--include-dashboard", "false")
        _wait_for(self.address)

    @property
    def environment(self) -> dict[str, str]:
        """Of a driver."""
        return {**self._environment, "RAY_ADDRESS": self.address}

    def add_node(self, cpus: int = 1) -> subprocess.Popen[bytes]:
        """An address of its own: a driver takes the node that has its address for its own, and dies with it."""
        number = len(self._processes) + 1
        place = ["--address", self.address, "--node-ip-address", f"127.0.0.{number}"]
        return self._start(f"node-{number}", *place, "--num-cpus", str(cpus))

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        line = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        with (Path(self._folder) / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*line, *arguments, "--object-store-memory", "100000000"],
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """As when a machine loses its power."""
        for pid in _below(node.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        node.wait()

    def stop(self) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                self.kill(process)
        shutil.rmtree(self._folder, ignore_errors=True)


def _below(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
    return found


def _wait_for(address: str) -> None:
    host, _, port = address.partition(":")
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        try:
            socket.create_connection((host, int(port)), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"no Ray at {address}")
