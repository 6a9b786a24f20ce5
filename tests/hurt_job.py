"""A bulk job of 800 faces through two real tritonservers, which are killed, restarted and exchanged while it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from arcface_clients import TritonEmbedder
from arcface_clients.bulk.files import Files
from arcface_clients.bulk.parts import is_part, look_at_part, read_embeddings
from arcface_tools.quick_server import OTHER_CONTRACT, OUR_CONTRACT, QUICK, QuickServer, quick_server
from deadlines import HANG_S

COUNT, ROWS = 800, 4


class HurtJob:
    """The job's driver as a process, its servers and its output."""

    def __init__(self, servers: list[QuickServer], workers: str, output: str, source: str, folder: Path) -> None:
        """`workers`: "threads+", or "" for Ray; `folder`: of this host."""
        self.servers, self.output, self._source = servers, output, source
        self._mark = folder / "no-more-kills"
        urls = ",".join(f"127.0.0.1:{server.ports.grpc}#{self._mark}" for server in servers)
        self._line = [sys.executable, str(Path(__file__).with_name("bulk_driver.py")), output]
        self._line += [f"{workers}TritonUntil:{urls}", source]

    def start(self, environment: Mapping[str, str] = os.environ) -> None:
        """Start the driver, or start it again."""
        pipe = subprocess.PIPE
        self.driver = subprocess.Popen(self._line, env=dict(environment), stdout=pipe, stderr=pipe, text=True)

    def goes_on(self, parts: int = 2) -> None:
        """Wait for so many parts more.

        Raises:
            AssertionError: they do not come; with what the driver said.
        """
        wanted, deadline_s = self._parts() + parts, time.monotonic() + HANG_S
        while self._parts() < wanted:
            if self.driver.poll() is not None or time.monotonic() > deadline_s:
                self.driver.kill()
                raise AssertionError(f"it does not go on: {self.driver.communicate()[1][-3000:]}")
            time.sleep(0.05)

    def ends(self) -> tuple[int, str, str]:
        """Let it run as fast as it can; exit code, stdout, stderr."""
        self._mark.touch()
        told, errors = self.driver.communicate(timeout=HANG_S)
        return self.driver.returncode, told, errors

    def counts(self) -> dict[str, Any]:
        """What it counted at its end."""
        code, told, errors = self.ends()
        assert code == 0, errors[-3000:]
        return dict(json.loads(told.splitlines()[-1]))

    def check_rows(self, faces: np.ndarray) -> None:
        """Every face once, with the embedding and the contract of our model."""
        folder = Files().folder(self.output)
        parts = [name for name in folder.names() if is_part(name)]
        for name in parts:
            with Files().open(folder.of(name)) as source:
                part = look_at_part(source)
            assert part is not None
            assert part.contract_id == OUR_CONTRACT
        assert len(parts) == COUNT // ROWS
        names, rows = [], []
        for paths, _, embeddings in read_embeddings(self.output):
            names += paths
            rows.append(embeddings)
        assert names == [f"{self._source}[{i}]" for i in range(COUNT)]
        with TritonEmbedder(f"127.0.0.1:{self.servers[0].ports.grpc}", QUICK) as embedder:
            np.testing.assert_allclose(np.concatenate(rows), embedder.encode(faces), atol=1e-5)

    def _parts(self) -> int:
        return sum(map(is_part, Files().folder(self.output).names()))


def hurt_by_kills(job: HurtJob) -> None:
    """Kill one server, then the other, then both; each time the job goes on."""
    first, second = job.servers
    job.goes_on()
    kill(first)
    job.goes_on()
    first.start()
    job.goes_on()
    kill(second)
    job.goes_on()
    kill(first)
    second.start()
    job.goes_on()
    first.start()


def kill(server: QuickServer) -> None:
    """As a crash would."""
    assert server.process is not None
    server.process.kill()
    server.process = None
    server.kills += 1


def exchange(server: QuickServer, contract: str = OTHER_CONTRACT) -> None:
    """It crashes, and comes back with a model of another contract."""
    kill(server)
    server.serve(contract)
    server.start()


@contextmanager
def two_servers() -> Iterator[list[QuickServer]]:
    """Started."""
    with ExitStack() as stack:
        servers = [stack.enter_context(quick_server()) for _ in range(2)]
        for server in servers:
            server.start()
        yield servers


def some_faces() -> np.ndarray:
    """uint8 (COUNT,112,112,3), all different."""
    return np.random.default_rng(0).integers(0, 256, (COUNT, 112, 112, 3), dtype=np.uint8)
