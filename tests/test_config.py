"""The configuration: every key, its sources, and what is said when something in it is wrong."""

import re
import warnings
from pathlib import Path

import pytest
import yaml

from arcface_clients.config.old_names import OLD_NAMES
from arcface_clients.config.schema import EmbeddingConfig
from arcface_clients.config.sources import flatten, leaf_keys, load_config, variable
from arcface_clients.errors import ConfigError
from arcface_clients.evidence.drift import DRIFT_LIMITS

REPO = Path(__file__).resolve().parent.parent
SHIPPED = REPO / "config" / "embedding.yaml"


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        file = tmp_path / "embedding.yaml"
        file.write_text(text)
        return file

    return write


def message(file: Path, environ: dict | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file, environ=environ or {})
    return str(caught.value).replace(str(file), "FILE")


def test_shipped_file_names_every_key_with_its_default():
    assert load_config(SHIPPED, environ={}) == EmbeddingConfig()
    assert [key for key, _ in flatten(yaml.safe_load(SHIPPED.read_text()))] == list(leaf_keys(EmbeddingConfig))


def test_documentation_lists_every_key_variable_and_default():
    page = (REPO / "docs" / "configuration.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| `(ARCFACE_\w+)` \| `([^`]*)` \|", page, re.MULTILINE)
    shipped = dict(flatten(yaml.safe_load(SHIPPED.read_text())))
    assert {key: (name, yaml.safe_load(default)) for key, name, default in rows} == {
        key: (variable(key), value) for key, value in shipped.items()
    }


def test_drift_limits_have_one_home():
    assert EmbeddingConfig().comparison.max_drift.model_dump() == DRIFT_LIMITS


def test_without_any_file_the_defaults_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(environ={}) == EmbeddingConfig()


def test_file_is_found_in_the_working_folder_and_by_variable(tmp_path, monkeypatch, write):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "embedding.yaml").write_text("backend: onnx")
    monkeypatch.chdir(tmp_path)
    assert load_config(environ={}).backend == "onnx"
    assert load_config(environ={"ARCFACE_CONFIG": str(write("backend: tensorrt"))}).backend == "tensorrt"


def test_every_key_has_an_environment_variable_that_wins(write):
    file = write("backend: onnx\ntriton: {timeout_s: 1}")
    environ = {
        "ARCFACE_BACKEND": "pytorch",
        "ARCFACE_TRITON__TIMEOUT_S": "2.5",
        "ARCFACE_TRITON__HEADERS": "{authorization: Bearer x}",
        "ARCFACE_FALLBACK__CHAIN": "onnx, pytorch",
        "ARCFACE_FALLBACK__ENABLED": "false",
        "ARCFACE_LOCAL__MODEL": "",
        "ARCFACE_WORKSPACE": "512MB",
        "ARCFACE_COMPARISON__MAX_DRIFT__INT8": "0.02",
    }
    config = load_config(file, environ=environ)
    assert (config.backend, config.triton.timeout_s, config.triton.headers) == (
        "insightface",
        2.5,
        {"authorization": "Bearer x"},
    )
    assert (config.fallback.chain, config.fallback.enabled) == (("onnx", "insightface"), False)
    assert (config.local.model, config.workspace) == (None, 512 * 2**20)
    assert config.comparison.max_drift.int8 == 0.02
    assert {variable(key) for key in leaf_keys(EmbeddingConfig)} >= set(environ)


