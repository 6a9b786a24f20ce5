"""The pipeline's door: one line of configuration switches engines and back, on real engines and a real server."""

from __future__ import annotations

import logging
import time

import numpy as np
import onnxruntime
import pytest

from arcface_clients import get_embedding_backend
from arcface_clients.config.sources import load_config
from arcface_clients.errors import BackendUnavailable, ConfigError, ContractMismatch, InvalidFaces
from arcface_clients.evidence.drift import compare_embeddings
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.pipeline import Link, backend_chain
from tiny_model import write_model

FACES = synthetic_faces(5)


@pytest.fixture
def settings(tmp_path):
    """settings(text): a configuration file with a tiny model and no server; further lines may be added."""
    write_model(tmp_path / "models" / "tiny")

    def settings(**keys: str) -> str:
        keys = {
            "device": "cpu",
            "local": f"{{models_dir: {tmp_path}/models, threads: 1}}",
            "triton": '{url: "127.0.0.1:1", retry_for_s: 0, timeout_s: 2}',
            "validation": "{eval_set_size: 2}",
            **keys,
        }
        file = tmp_path / "embedding.yaml"
        file.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
        return str(file)

    return settings


def test_changing_one_line_switches_the_engine_and_back(settings):
    seen = {}
    for step, backend in enumerate(["onnx", "insightface", "onnx"]):
        with get_embedding_backend(config=settings(backend=backend)) as engine:
            seen[step] = (engine.encode(FACES), engine.last_engine)
    assert [name for _, name in seen.values()] == ["onnx", "insightface", "onnx"]
    assert compare_embeddings(seen[1][0], seen[0][0]).min_cosine > 0.99999
    assert np.array_equal(seen[0][0], seen[2][0])


def test_one_variable_is_the_rollback(settings, monkeypatch):
    file = settings(backend="onnx")
    monkeypatch.setenv("ARCFACE_BACKEND", "pytorch")
    with get_embedding_backend(config=file) as engine:
        engine.encode(FACES)
        assert engine.last_engine == "insightface"


def test_without_a_server_the_chain_answers_and_says_why(settings, caplog):
    with caplog.at_level(logging.INFO), get_embedding_backend(config=settings(backend="triton")) as engine:
        assert engine.encode(FACES).shape == (5, 64)
        assert engine.last_engine == "onnx"
        assert engine.reason.startswith("triton: ServerUnreachable: ")
    assert sum("triton is unavailable" in message for message in caplog.messages) == 1


def test_plan_without_a_gpu_falls_back(settings):
    with get_embedding_backend("tensorrt", config=settings(device="auto")) as engine:
        assert engine.encode(FACES).shape == (5, 64)
        assert (engine.last_engine, engine.reason[:29]) == ("onnx", "tensorrt: DependencyMissing: ")


def test_with_fallback_switched_off_the_backend_must_be_there(settings):
    file = settings(backend="triton", fallback="{enabled: false}")
    with get_embedding_backend(config=file) as engine, pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1:1"):
        engine.encode(FACES)


def test_bad_faces_are_the_callers_mistake_with_any_backend(settings):
    with get_embedding_backend(config=settings(backend="triton")) as engine, pytest.raises(InvalidFaces):
        engine.encode(np.zeros((2, 96, 96, 3), np.uint8))


@pytest.mark.parametrize("arguments", [{"tensorrt_config": 16}, {"config": {"backend": "onnx"}}])
def test_a_configuration_of_another_type_is_refused_by_name(arguments):
    with pytest.raises(ConfigError, match=f"{next(iter(arguments))}: expected .* got (int|dict)"):
        get_embedding_backend(**arguments)


def test_the_former_section_is_taken_as_an_argument(settings):
    config = load_config(settings(backend="onnx"))
    with get_embedding_backend(
        "pytorch", tensorrt_config={"max_batch_size": 2, "opt_batch_size": 2}, config=config
    ) as e:
        assert e.encode(FACES).shape == (5, 64)
        assert e.engine.max_batch == 2
    with pytest.raises(ConfigError, match=r"arguments: magic: no such key\."):
        get_embedding_backend(tensorrt_config={"magic": 1}, config=config)
    with pytest.raises(ConfigError, match="unknown engine 'tensorflow'"):
        get_embedding_backend("tensorflow", config=config)


def test_a_plan_on_the_cpu_is_a_contradiction_that_is_said_at_once(settings):
    with pytest.raises(
        ConfigError, match="the tensorrt engine runs on the first GPU visible to CUDA, got device 'cpu'"
    ):
        get_embedding_backend("tensorrt", config=settings())


def link(engine, device="auto", precision="fp16", label=None):
    return Link(engine, device, precision, label or engine)


