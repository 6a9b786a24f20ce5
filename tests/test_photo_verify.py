"""photo_verify on a real server beside a photo_faces that answers as a test wants."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from arcface_build.serving.process import TritonProcess
from arcface_clients import PhotoEmbedder
from arcface_clients.errors import BackendUnavailable
from conftest import REPO

# A "photo" is what its face shall be: b"D W", the width of its embedding and the word that its contract consists of.
FACES = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        width, word = map(int, pb_utils.get_input_tensor_by_name(request, "image").as_numpy()[0].split())
        found = {
            "box": np.zeros((1, 4), np.float32),
            "embedding": np.full((1, width), width**-0.5, np.float32),
            "contract": np.full((1, 4), word, np.int32),
        }
        names = request.requested_output_names()
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(name, found[name]) for name in names])
"""
CONFIG = """name: "photo_faces"
backend: "python"
max_batch_size: 0
input [ { name: "image" data_type: TYPE_STRING dims: [ 1 ] } ]
output [
  { name: "box" data_type: TYPE_FP32 dims: [ -1, 4 ] },
  { name: "embedding" data_type: TYPE_FP32 dims: [ -1, -1 ] },
  { name: "contract" data_type: TYPE_INT32 dims: [ -1, 4 ] }
]
"""


@pytest.fixture
def server(start_triton, tmp_path: Path) -> TritonProcess:
    repository = tmp_path / "repository"
    shutil.copytree(REPO / "model_repository" / "photo_verify", repository / "photo_verify")
    (repository / "photo_faces" / "1").mkdir(parents=True)
    (repository / "photo_faces" / "config.pbtxt").write_text(CONFIG)
    (repository / "photo_faces" / "1" / "model.py").write_text(FACES)
    return start_triton(repository, ["photo_faces", "photo_verify"], config_name="")


def test_photos_that_two_models_embedded_are_not_compared_and_may_be_sent_again(server: TritonProcess) -> None:
    with PhotoEmbedder(server.grpc_url, retry_for_s=0) as photos:
        assert photos.verify(b"8 7", b"8 7").similarity == pytest.approx(1)
        for other in (b"8 9", b"16 9"):  # weights exchanged between the two, of the same width and of another
            with pytest.raises(BackendUnavailable, match="the photos were embedded by two models"):
                photos.verify(b"8 7", other)
