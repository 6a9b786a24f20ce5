"""`arcface bench --pytorch`: the served network in eager PyTorch, proved before it is timed. Skips without torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from arcface_build.bench.interleaved import Variant, Work
from arcface_build.bench.pytorch import proved_network, pytorch_sessions
from arcface_build.bench.result import comparisons
from arcface_build.errors import ProofFailed
from arcface_clients.errors import DependencyMissing, Missing
from arcface_clients.faces.synthetic import synthetic_faces


@pytest.fixture(scope="module")
def source(demo_repository: Path) -> Path:
    return demo_repository / "arcface_reference" / "1" / "source.onnx"


def test_pytorch_agrees_with_the_served_model_and_is_timed_by_batch(source: Path, demo_repository: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    import onnxruntime

    faces = synthetic_faces(6)
    served = onnxruntime.InferenceSession(
        str(demo_repository / "arcface_onnx" / "1" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    expected = served.run(["embedding"], {"face": faces})[0]
    got = proved_network(source, faces)(faces)
    assert (got * expected).sum(axis=1).min() > 1 - 1e-5
    variants = pytorch_sessions(source, faces, [1, 4])
    assert [variant.name for variant in variants] == ["pytorch b1", "pytorch b4"]
    assert variants[1].about["runtime"] == f"torch {torch.__version__}, eager, fp32"
    assert variants[1].sample(0.0).faces == 4


def test_a_network_that_pytorch_runs_differently_is_not_timed(source: Path, monkeypatch) -> None:
    pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    from arcface_build.bench import torch_baseline

    monkeypatch.setitem(torch_baseline.OPS, "PRelu", lambda a, dtype, x, slope: x)
    with pytest.raises(ProofFailed, match=r"source\.onnx in PyTorch differs from ONNX Runtime: drift"):
        proved_network(source, synthetic_faces(2))
    monkeypatch.delitem(torch_baseline.OPS, "PRelu")
    with pytest.raises(Missing, match=r"source\.onnx cannot run in PyTorch: no eager form of PRelu\. Next: "):
        proved_network(source, synthetic_faces(2))


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 1, 1), (3,), (3, 5, 5)])
def test_prelu_broadcasts_its_slopes_as_onnx_does(shape: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    from arcface_build.bench.torch_baseline import OPS

    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 5, 5) if len(shape) == 3 else (2, 3)).astype(np.float32)
    slope = rng.normal(size=shape).astype(np.float32)
    got = OPS["PRelu"]({}, torch.float32, torch.from_numpy(x), torch.from_numpy(slope)).numpy()
    np.testing.assert_allclose(got, np.where(x < 0, x * slope, x), rtol=1e-6)


def test_without_torch_one_sentence_names_the_next_command(source: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what Python itself does for "this import is known to fail"
    told = r"^the PyTorch baseline needs torch, which is not installed\. Next: .*\[pytorch\]'$"
    with pytest.raises(DependencyMissing, match=told) as raised:
        pytorch_sessions(source, synthetic_faces(1), [1])
    assert raised.value.exit_code == 3


def test_a_served_model_is_compared_with_pytorch_at_its_batch() -> None:
    def variant(name: str, where: str, batch: int) -> Variant:
        return Variant(name, lambda seconds: Work(1, 1.0), where, (), {"batch": batch})

    found = comparisons(
        [
            variant("bare b8", "process", 8),
            variant("pytorch b1", "process", 1),
            variant("pytorch b8", "process", 8),
            variant("arcface", "server", 8),
        ]
    )
    assert found == [("pytorch b8", "bare b8"), ("arcface", "bare b8"), ("arcface", "pytorch b8")]


def test_bench_measures_pytorch_in_turns_with_the_rest(server, source: Path, demo_repository: Path, tmp_path: Path):
    pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    from click.testing import CliRunner

    from arcface_build.bench.perf_analyzer import find_perf_analyzer
    from arcface_build.commands.bench import command

    try:
        find_perf_analyzer()
    except Missing as exc:
        pytest.skip(str(exc))
    line = ["--url", server.grpc_url, "--http-url", server.http_url, "--model-repository", str(demo_repository)]
    line += ["--batch", "2", "--rounds", "1", "--sample-s", "0.1", "--pytorch", "--model", "arcface_onnx"]
    done = CliRunner().invoke(command, [*line, "--report", str(tmp_path / "b.json")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "b.json").read_text())
    assert {row["name"] for row in result["variants"]} >= {"pytorch b1", "pytorch b2"}
    assert ("arcface_onnx grpc b2 c2", "pytorch b2") in {(row["variant"], row["base"]) for row in result["ratios"]}
    assert "torch" in result["host"]["versions"]
