"""Requests that schemathesis makes from docs/openapi.yaml, right ones and wrong ones, are answered as it says."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from arcface_build.serving.process import TritonProcess
from conftest import REPO

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
SCHEMA = schemathesis.openapi.from_path(REPO / "docs" / "openapi.yaml")
CALLS = [operation.ok() for operation in SCHEMA.get_all_operations()]
RAW = "inference-header-content-length"
PHOTOS = ("image", "image_a", "image_b", "data")
BOUNDED = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def photo(assets: Path) -> str:
    portrait = min(min((assets / "faces" / "raw250").iterdir()).iterdir())
    return base64.b64encode(portrait.read_bytes()).decode()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.label)
def test_what_is_made_from_the_document_is_answered_as_it_says(
    photo_server: TritonProcess, photo: str, call: Any, mode: Any
) -> None:
    seen, right = set(), mode is GenerationMode.POSITIVE

    @BOUNDED
    @given(case=call.as_strategy(generation_mode=mode), real=st.booleans() if right else st.just(False))
    def ask(case: Any, real: bool) -> None:
        if right:  # with a file and only with a file, which a document cannot say
            others = {name: value for name, value in (case.headers or {}).items() if name.lower() != RAW}
            case.headers = {**others, RAW: "0"} if case.media_type == "application/octet-stream" else others
        if real:
            case.body = with_photo(case.body, photo)
        response = case.call(base_url=f"http://{photo_server.http_url}", timeout=30)
        seen.add(response.status_code)
        case.validate_response(response, checks=[*CHECKS, *[not_a_server_error] * right])

    ask()
    assert seen <= ({200, 400} if right else {400, 500}), seen
    assert (200 if right else 400) in seen


def with_photo(body: Any, photo: str) -> Any:
    """The same with a photo that can be read wherever there is text for one."""
    if isinstance(body, dict):
        return {
            key: replaced(value, photo) if key in PHOTOS else with_photo(value, photo) for key, value in body.items()
        }
    if isinstance(body, list):
        return [with_photo(value, photo) for value in body]
    return body


def replaced(value: Any, photo: str) -> Any:
    if isinstance(value, str):
        return photo
    if isinstance(value, list):
        return [replaced(each, photo) for each in value]
    return with_photo(value, photo)
