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

from deadlines import HANG_S

STARTS = 3  # of a node: on a busy host Ray gives up after 30 s of its own
STARTED = "Ray runtime started."  # said once the head knows the node


class Node:
    """A `ray start` process with what it started."""

    def __init__(self, folder: Path, environment: dict[str, str], *arguments: str) -> None:
        """A folder of its own: two nodes that start at once in one take the same socket, and one of them aborts."""
        folder.mkdir()
        self._log = folder / "start.log"
        line = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        line += [*arguments, "--temp-dir", str(folder), "--object-store-memory", "100000000"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(line, env=environment, stdout=log, stderr=log, start_new_session=True)

    def has_joined(self) -> bool:
        """Wait until it has; False where it gave up."""
        deadline_s = time.monotonic() + HANG_S
        while time.monotonic() < deadline_s and self.process.poll() is None:
            if STARTED in self._log.read_text():
                return True
            time.sleep(0.05)
        self.kill()
        return False

    def kill(self) -> None:
        """As when a machine loses its power."""
        for pid in _below(self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    @property
    def said(self) -> str:
        """The end of what it printed."""
        return self._log.read_text()[-2000:]


class RayCluster:
    """A head without CPUs for actors, and nodes with one CPU each; `environment` is what their actors see."""

    def __init__(self, environment: dict[str, str], nodes: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # the paths of Ray's sockets must be short
        # a token of this host's user must not decide whether a test's driver may connect
        self._environment = {**os.environ, **environment, "RAY_AUTH_MODE": "disabled"}
        self._environment.pop("RAY_ADDRESS", None)
        self.nodes: list[Node] = []
        self._started: list[Node] = []
        try:
            self._start_head()
            self.add_nodes(nodes)
        except BaseException:
            self.stop()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """Of a driver."""
        return {**self._environment, "RAY_ADDRESS": self._address}

    def add_nodes(self, count: int) -> None:
        """Start nodes at once; back when all of them have joined."""
        for _ in range(STARTS):
            starting = [self._start_node() for _ in range(count)]
            joined = [node for node in starting if node.has_joined()]
            self.nodes += joined
            count -= len(joined)
            if not count:
                return
        raise TimeoutError(f"a node of Ray does not start: {starting[-1].said}")

    def kill_node(self) -> None:
        """The one that joined last."""
        self.nodes.pop().kill()

    def stop(self) -> None:
        for node in reversed(self._started):
            if node.process.poll() is None:
                node.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start_head(self) -> None:
        for _ in range(STARTS):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            self._address = f"127.0.0.1:{port}"
            head = self._start("--head", "--port", str(port), "--num-cpus", "0", "--include-dashboard", "false")
            if head.has_joined():
                return
        raise TimeoutError(f"Ray does not start: {head.said}")

    def _start_node(self) -> Node:
        """An address of its own: a driver takes the node that has its address for its own, and dies with it."""
        address = f"127.0.0.{len(self._started) + 2}"
        return self._start("--address", self._address, "--node-ip-address", address, "--num-cpus", "1")

    def _start(self, *arguments: str) -> Node:
        node = Node(self._folder / str(len(self._started)), self._environment, *arguments)
        self._started.append(node)
        return node


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
