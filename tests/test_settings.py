"""Every key of config/embedding.yaml acts, and acts in every command that has to do with its subject."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

from arcface_build.cli import cli
from arcface_build.plans.for_this_gpu import PlanRequest, spec_of
from arcface_clients.atomic import write_json
from arcface_clients.config.schema import EmbeddingConfig, Storage, _Section
from arcface_clients.config.sources import flatten, leaf_keys, load_config
from arcface_clients.errors import ArcFaceError
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.gpu.cards import Gpu
from arcface_clients.pipeline import Link, engine_arguments, get_embedding_backend
from arcface_clients.plans.manifest import manifest_path
from arcface_clients.triton.address import Tls
from arcface_clients.triton.options import ClientOptions
from conftest import REPO, copy_repository
from plan_samples import SPEC, write_plan
from tiny_nets import tiny_net

SHIPPED = dict(flatten(yaml.safe_load((REPO / "config" / "embedding.yaml").read_text())))
CARD = Gpu(0, "NVIDIA A10", "8.6", "550.54.15", 24 << 30, 0)
SECTIONS = (_Section, ClientOptions, Tls)
NOBODY = "127.0.0.1:9"  # where no server answers


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[EmbeddingConfig], set[str]]:
    """recorded(config): the dotted keys of this configuration that are read from now on."""

    def record(config: EmbeddingConfig) -> set[str]:
        read: set[str] = set()
        prefix: dict[int, str] = {}

        def walk(section: object, start: str) -> None:
            prefix[id(section)] = start
            for name, value in vars(section).items():
                if isinstance(value, SECTIONS):
                    walk(value, f"{start}{name}.")

        def recording(get: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
            def got(self: Any, name: str) -> Any:
                if id(self) in prefix:
                    names = get(self, "__dict__")
                    whole = name == "__dict__" and not isinstance(self, _Section)  # handed on as keyword arguments
                    read.update(prefix[id(self)] + key for key in names if whole or key == name)
                return get(self, name)

            return got

        dump = _Section.model_dump

        def recording_dump(self: _Section, **options: Any) -> dict[str, Any]:
            if id(self) in prefix:
                read.update(prefix[id(self)] + key for key in leaf_keys(type(self)))
            return dump(self, **options)

        walk(config, "")
        for kind in SECTIONS:
            monkeypatch.setattr(kind, "__getattribute__", recording(kind.__getattribute__))
        monkeypatch.setattr(_Section, "model_dump", recording_dump)
        return read

    return record


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an empty model repository, crops and a pair of saved embeddings."""
    monkeypatch.chdir(tmp_path)
    copy_repository(tmp_path)
    np.savez("crops.npz", faces=synthetic_faces(2))
    rows = np.eye(2, 512, dtype=np.float32)
    for name in ("a.npz", "b.npz"):
        np.savez(name, embeddings=rows)
    (tmp_path / "people" / "one").mkdir(parents=True)
    return tmp_path


def run(line: str) -> None:
    """A command in this process, as far as it gets without a server, weights or a GPU."""
    with suppress(ArcFaceError, SystemExit, OSError):
        cli.main(line.split(), standalone_mode=False)


