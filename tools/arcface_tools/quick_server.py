"""A tritonserver with a trivial model, which can be killed, restarted, and given another model under its clients."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

from arcface_build.serving.binary import find_tritonserver
from arcface_build.serving.ports import Ports, free_ports
from arcface_build.serving.process import TritonProcess
from arcface_clients.triton.address import Address
from arcface_clients.triton.admin_key import HTTP_HEADER, find_key

QUICK = "quick"
_QUICK_MODEL = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        contract = json.loads(args["model_config"])["parameters"]["contract_id"]["string_value"]
        self.words = np.frombuffer(bytes.fromhex(contract)[:16], ">i4").astype(np.int32)
        self.weights = np.random.default_rng(self.words[0]).standard_normal((7 * 7 * 3, 512)).astype(np.float32)

    def execute(self, requests):
        answers = []
        for request in requests:
            faces = pb_utils.get_input_tensor_by_name(request, "face").as_numpy()
            rows = (faces[:, ::16, ::16].reshape(len(faces), -1).astype(np.float32) - 127.5) @ self.weights
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
            words = np.tile(self.words, (len(faces), 1))
            tensors = {"embedding": rows / norms, "norm": norms, "contract": words}
            asked = request.requested_output_names()
            tensors = [pb_utils.Tensor(name, tensors[name]) for name in asked]
            answers.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return answers
"""
_QUICK_CONFIG = """
backend: "python"
max_batch_size: 64
input [ { name: "face" data_type: TYPE_UINT8 dims: [ 112, 112, 3 ] } ]
output [
  { name: "embedding" data_type: TYPE_FP32 dims: [ 512 ] },
  { name: "norm" data_type: TYPE_FP32 dims: [ 1 ] },
  { name: "contract" data_type: TYPE_INT32 dims: [ 4 ] }
]
instance_group [ { kind: KIND_CPU count: 1 } ]
parameters { key: "contract_id" value: { string_value: "CONTRACT" } }
"""
OUR_CONTRACT, OTHER_CONTRACT = "1" * 64, "2" * 64  # of the quick model, and of the one it is exchanged for


@dataclass
class QuickServer:
    """A tritonserver with the quick model, started again and again on the same ports."""

    folder: Path
    ports: Ports
    process: TritonProcess | None = None
    kills: int = 0
    stub_kills: int = 0

    def start(self) -> TritonProcess:
        """Start it and wait until it is ready."""
        self.process = TritonProcess(
            find_tritonserver(),
            self.folder / "repository",
            [QUICK],
            config_name="",
            log_path=self.folder / "tritonserver.log",
            ports=self.ports,
        ).start()
        self.process.wait_ready()
        return self.process

    def restart(self) -> None:
        """End it as a crash would, and start it again."""
        if self.process:
            self.process.kill()
            self.kills += 1
        self.start()

    def kill_stub(self) -> None:
        """End the process that runs the model, as a crash in it would; unload and load it, as Triton does not."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes()
                if b"triton_python_backend_stub" in line and os.fsencode(self.folder) in line:
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    self.stub_kills += 1
        time.sleep(0.5)  # the clients find it dead
        self.control("unload")
        self.control("load")

    def control(self, what: str) -> None:
        """Have the running server "load" or "unload" the model."""
        url = f"http://127.0.0.1:{self.ports.http}/v2/repository/models/{QUICK}/{what}"
        key = find_key(Address.parse(f"http://127.0.0.1:{self.ports.http}")) or ""
        urlopen(Request(url, b"{}", {HTTP_HEADER: key}), timeout=60).close()

    def serve(self, contract: str) -> None:
        """Write the model of this contract, with weights of its own."""
        version = self.folder / "repository" / QUICK / "1"
        version.mkdir(parents=True, exist_ok=True)
        (version / "model.py").write_text(_QUICK_MODEL)
        (version.parent / "config.pbtxt").write_text(_QUICK_CONFIG.replace("CONTRACT", contract))

    def exchange(self, noticed: threading.Event, done: threading.Event) -> None:
        """Load a model of another contract under the clients, and the former one when one of them noticed."""
        for contract in (OTHER_CONTRACT, OUR_CONTRACT):
            self.serve(contract)
            self.control("load")
            while contract == OTHER_CONTRACT and not (noticed.is_set() or done.wait(0.01)):
                pass
        noticed.clear()


@contextlib.contextmanager
def quick_server() -> Iterator[QuickServer]:
    """The quick server, not started yet; stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="arcface-bench-") as name:
        server = QuickServer(Path(name), free_ports())
        server.serve(OUR_CONTRACT)
        try:
            yield server
        finally:
            if server.process:
                server.process.stop()