@pytest.mark.parametrize(
    ("backend", "device", "fallback", "allow_cpu", "expected"),
    [
        (
            "triton",
            "auto",
            ("onnx", "insightface"),
            True,
            [link("triton"), link("onnx", precision="fp32"), link("insightface")],
        ),
        ("triton", "auto", (), True, [link("triton")]),
        ("triton", "auto", ("onnx", "insightface"), False, [link("triton"), link("onnx", "gpu", "fp32")]),
        ("triton", "cpu", ("onnx",), True, [link("triton", "cpu"), link("onnx", "cpu", "fp32")]),
        ("triton", "cpu", ("onnx",), False, [link("triton", "cpu")]),
        ("onnx", "cpu", ("onnx",), True, [link("onnx", "cpu"), link("onnx", "cpu", "fp32", "onnx-fp32@cpu")]),
        (
            "onnx",
            "cuda",
            ("onnx", "insightface"),
            True,
            [link("onnx", "cuda"), link("onnx", "auto", "fp32", "onnx-fp32@auto"), link("insightface")],
        ),
        ("onnx", "auto", ("onnx",), False, [link("onnx", "gpu"), link("onnx", "gpu", "fp32", "onnx-fp32@gpu")]),
        ("insightface", "auto", ("onnx", "insightface"), False, [link("insightface"), link("onnx", "gpu", "fp32")]),
        ("tensorrt", "auto", ("triton", "tensorrt"), True, [link("tensorrt"), link("triton")]),
    ],
)
def test_chain_follows_backend_device_and_what_may_use_the_cpu(backend, device, fallback, allow_cpu, expected):
    assert list(backend_chain(backend, device, "fp16", fallback, allow_cpu)) == expected


def test_real_server_is_switched_to_and_away_by_one_line(server, demo_repository, settings):
    def config(backend: str) -> str:
        return settings(
            backend=backend,
            local=f"{{models_dir: {demo_repository.parent}/models, threads: 1}}",
            triton=f'{{url: "{server.grpc_url}"}}',
        )

    answers, names = [], []
    for backend in ("triton", "onnx", "insightface", "triton"):
        with get_embedding_backend(config=config(backend)) as engine:
            answers.append(engine.encode(FACES))
            names.append(engine.last_engine)
            validation = engine.validations[backend]
            assert validation.status == ("skipped" if backend == "insightface" else "passed"), validation
    assert names == ["triton", "onnx", "insightface", "triton"]
    for got in answers:
        assert compare_embeddings(answers[2], got).min_cosine > 0.99999


def test_server_and_local_model_of_two_contracts_are_not_mixed(server, settings):
    # The session's server runs without the overlay that tells its contract, so the widths (512 and 64) give it away.
    file = settings(backend="triton", triton=f'{{url: "{server.grpc_url}"}}')
    with get_embedding_backend(config=file) as engine, pytest.raises(ContractMismatch):
        engine.encode(FACES)


def test_one_changed_line_replaces_insightface_in_the_process(server, demo_repository, lfw_faces, settings):
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX

    source = demo_repository.parent / "models" / "demo-mobile" / "source.onnx"
    session = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    features = ArcFaceONNX(model_file=str(source), session=session).get_feat(list(lfw_faces[::4]))
    file = settings(triton=f'{{url: "{server.grpc_url}"}}', local=f"{{models_dir: {demo_repository.parent}/models}}")
    with get_embedding_backend("triton", config=file) as backend:
        embeddings = backend.encode(lfw_faces[::4])
        assert backend.last_engine == "triton"
    assert len(embeddings) == 100
    assert compare_embeddings(features, embeddings).min_cosine >= 0.99999


def test_server_that_is_killed_and_comes_back_is_fallen_back_from_and_returned_to(
    start_triton, demo_repository, settings
):
    server = start_triton(demo_repository, ["arcface_onnx"])
    file = settings(
        triton=f'{{url: "{server.grpc_url}", model: arcface_onnx, retry_for_s: 0}}',
        local=f"{{models_dir: {demo_repository.parent}/models, threads: 1}}",
        fallback="{retry_after_s: 0.2, retry_after_max_s: 0.4}",
    )
    with get_embedding_backend("triton", config=file) as backend:
        first = backend.encode(FACES)
        assert backend.last_engine == "triton", backend.reason
        server.stop()
        away = backend.encode(FACES)
        assert backend.last_engine == "onnx"
        assert backend.reason.startswith("triton: ServerUnreachable: "), backend.reason
        start_triton(demo_repository, ["arcface_onnx"], ports=server.ports)
        deadline = time.monotonic() + 30
        while True:
            back = backend.encode(FACES)
            if backend.last_engine == "triton":
                break
            assert time.monotonic() < deadline, backend.reason
            time.sleep(0.1)
    for embeddings in (away, back):
        assert compare_embeddings(first, embeddings).min_cosine > 0.99999
