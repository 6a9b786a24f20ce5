"""What importing costs: the clients load numpy and nothing heavy, the command line nothing that a subcommand wants."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "onnx",
    "onnxruntime",
    "tensorrt",
    "insightface",
    "boto3",
    "tritonclient",
    "polygraphy",
    "cv2",
    "sklearn",
    "pydantic",
)


@pytest.mark.parametrize(
    "statement", ["import arcface_clients", "import arcface_clients.contract", "import arcface_build.cli"]
)
def test_importing_loads_nothing_heavy(statement):
    code = f"import sys; {statement}; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_client_over_grpc_loads_nothing_but_numpy_and_tritonclient():
    others = ("aiohttp", "click", "rich", "pydantic", "yaml", "gevent", "cv2")
    code = f"""
import sys
from arcface_clients import TritonEmbedder
try:
    TritonEmbedder("127.0.0.1:9", retry_for_s=0).ensure_ready()
except Exception as exc:
    print(type(exc).__name__, "tritonclient" in sys.modules, [m for m in {others!r} if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("ServerUnreachable True []\n", "")


def test_every_public_name_can_be_imported():
    import arcface_clients

    for name in arcface_clients.__all__:
        assert getattr(arcface_clients, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    import arcface_clients

    with pytest.raises(AttributeError, match="no attribute 'Embeder'"):
        _ = arcface_clients.Embeder
