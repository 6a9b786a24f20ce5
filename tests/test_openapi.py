"""docs/openapi.yaml describes the calls that take photos as the real server answers them, its refusals included."""

from __future__ import annotations

import base64
import http.client
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from arcface_build.serving.process import TritonProcess
from conftest import REPO

jsonschema = pytest.importorskip("jsonschema")
DOCUMENT = yaml.safe_load((REPO / "docs" / "openapi.yaml").read_text())
FACES, GENERATE, VERIFY = DOCUMENT["paths"]


@pytest.fixture(scope="module")
def texts(assets: Path) -> list[str]:
    """Base64 of a photo of two faces, of one of one, and of one of nobody."""
    import cv2

    folders = sorted((assets / "faces" / "raw250").iterdir())[:2]
    grey = cv2.imencode(".png", np.full((64, 64, 3), 127, np.uint8))[1].tobytes()
    return [base64.b64encode(data).decode() for data in (*(min(f.iterdir()).read_bytes() for f in folders), grey)]


def test_the_document_is_openapi() -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(DOCUMENT)


@pytest.mark.parametrize("photo", [0, 1, 2])
@pytest.mark.parametrize("parameters", [{}, {"min_score": 0.5}, {"max_faces": 1, "min_size": 20}, {"crop": True}])
def test_infer_answers_as_described(
    photo_server: TritonProcess, texts: list[str], photo: int, parameters: dict[str, Any]
) -> None:
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [texts[photo]]}
    request = {"id": "7", "parameters": parameters, "inputs": [image]}
    answer = described(photo_server, FACES, request, 200)
    assert answer["id"] == "7"
    rows = {output["shape"][0] for output in answer["outputs"]}
    assert len(rows) == 1
    assert ("crop" in {output["name"] for output in answer["outputs"]}) == bool(parameters.get("crop"))
    for output in answer["outputs"]:
        assert len(output["data"]) == np.prod(output["shape"])


def test_only_the_outputs_that_are_named_are_answered(photo_server: TritonProcess, texts: list[str]) -> None:
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [texts[0]]}
    request = {"inputs": [image], "outputs": [{"name": "box"}, {"name": "crop"}, {"name": "detector"}]}
    answer = described(photo_server, FACES, request, 200)
    assert {output["name"] for output in answer["outputs"]} == {"box", "crop", "detector"}


@pytest.mark.parametrize("photo", [0, 1, 2])
def test_generate_answers_as_described(photo_server: TritonProcess, texts: list[str], photo: int) -> None:
    uri = f"data:image/jpeg;base64,{texts[photo]}"
    for image in (texts[photo], uri):
        answer = described(photo_server, GENERATE, {"image": image, "min_score": 0.6}, 200)
        assert len(answer["box"]) == 4 * np.size(answer["score"])
        assert "detector" not in answer
    answer = described(photo_server, GENERATE, {"image": texts[photo], "min_score": 0.6, "detector": True}, 200)
    assert " min_score=0.6 min_size=16 max_faces=512 " in answer["detector"]


@pytest.mark.parametrize("second", [1, 2])
def test_verify_answers_as_described(photo_server: TritonProcess, texts: list[str], second: int) -> None:
    request = {"image_a": texts[0], "image_b": texts[second], "max_distance": 0.5, "min_score": 0.65, "max_faces": 2}
    answer = described(photo_server, VERIFY, request, 200)
    assert (answer["similarity"] == []) == (second == 2)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (GENERATE, {"image": "no photo"}),
        (GENERATE, {"image": ""}),
        (GENERATE, {"image": "PHOTO", "max_faces": 0}),
        (GENERATE, {"image": "PHOTO", "min_score": "high"}),
        (GENERATE, {"picture": "PHOTO"}),
        (FACES, {"inputs": []}),
        (FACES, {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": ["PHOTO", "PHOTO"]}]}),
        (FACES, {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1], "data": [1.0]}]}),
        (VERIFY, {"image_a": "PHOTO"}),
        (VERIFY, {"image_a": "PHOTO", "image_b": "PHOTO", "max_distance": 3}),
    ],
)
def test_wrong_requests_are_refused_as_described(
    photo_server: TritonProcess, texts: list[str], path: str, wrong: dict[str, Any]
) -> None:
    described(photo_server, path, json.loads(json.dumps(wrong).replace("PHOTO", texts[1])), 400, valid=False)


def described(
    server: TritonProcess, path: str, request: dict[str, Any], status: int, *, valid: bool = True
) -> dict[str, Any]:
    """The answer to a JSON request, which has to have this status and the form that the document gives it."""
    call = DOCUMENT["paths"][path]["post"]
    if valid:
        check(request, call["requestBody"]["content"]["application/json"]["schema"])
    host, port = server.http_url.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    body = reply.read()
    connection.close()
    assert reply.status == status, body[:300]
    response = call["responses"][str(status)]
    if "$ref" in response:
        response = DOCUMENT["components"]["responses"][response["$ref"].rsplit("/", 1)[1]]
    answer: dict[str, Any] = json.loads(body)
    check(answer, response["content"]["application/json"]["schema"])
    return answer


def check(instance: object, schema: dict[str, Any]) -> None:
    """Validate against a schema of the document, whose references stay within it."""
    jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(instance)