def test_caller_wins_over_environment_and_file(write):
    config = load_config(write("backend: onnx"), {"backend": "triton"}, {"ARCFACE_BACKEND": "tensorrt"})
    assert config.backend == "triton"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "storage: {bukket: a}",
            "FILE: storage.bukket: no such key. Did you mean storage.bucket? Allowed in storage: type, bucket, prefix, "
            "cache, plans, endpoint, region, path_style, retries, timeout_s, public_key.",
        ),
        (
            "bakend: onnx",
            "FILE: bakend: no such key. Did you mean backend? Allowed: backend, device, precision, goal, batch, "
            "workspace, versions_kept, local, triton, storage, fallback, validation, comparison.",
        ),
        ("backend: onnx\nbackend: triton", "FILE: not YAML in line 2: backend appears twice: delete one of them."),
        ("triton: {headers: {a: 1}}", "FILE: triton.headers.a: got 1; input should be a valid string."),
        (
            "triton: {shared_memory: maybe}",
            "FILE: triton.shared_memory: got 'maybe'; expected auto, system, cuda, true or false.",
        ),
        (
            "tensorrt: {enabled: 'no'}",
            "the old name enabled is 'no': expected true or false. Use backend: instead.",
        ),
        ("precision: fp8", "FILE: precision: got 'fp8'; input should be 'fp32', 'fp16', 'bf16' or 'int8'."),
        (
            "backend: onxx",
            "FILE: backend: got 'onxx'; unknown engine 'onxx': expected one of triton, tensorrt, onnx, "
            "insightface (pytorch is insightface). Did you mean onnx?",
        ),
        (
            "device: tpu",
            "FILE: device: got 'tpu'; unknown device 'tpu': "
            "expected one of auto, gpu, cuda, tensorrt, coreml, openvino, cpu, or cuda:1.",
        ),
        ("batch: {min: 8, opt: 4}", "FILE: batch: expected min <= opt <= max, got 8, 4, 64."),
        ("batch: {max: 0}", "FILE: batch.max: got 0; input should be greater than or equal to 1."),
        ("workspace: lots", "FILE: workspace: got 'lots'; expected a size such as 2GB or 512MB."),
        ("storage: {type: s3}", "FILE: storage: type is s3: expected a bucket name in storage.bucket, got none."),
        (
            "storage: s3",
            "FILE: storage: got 's3'; expected keys under it. Allowed in storage: type, bucket, prefix, cache, plans, "
            "endpoint, region, path_style, retries, timeout_s, public_key.",
        ),
        (
            "triton: {timeout_s: -1}",
            "FILE: triton.timeout_s: got -1.0; expected more than 0 and at most 604,800, a week.",
        ),
        (
            "triton: {tls: {cert_file: a.pem}}",
            "FILE: triton.tls: mutual TLS needs both cert_file and key_file; got only one of them.",
        ),
        (
            "comparison: {min_cosine: {target: 0.9, warn: 0.95}}",
            "FILE: comparison: expected min_cosine.warn below its target 0.9, got 0.95.",
        ),
        ("- a\n- b", "FILE: expected keys and values, got list."),
        ("backend: [onnx", "FILE: not YAML in line 1: expected ',' or ']', but got '<stream end>'."),
        (
            "backend: onnx\nprecision: 16\nversions_kept: 0",
            "FILE: precision: got 16; input should be 'fp32', 'fp16', 'bf16' or 'int8'.\n"
            "FILE: versions_kept: got 0; input should be greater than or equal to 1.",
        ),
    ],
)
def test_a_fault_names_file_key_value_and_what_is_allowed(write, text, expected):
    assert message(write(text)) == expected


def test_a_fault_in_a_variable_names_the_variable(write):
    assert message(write(""), {"ARCFACE_PRECISION": "half"}) == (
        "environment variable ARCFACE_PRECISION: precision: got 'half'; "
        "input should be 'fp32', 'fp16', 'bf16' or 'int8'."
    )


def test_unknown_variable_of_ours_is_refused_and_a_near_miss_is_mentioned(write, caplog):
    assert message(write(""), {"ARCFACE_STORAGE__BUKET": "x"}) == (
        "environment variable ARCFACE_STORAGE__BUKET: no such key: did you mean ARCFACE_STORAGE__BUCKET?"
    )
    load_config(write(""), environ={"ARCFACE_BACKND": "onnx", "ARCFACE_TEST_ASSETS": "x"})
    assert caplog.messages == ["environment variable ARCFACE_BACKND is ignored; did you mean ARCFACE_BACKEND?"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", "auto"), ("system", "system"), ("cuda", "cuda"), ("true", True), ("false", False), ("null", None)],
)
def test_shared_memory_is_a_kind_or_a_switch_in_file_and_variable(write, text, value):
    assert load_config(write(f"triton: {{shared_memory: {text}}}"), environ={}).triton.shared_memory is value
    assert load_config(environ={"ARCFACE_TRITON__SHARED_MEMORY": text}).triton.shared_memory is value
    with pytest.raises(ConfigError, match=r"triton\.shared_memory: got 'gpu'; expected auto, system, cuda, true or"):
        load_config(environ={"ARCFACE_TRITON__SHARED_MEMORY": "gpu"})


