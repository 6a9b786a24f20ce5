"""`arcface serve` as a child process of a test."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from arcface_build.serving.ports import Ports, free_ports
from arcface_build.serving.process import TritonProcess
from arcface_clients.triton.address import Address, Connection
from arcface_clients.triton.admin_key import admin_headers
from deadlines import HANG_S

MAIN = "import sys; from arcface_build.cli import main; main(sys.argv[1:])"
NO_WAY_OUT = {"http_proxy": "http://127.0.0.1:9", "grpc_proxy": "http://127.0.0.1:9"}  # loopback needs no proxy


class Serving:
    """`arcface serve` of a test, on free ports; what it says is collected."""

    def __init__(self, repository: Path, *options: str, **environment: str) -> None:
        self.repository = repository
        self.ports: Ports = free_ports()
        line = [sys.executable, "-c", MAIN, "serve", "--model-repository", str(repository), *options]
        for name, port in self.ports.named().items():
            line += [f"--{name}-port", str(port)]
        self.said: list[str] = []
        self.process = subprocess.Popen(
            line,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **NO_WAY_OUT, **environment},
        )
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()
        self.wait_for("Ctrl-C stops it.")

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.said.append(line)

    def wait_for(self, words: str, times: int = 1, timeout_s: float = HANG_S) -> None:
        until = time.monotonic() + timeout_s
        while sum(words in line for line in list(self.said)) < times:
            assert time.monotonic() < until and self.process.poll() is None, "".join(self.said)
            time.sleep(0.05)

    def stub(self, model: str = "arcface_onnx") -> int:
        """The process behind a model."""
        for line in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = line.read_bytes().decode().split("\0")
            except OSError:
                continue
            if "triton_python_backend_stub" in words[0] and f"{self.repository}/{model}/" in words[1]:
                return int(line.parent.name)
        raise AssertionError("no stub runs")

    def stop(self) -> None:
        """End it as Ctrl-C does."""
        self.process.terminate()
        assert self.process.wait(HANG_S) == 0, "".join(self.said)
        self.listener.join()
        self.process.stdout.close()


def control(server: TritonProcess, verb: str, model: str) -> None:
    """Have a server load or unload a model."""
    connection = Connection(Address.parse(f"http://{server.http_url}"))
    url = f"http://{server.http_url}/v2/repository/models/{model}/{verb}"
    with urllib.request.urlopen(
        urllib.request.Request(url, b"{}", admin_headers(connection), method="POST"), timeout=HANG_S
    ) as answer:
        assert answer.status == 200
