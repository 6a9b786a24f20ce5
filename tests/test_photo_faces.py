"""Photos in, faces out, by the real server: as our own detector finds them, over every way that a photo can come."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arcface_build.repository.detector import install_detector, photo_models
from arcface_build.serving.binary import TritonBinary
from arcface_build.serving.process import TritonProcess, free_ports
from arcface_clients import PhotoEmbedder, TritonEmbedder
from arcface_clients.faces.detect import MODEL_NAME, FaceDetector
from conftest import REPO

STEPS = ("decode", "detect", "align")


@pytest.fixture(scope="module")
def photo_server(
    triton_binary: TritonBinary, demo_repository: Path, assets: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonProcess]:
    """A tritonserver with the demo network and the models that take photos."""
    install_detector(assets / "detectors" / MODEL_NAME, demo_repository)
    models, _ = photo_models(demo_repository)
    options = {"log_path": tmp_path_factory.mktemp("photos") / "tritonserver.log", "ports": free_ports()}
    with TritonProcess(triton_binary, demo_repository, ["arcface", *models], **options) as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="module")
def portraits(assets: Path) -> list[Path]:
    """Twelve photos of 250×250; some show more than one face."""
    return [sorted(folder.iterdir())[0] for folder in sorted((assets / "faces" / "raw250").iterdir())[:12]]


@pytest.fixture(scope="module")
def detector(assets: Path) -> FaceDetector:
    return FaceDetector(assets / "detectors" / MODEL_NAME)


@pytest.mark.parametrize("step", STEPS)
def test_the_served_steps_are_the_files_of_the_package(step: str) -> None:
    served = REPO / "model_repository" / "photo_faces" / "1" / f"{step}.py"
    ours = REPO / "clients" / "arcface_clients" / "faces" / "steps" / f"{step}.py"
    assert served.read_bytes() == ours.read_bytes(), f"cp {ours} {served}"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_server_finds_what_the_client_finds(
    photo_server: TritonProcess, portraits: list[Path], detector: FaceDetector, protocol: str
) -> None:
    url = photo_server.grpc_url if protocol == "grpc" else f"http://{photo_server.http_url}"
    with PhotoEmbedder(url, crops=True) as photos, TritonEmbedder(photo_server.grpc_url) as embedder:
        for portrait in portraits:
            expected, found = detector.detect_encoded(portrait.read_bytes()), photos.faces(portrait)
            assert len(found) == len(expected)
            for mine, theirs in zip(expected, found, strict=True):
                assert np.allclose(theirs.box, mine.box, atol=1e-3)
                assert np.allclose(theirs.landmarks, mine.landmarks, atol=1e-3)
                assert theirs.score == pytest.approx(mine.score, abs=1e-5)
                assert theirs.crop is not None
                embedding, norm = embedder.encode_with_norms(mine.face)
                assert embedding[0] @ theirs.embedding >= 0.9999
                assert theirs.norm == pytest.approx(norm[0], rel=1e-2)


def test_plain_http_takes_the_file_base64_and_generate(photo_server: TritonProcess, portraits: list[Path]) -> None:
    data = portraits[0].read_bytes()
    text = base64.b64encode(data).decode()
    as_json = {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [text]}]}
    status, _, answer = post(photo_server, "infer", json.dumps(as_json).encode())
    assert status == 200
    outputs = {output["name"]: output for output in json.loads(answer)["outputs"]}
    faces = outputs["score"]["shape"][0]
    assert faces >= 1
    assert outputs["embedding"]["shape"] == [faces, 512]
    assert "crop" not in outputs  # 37,632 numbers a face, in JSON: only for who asks
    status, headers, answer = post(photo_server, "infer", data, {"Inference-Header-Content-Length": "0"})
    head = json.loads(answer[: int(headers["Inference-Header-Content-Length"])])
    assert status == 200
    assert {output["name"]: output["shape"] for output in head["outputs"]} == {
        name: output["shape"] for name, output in outputs.items()
    }
    status, _, answer = post(photo_server, "generate", json.dumps({"image": text}).encode())
    assert status == 200
    assert len(np.ravel(json.loads(answer)["embedding"])) == faces * 512


def test_no_face_is_an_answer(photo_server: TritonProcess) -> None:
    with PhotoEmbedder(photo_server.grpc_url) as photos:
        assert photos.faces(np.full((300, 200, 3), 127, np.uint8)) == []


def post(
    server: TritonProcess, method: str, body: bytes, headers: dict[str, str] | None = None, model: str = "photo_faces"
) -> tuple[int, dict[str, Any], bytes]:
    """Status, headers and body of a request without any client of ours."""
    host, port = server.http_url.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    try:
        connection.request("POST", f"/v2/models/{model}/{method}", body, headers or {})
        reply = connection.getresponse()
        return reply.status, dict(reply.headers), reply.read()
    finally:
        connection.close()
