"""What pipelines of former days wrote still works: their files, their calls, and every row of docs/old-names.md."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from arcface_build.old_command_lines import MODES, translated
from arcface_clients import EngineRegistry, get_embedding_backend, load_config, run_embedding_regression_tests
from arcface_clients.config.old_names import OLD_FILE, OLD_NAMES, OLD_VARIABLES
from arcface_clients.errors import ConfigError, GateFailed, WrongUse
from arcface_clients.evidence.drift import compare_embeddings
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.plans.manifest import write_manifest
from conftest import REPO
from plan_samples import write_plan
from tiny_model import write_model

FACES = synthetic_faces(6)
EMBEDDING_YAML = """\
embedding:
  backend: tensorrt
  tensorrt_config: config/arcface_tensorrt.yaml
"""
TENSORRT_YAML = """\
tensorrt:
  enabled: false
  precision: fp16
  device: auto
  batch_size: 32
  max_batch_size: 64
  workspace_gb: 2
  engine_local_dir: engines
  model_name: tiny
storage:
  cache_dir: cache
fallback:
  fallback_to_pytorch: true
  build_locally: false
validation:
  enabled: true
  eval_set_size: 4
  max_drift_cosine: 0.005
comparison:
  min_cosine_similarity: 0.985
"""
OLD_KEYS = {  # of both files, but for those that are keys of today too
    "embedding.backend",
    "embedding.tensorrt_config",
    *(f"tensorrt.{key}" for key in ("enabled", "precision", "device", "batch_size", "max_batch_size", "workspace_gb")),
    "tensorrt.engine_local_dir",
    "tensorrt.model_name",
    "storage.cache_dir",
    "fallback.fallback_to_pytorch",
    "validation.enabled",
    "validation.max_drift_cosine",
    "comparison.min_cosine_similarity",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of such a pipeline: both files, and an imported model."""
    write_model(tmp_path / "models" / "tiny")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "embedding.yaml").write_text(EMBEDDING_YAML)
    (tmp_path / "config" / "arcface_tensorrt.yaml").write_text(TENSORRT_YAML)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(seen: list[warnings.WarningMessage]) -> list[str]:
    """The old names in the notices, in order."""
    return [match[1] for w in seen if (match := re.search(r": (\S+) is an old name; ", str(w.message)))]


def test_both_files_whole_are_read_with_one_notice_for_each_old_key(project: Path) -> None:
    with pytest.warns(FutureWarning) as seen:
        config = load_config(environ={})
    assert Counter(told(list(seen))) == Counter(OLD_KEYS)
    assert config.backend == "tensorrt", "the file that names the other one wins over it"
    assert (config.precision, config.workspace, config.local.model) == ("fp16", 2 * 2**30, "tiny")
    assert (config.batch.min, config.batch.opt, config.batch.max) == (1, 32, 64)
    assert (config.storage.plans, config.storage.cache) == (Path("engines"), Path("cache"))
    assert (config.fallback.enabled, config.fallback.build_locally) == (True, False)
    assert (config.validation.run_on_startup, config.validation.eval_set_size) == (True, 4)
    assert set(config.comparison.max_drift.model_dump().values()) == {0.005}
    assert (config.comparison.min_cosine.target, config.comparison.min_cosine.warn) == (0.985, 0.985)


def test_a_pipeline_of_former_days_runs_as_it_was_written(project: Path) -> None:
    pytest.importorskip("insightface")
    with (
        pytest.warns(FutureWarning) as seen,
        get_embedding_backend(
            backend_type="tensorrt",
            device="auto",
            tensorrt_config="config/arcface_tensorrt.yaml",
            allow_cpu_fallback=True,
            config="config/embedding.yaml",
        ) as backend,
        EngineRegistry.get("pytorch", models_dir="models") as pytorch,
    ):
        report = run_embedding_regression_tests(
            eval_faces=FACES, pytorch_embedder=pytorch, tensorrt_embedder=backend, max_drift=0.005
        )
        assert backend.last_engine == "onnx", "there is no GPU here, so the chain answers"
    assert set(told(list(seen))) == OLD_KEYS
    assert report.mean_cosine_sim >= report.min_cosine_sim > 0.99999
    assert 0 <= report.max_drift_face_idx < len(FACES)
    assert sum(report.drift_histogram["counts"]) == len(FACES)


