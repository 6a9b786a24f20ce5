"""The documented command serves our repository with Triton alone on a host without a GPU."""

from __future__ import annotations

import os
import shlex
import subprocess
import time

import numpy as np

from arcface_build.serving.ports import free_ports
from arcface_clients import TritonEmbedder
from arcface_clients.errors import ArcFaceError
from arcface_clients.faces.synthetic import synthetic_faces
from conftest import REPO
from deadlines import HANG_S


def test_the_command_for_a_cpu_host_serves_arcface(triton_binary, demo_repository, tmp_path):
    text = (REPO / "docs" / "operations.md").read_text()
    (line,) = [line for line in text.splitlines() if line.endswith("# a CPU host")]
    program, *options = shlex.split(line, comments=True)
    assert program == "tritonserver"
    ports = free_ports()
    options += [f"--http-port={ports.http}", f"--grpc-port={ports.grpc}", f"--metrics-port={ports.metrics}"]
    options += [f"--backend-directory={triton_binary.backend_directory}"] if triton_binary.backend_directory else []
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [triton_binary.path, *options],
            cwd=demo_repository.parent,
            env={**os.environ, **triton_binary.environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        with TritonEmbedder(f"localhost:{ports.grpc}", retry_for_s=90) as embedder:
            until = time.monotonic() + HANG_S
            faces = synthetic_faces(2)
            while True:
                try:
                    rows = embedder.encode(faces)
                    break
                except ArcFaceError:
                    assert server.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-2000:]
                    time.sleep(0.2)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
    finally:
        server.terminate()
        server.wait(HANG_S)
