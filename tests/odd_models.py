"""Models that misbehave, for a real tritonserver: each is one python-backend model in a repository of the test's own.

The embedding is a fixed projection of the face, so a late, lost, doubled or misplaced answer is seen in the numbers.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from arcface_clients.atomic import new_file
from deadlines import wait_until

MARKED = np.full((1, 112, 112, 3), 255, np.uint8)  # what `slow` answers only when it is not held
MODEL = """
import json, pathlib, time
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.name, self.folder = args["model_name"], args["model_repository"]
        config = json.loads(args["model_config"])
        contract = config["parameters"]["contract_id"]["string_value"]
        seed, self.words = 5, None
        if len(contract) == 64:  # weights of their own, and rows that name them
            self.words = np.frombuffer(bytes.fromhex(contract)[:16], ">i4").astype(np.int32)
            seed = int(contract[:4], 16)
        self.weights = np.random.default_rng(seed).standard_normal((28 * 28 * 3, 64)).astype(np.float32)

    def execute(self, requests):
        answers = []
        for request in requests:
            faces = pb_utils.get_input_tensor_by_name(request, "face").as_numpy()
            if self.name == "slow" and faces[0, 0, 0].min() == 255:  # only a marked face is slow
                self.wait_while_held()
            if self.name == "failing":
                error = pb_utils.TritonError("the network gave up on purpose")
                answers.append(pb_utils.InferenceResponse(output_tensors=[], error=error))
                continue
            rows = (faces[:, ::4, ::4].reshape(len(faces), -1).astype(np.float32) - 127.5) @ self.weights
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            if self.name == "nan":
                rows[-1] = np.nan
            if self.name == "long":
                rows *= 3
            tensors = [pb_utils.Tensor("embedding", rows)]
            if self.words is not None:
                lengths = np.full((len(faces), 1), 20, np.float32)
                words = np.tile(self.words, (len(faces), 1))
                tensors += [pb_utils.Tensor("norm", lengths), pb_utils.Tensor("contract", words)]
            answers.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return answers

    def wait_while_held(self):
        mine = self.holder()
        if mine:
            pathlib.Path(self.folder, "begun").write_text(mine)
        while mine and self.holder() == mine:
            time.sleep(0.01)

    def holder(self):
        try:
            return pathlib.Path(self.folder, "held").read_text()
        except FileNotFoundError:
            return None
"""
CONFIG = """
backend: "python"
max_batch_size: 8
input [ {{ name: "face" data_type: TYPE_UINT8 dims: [ 112, 112, 3 ] }} ]
output [ {{ name: "embedding" data_type: TYPE_FP32 dims: [ {width} ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
dynamic_batching {{ }}
parameters {{ key: "contract_id" value: {{ string_value: "{contract}" }} }}
"""
NAMED = """
output [ { name: "norm" data_type: TYPE_FP32 dims: [ 1 ] }, { name: "contract" data_type: TYPE_INT32 dims: [ 4 ] } ]
"""
LEFT, RIGHT = "1" * 64, "2" * 64  # two contracts


@contextmanager
def held(repository: Path) -> Iterator[Callable[[], None]]:
    """`slow` answers no marked face before the block ends; what is yielded waits until it has begun with one."""
    hold, begun, name = repository / "slow" / "held", repository / "slow" / "begun", uuid.uuid4().hex

    with new_file(hold) as temporary:
        temporary.write_text(name)  # a face of the block before is let go by another name
    try:
        yield lambda: wait_until(lambda: begun.exists() and begun.read_text() == name, "no marked face has come")
    finally:
        hold.unlink()


def write_model(
    repository: Path, name: str, *, contract: str = "odd", width: int = 64, config: str | None = None
) -> None:
    """Put the model `name` into a repository; its name says how it misbehaves, any other name behaves.

    A `contract` of 64 digits has weights of its own, and the outputs `norm` and `contract`.
    """
    folder = repository / name
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "1" / "model.py").write_text(MODEL)
    text = config or CONFIG.format(width=width, contract=contract)
    if len(contract) == 64:
        text += NAMED
    (folder / "config.pbtxt").write_text(text)


def write_models(repository: Path) -> list[str]:
    """All the models of `odd_server`; returns their names."""
    open_width = CONFIG.format(width=-1, contract="odd")
    for name in ("good", "slow", "failing", "nan", "long"):
        write_model(repository, name)
    write_model(repository, "named", contract=LEFT)
    write_model(repository, "open", config=open_width)
    write_model(repository, "foreign", config=open_width.replace("TYPE_UINT8", "TYPE_FP32"))
    return sorted(folder.name for folder in repository.iterdir())