def test_missing_file_that_was_named_is_an_error(tmp_path):
    assert message(tmp_path / "none.yaml") == (
        "FILE: cannot be read (No such file or directory): expected a YAML file. "
        "Copy config/embedding.yaml to start one."
    )


def test_section_with_every_key_commented_out_means_the_defaults(write):
    assert load_config(write("storage:\n  # type: s3\nbackend: onnx"), environ={}).storage.type == "local"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GB", 2**31), ("1.5 GiB", 3 * 2**29), ("512mb", 2**29), ("2G", 2**31), (2**30, 2**30), (str(2**30), 2**30)],
)
def test_workspace_is_given_in_gb_or_mb(text, expected):
    assert EmbeddingConfig(workspace=text).workspace == expected


@pytest.mark.parametrize(
    ("text", "old", "key", "expected"),
    [
        ("workspace_gb: 2", "workspace_gb", "workspace", 2**31),
        ("workspace_size_mb: 512", "workspace_size_mb", "workspace", 2**29),
        ("tensorrt: {engine_s3_bucket: plans-bucket}", "tensorrt.engine_s3_bucket", "storage.bucket", "plans-bucket"),
        ("arcface_tensorrt: {enabled: true}", "arcface_tensorrt.enabled", "backend", "tensorrt"),
        ("arcface_tensorrt: {enabled: false}", "arcface_tensorrt.enabled", "backend", "insightface"),
        ("tensorrt: {max_batch_size: 48}", "tensorrt.max_batch_size", "batch.max", 48),
        ("backend_type: pytorch", "backend_type", "backend", "insightface"),
    ],
)
def test_old_names_are_understood_with_one_warning(write, text, old, key, expected):
    with pytest.warns(FutureWarning, match=re.escape(f"{old} is an old name; use ")) as seen:
        config = load_config(write(text), environ={})
    assert len(seen) == 1
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected


def test_old_variables_are_understood_with_one_warning_and_refused_where_they_disagree(write):
    with pytest.warns(FutureWarning) as seen:
        config = load_config(write(""), environ={"ARCFACE_URL": "gpu:8001", "ARCFACE_CACHE": "/plans"})
    assert (config.triton.url, config.storage.cache) == ("gpu:8001", Path("/plans"))
    assert [str(warning.message) for warning in seen] == [
        "environment variable ARCFACE_URL is an old name; use ARCFACE_TRITON__URL",
        "environment variable ARCFACE_CACHE is an old name; use ARCFACE_STORAGE__CACHE",
    ]
    assert message(write(""), {"ARCFACE_URL": "a:1", "ARCFACE_TRITON__URL": "b:1"}) == (
        "environment: ARCFACE_TRITON__URL is 'b:1' but the old name ARCFACE_URL is 'a:1': "
        "keep ARCFACE_TRITON__URL and unset ARCFACE_URL."
    )


def test_every_old_name_gives_a_key_that_exists():
    keys = set(leaf_keys(EmbeddingConfig))
    assert {new for to in OLD_NAMES.values() for new in to(True)} <= keys


def test_old_bucket_switches_the_store_to_s3(write):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert load_config(write("tensorrt: {engine_s3_bucket: b}"), environ={}).storage.type == "s3"


def test_old_and_new_name_that_disagree_are_refused(write):
    assert message(write("batch: {max: 32}\nbatch_size: 16")) == (
        "FILE: batch.max is 32 but the old name batch_size is 16: keep batch.max and delete batch_size."
    )


def test_unknown_key_of_the_old_section_is_refused_too(write):
    assert message(write("tensorrt: {magic: 1}")).startswith("FILE: tensorrt: no such key.")