def configured(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> EmbeddingConfig:
    """One configuration object for every command of this test."""
    config = load_config(overrides={"triton": {"url": NOBODY, "retry_for_s": 0}, **changes})
    monkeypatch.setattr("arcface_clients.config.sources.load_config", lambda *_, **__: config)
    return config


def test_every_key_is_read_by_a_command_or_an_engine(elsewhere, monkeypatch, recorded, s3_server):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    storage = {"type": "s3", "bucket": "nobody", "endpoint": s3_server, "retries": 0}
    config = configured(monkeypatch, storage=storage)
    read = recorded(config)
    for backend in ("triton", "tensorrt", "onnx", "insightface"):
        with suppress(ArcFaceError):
            with_backend = config.model_copy(update={"backend": backend})
            get_embedding_backend(config=with_backend).close()
    for line in (
        "plan list",
        "assemble absent --variant auto",
        "quantize absent --precision int8",
        "compare a.npz b.npz",
        "doctor",
        "plan build absent",
    ):
        run(line)
    with suppress(ArcFaceError):
        get_embedding_backend(config=config).close()
    spec_of(PlanRequest("tiny", Path("models")), config, "tiny", "ab" * 32, CARD, "10.3.0")
    keys = set(leaf_keys(EmbeddingConfig))
    assert keys == {key for key in SHIPPED if not key.startswith("triton.headers.")}, "the file names every key"
    assert keys - read == BY_A_BUILD, f"nobody reads {sorted(keys - read - BY_A_BUILD)}"


# Read after a plan's model was found, which this test does not have; test_plan_build.py has.
BY_A_BUILD = {"fallback.build_locally"}

SERVER_KEYS = ["triton.url", "triton.headers", "triton.tls.ca_file", "triton.compression"]
COMMANDS_OF = {
    "parity": [*SERVER_KEYS, "comparison.max_drift.fp32", "triton.timeout_s"],
    f"compare {NOBODY}/arcface insightface": [*SERVER_KEYS, "local.models_dir", "local.model"],
    "compare a.npz b.npz": ["comparison.max_drift.int8", "comparison.mean_cosine", "comparison.l2_mean"],
    f"matrix --reference {NOBODY}/arcface x": [*SERVER_KEYS, "local.models_dir", "local.model"],
    "compare onnx insightface": ["local.threads", "local.serving_onnx", "batch.max", "device", "precision"],
    f"bench --url {NOBODY} --no-bare": ["triton.url", "triton.headers", "triton.tls"],
    "bench": ["local.model_repository", "storage.cache"],
    "tune": ["local.model_repository", "storage.cache"],
    "embed crops.npz -o out.npz": [*SERVER_KEYS, "triton.model", "triton.timeout_s"],
    "embed crops.npz -o out.parquet": [*SERVER_KEYS, "triton.model", "triton.timeout_s"],
    "consensus people -o out.json": [*SERVER_KEYS, "triton.model"],
    "import absent.onnx": ["local.models_dir", "local.model_repository", "versions_kept", "storage.cache"],
    "assemble absent": ["local.models_dir", "local.model_repository", "versions_kept"],
    "assemble absent --variant auto": ["goal"],
    "rollback": ["local.model_repository"],
    "serve --no-demo --http-port 9 --grpc-port 9 --metrics-port 9": [
        "local.models_dir",
        "local.model_repository",
        "validation.eval_set_size",
    ],
    "quantize absent --precision int8": ["local.models_dir", "comparison.max_drift.int8", "comparison.margin"],
    "bench-variants absent": ["local.models_dir"],
    "plan build absent": ["local.models_dir", "storage.plans", "storage.type"],
    "plan list": ["storage.plans", "storage.cache", "storage.type", "storage.public_key"],
    "plan matrix": ["storage.plans"],
    "plan verify": ["storage.plans", "storage.public_key"],
    "plan gc": ["storage.plans"],
    "plan push --all": ["storage.plans", "storage.type"],
    "plan pull --sm 8.6": ["storage.plans", "storage.type"],
    "plan show absent": ["storage.plans", "storage.type"],
    "doctor": ["triton.url", "local.models_dir", "storage.cache", "backend"],
}


@pytest.mark.parametrize("line", COMMANDS_OF)
def test_a_command_reads_every_key_of_its_subject(line, elsewhere, monkeypatch, recorded):
    read = recorded(configured(monkeypatch))
    run(line)
    assert set(COMMANDS_OF[line]) - read == set()


def test_the_configuration_is_read_once_a_command(elsewhere, monkeypatch):
    calls = []

    def counted(*arguments: Any) -> EmbeddingConfig:
        calls.append(arguments)
        return load_config()

    monkeypatch.setattr("arcface_clients.config.sources.load_config", counted)
    for line in ("assemble absent", "compare a.npz b.npz", "embed crops.npz -o out.npz --url " + NOBODY):
        calls.clear()
        run(line)
        assert len(calls) == 1, line


class Listening(BaseHTTPRequestHandler):
    """A server that knows nothing and remembers what it was sent."""

    keys: list[str]

    def do_GET(self) -> None:
        self.keys.append(self.headers.get("x-key", ""))
        self.send_response(400)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def listening() -> Iterator[tuple[str, list[str]]]:
    handler = type("Handler", (Listening,), {"keys": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.keys
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "line",
    [
        "parity",
        "compare {url}/arcface insightface",
        "matrix --reference {url}/arcface x",
        "embed crops.npz -o out.npz",
        "embed crops.npz -o out.parquet",
        "consensus people -o out.json",
    ],
)
def test_the_configured_server_gets_its_key_from_every_command_and_another_does_not(
    line, elsewhere, listening, monkeypatch
):
    url, keys = listening
    monkeypatch.setenv("ARCFACE_TRITON__HEADERS", "{x-key: secret}")
    monkeypatch.setenv("ARCFACE_TRITON__RETRY_FOR_S", "0")
    for configured_url, sent in ((url, "secret"), ("http://elsewhere:8000", "")):
        monkeypatch.setenv("ARCFACE_TRITON__URL", configured_url)
        keys.clear()
        run(line.format(url=url) if "{url}" in line else f"{line} --url {url}")
        assert set(keys) == {sent}


def test_the_statistics_of_a_benchmark_are_asked_for_with_the_key(listening):
    from arcface_build.bench.triton_statistics import read_statistics

    url, keys = listening
    with pytest.raises(ArcFaceError):
        read_statistics(url, {"headers": {"x-key": "secret"}})
    assert keys == ["secret"]


def test_perf_analyzer_is_told_headers_and_tls_files():
    from arcface_build.bench.server import running_server

    here = str(Path(__file__))
    target = running_server("grpcs://host:8001", None, {"headers": {"x-key": "secret"}, "tls": Tls(ca_file=here)})
    assert target.options()[:3] == ["-H", "x-key:secret", "--ssl-grpc-use-ssl"]
    assert target.options()[3:5] == ["--ssl-grpc-root-certifications-file", here]


def test_a_stricter_limit_fails_parity(server):
    line = [sys.executable, "-c", "from arcface_build.program import main; main()", "parity", "--url", server.grpc_url]
    for limit, status in (("1e-5", 0), ("1e-15", 1)):
        environment = {**os.environ, "ARCFACE_COMPARISON__MAX_DRIFT__FP32": limit}
        done = subprocess.run([*line, "--json"], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == status, done.stderr
        assert json.loads(done.stdout)["passed"] is (status == 0)


def test_versions_kept_acts_in_an_import(tmp_path, monkeypatch):
    repository = copy_repository(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARCFACE_VERSIONS_KEPT", "2")
    for seed in range(3):
        onnx.save(tiny_net(seed=seed), f"net{seed}.onnx")
        cli.main(["import", f"net{seed}.onnx"], standalone_mode=False)
    assert sorted(path.parent.name for path in (repository / "arcface_onnx").glob("*/manifest.json")) == ["2", "3"]


def test_folders_of_the_configuration_are_the_defaults_of_the_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    repository = copy_repository(tmp_path / "elsewhere")
    monkeypatch.setenv("ARCFACE_LOCAL__MODELS_DIR", str(tmp_path / "imported"))
    with pytest.raises(ArcFaceError, match="no model_repository/ in"):
        cli.main(["assemble", "r50"], standalone_mode=False)
    for configured_path in (str(repository), "elsewhere/model_repository"):
        monkeypatch.setenv("ARCFACE_LOCAL__MODEL_REPOSITORY", configured_path)
        with pytest.raises(ArcFaceError, match=f"no imported model in {tmp_path}/imported/r50"):
            cli.main(["assemble", "r50"], standalone_mode=False)


def test_the_engine_looks_for_plans_where_the_commands_keep_them(tmp_path, monkeypatch, fake_host):
    fake_host()
    plan = tmp_path / "plans" / "tiny-fp16-sm86.plan"
    write_json(manifest_path(plan), {**write_plan(plan, SPEC).to_json(), "contract_id": "c" * 64})
    monkeypatch.setenv("ARCFACE_STORAGE__PLANS", str(plan.parent))
    config = load_config()
    assert config.storage.plan_folder == plan.parent
    from arcface_clients.engines.registry import EngineRegistry

    engine = EngineRegistry.get("tensorrt", **engine_arguments(Link("tensorrt", "auto", "fp16", "tensorrt"), config))
    assert engine.contract_id == "c" * 64
    assert Storage(cache=tmp_path).plan_folder == tmp_path / "plans"