def test_the_second_file_is_found_beside_the_first_from_any_folder(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with pytest.warns(FutureWarning):
        assert load_config(project / "config" / "embedding.yaml", environ={}).precision == "fp16"
    (project / "config" / "arcface_tensorrt.yaml").unlink()
    with pytest.warns(FutureWarning), pytest.raises(ConfigError, match=r"arcface_tensorrt\.yaml: cannot be read"):
        load_config(project / "config" / "embedding.yaml", environ={})


def test_a_file_that_is_the_section_alone_needs_no_section(project: Path) -> None:
    (project / "config" / "embedding.yaml").unlink()
    (project / "alone.yaml").write_text("engine_path: a.plan\nprecision: fp32\nbatch_size: 2\nmax_batch_size: 4\n")
    with pytest.warns(FutureWarning) as seen, get_embedding_backend("onnx", "cpu", "alone.yaml") as backend:
        assert backend.encode(FACES).shape == (6, 64)
        assert backend.engine.max_batch == 4
    assert told(list(seen)) == ["tensorrt.engine_path", "batch_size", "max_batch_size"]
    assert str(seen[0].message).startswith("alone.yaml: ")


def test_the_section_as_a_mapping_needs_no_notice(project: Path) -> None:
    (project / "config" / "embedding.yaml").unlink()
    settings = {"precision": "fp32", "batch_size": 2, "max_batch_size": 4, "model_name": "tiny"}
    with get_embedding_backend("onnx", device="cpu", tensorrt_config=settings) as backend:
        assert backend.encode(FACES).shape == (6, 64)
        assert backend.engine.max_batch == 4


def test_a_side_under_both_names_or_under_none_is_refused() -> None:
    rows = np.eye(6, dtype=np.float32)
    for sides, got in [({"reference": rows, "pytorch_embedder": rows}, "both"), ({}, "neither")]:
        with pytest.raises(WrongUse, match=f"expected reference or pytorch_embedder, got {got}"):
            run_embedding_regression_tests(FACES, candidate=rows, **sides)
    with pytest.raises(ConfigError, match="tensorrt: engine_path is the old name of plan, and both are given"):
        EngineRegistry.get("tensorrt", engine_path="a", plan="b")
    with pytest.raises(GateFailed, match="on 6 of 6 faces"):
        run_embedding_regression_tests(eval_faces=FACES, pytorch_embedder=rows, tensorrt_embedder=rows[::-1].copy())


def test_aliases_of_a_report_are_read_only_and_not_in_its_json() -> None:
    report = compare_embeddings(np.eye(3), np.eye(3))
    with pytest.raises(AttributeError):
        report.mean_cosine_sim = 0.0  # type: ignore[misc]
    assert not {"mean_cosine_sim", "drift_histogram"} & report.to_json().keys()


def plan_by_its_old_name(folder: Path) -> None:
    write_manifest(folder / "a.plan", write_plan(folder / "a.plan", contract_id="ab" * 32))
    assert EngineRegistry.get("tensorrt", engine_path=folder / "a.plan").contract_id == "ab" * 32


def onnx_by_its_old_name(folder: Path) -> None:
    with EngineRegistry.get("onnx", onnx_path=folder / "models" / "tiny" / "serving.onnx", device="cpu") as engine:
        assert engine.encode(FACES).shape == (6, 64)


def backend_by_a_mapping(folder: Path) -> None:
    get_embedding_backend("onnx", tensorrt_config={"tensorrt": {"precision": "fp32"}}).close()


def backend_by_a_file(folder: Path) -> None:
    get_embedding_backend("onnx", tensorrt_config="config/arcface_tensorrt.yaml").close()


def regression(name: str, other: str) -> Callable[[Path], None]:
    rows = np.eye(6, dtype=np.float32)
    return lambda folder: _ignore(run_embedding_regression_tests(FACES, **{name: rows, other: lambda faces: rows}))


def same_field(old: str, new: str) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        report = compare_embeddings(np.eye(6), np.eye(6)[::-1])
        assert getattr(report, old) == getattr(report, new)

    return check


def _ignore(_: object) -> None:
    """Only that it did not fail counts."""


IN_CODE: dict[str, Callable[[Path], None]] = {
    'EngineRegistry.get("pytorch")': lambda folder: _ignore(EngineRegistry.get("pytorch")),
    'EngineRegistry.get("tensorrt", engine_path=…)': plan_by_its_old_name,
    'EngineRegistry.get("onnx", onnx_path=…)': onnx_by_its_old_name,
    "get_embedding_backend(tensorrt_config={…})": backend_by_a_mapping,
    'get_embedding_backend(tensorrt_config="arcface_tensorrt.yaml")': backend_by_a_file,
    "run_embedding_regression_tests(pytorch_embedder=…)": regression("pytorch_embedder", "candidate"),
    "run_embedding_regression_tests(tensorrt_embedder=…)": regression("tensorrt_embedder", "reference"),
    "report.mean_cosine_sim": same_field("mean_cosine_sim", "mean_cosine"),
    "report.min_cosine_sim": same_field("min_cosine_sim", "min_cosine"),
    "report.max_drift_face_idx": same_field("max_drift_face_idx", "worst_face"),
    "report.drift_histogram": same_field("drift_histogram", "histogram"),
}


def rows_of(heading: str) -> dict[str, str]:
    """The table under a heading of docs/old-names.md: old → new."""
    page = (REPO / "docs" / "old-names.md").read_text()
    section = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| (`.+?`) \| → (.+) \|$", section, re.MULTILINE))


def words_in(row: str) -> list[str]:
    return re.findall(r"`([^`]+)`", row)


def test_the_page_lists_every_old_name_and_no_other() -> None:
    keys = {key for key in OLD_NAMES if not key.startswith("arcface_tensorrt.")} | {OLD_FILE}
    assert {words_in(old)[0] for old in rows_of("In files")} == keys
    assert {words_in(old)[0]: words_in(new)[0] for old, new in rows_of("In the environment").items()} == OLD_VARIABLES
    assert [words_in(old)[0] for old in rows_of("In code")] == list(IN_CODE)
    lines = {words_in(old)[-1].split()[-1]: words_in(new)[0] for old, new in rows_of("On the command line").items()}
    assert lines == {mode: " ".join(("arcface", *command)) for mode, command in MODES.items()}


def test_every_key_of_the_page_sets_what_its_row_says() -> None:
    for old, new in rows_of("In files").items():
        key = words_in(old)[0]
        if key != OLD_FILE:
            first = words_in(new)[0].partition(":")[0]
            assert first in OLD_NAMES[key](True), key


@pytest.mark.parametrize("call", IN_CODE)
@pytest.mark.filterwarnings("ignore:.* is an old name:FutureWarning")
def test_every_call_of_the_page_is_accepted(project: Path, call: str) -> None:
    IN_CODE[call](project)


def test_every_command_line_of_the_page_is_translated() -> None:
    for old, new in rows_of("On the command line").items():
        for line in words_in(old):
            words, notice = translated([*line.removeprefix("arcface ").split(), "--help"])
            assert words == [*words_in(new)[0].split()[1:], "--help"], line
            assert notice and notice.startswith("an old name; use: arcface ")
