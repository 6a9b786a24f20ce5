"""backends/tensorrt behind a real tritonserver: which plan it takes, what it refuses, and that requests stay apart.

TensorRT is tests/fake_tensorrt.py; without it, as on any CPU host, the server must refuse with our message.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from arcface_build.errors import ServerFailed
from arcface_build.repository.profiles import CUDA_GRAPHS, with_profiles
from arcface_build.serving.binary import TritonBinary
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.plans.manifest import PlanManifest, write_manifest
from plan_samples import spec
from tiny_onnx import DIM, tiny_onnx, write_tiny

REPO = Path(__file__).resolve().parent.parent
TESTS = REPO / "tests"


def fake_plan(version: str = "10.3.0", max_batch: int = 64) -> bytes:
    """A plan as tests/fake_tensorrt.py builds it."""
    profile = {"face": tuple((batch, 112, 112, 3) for batch in (1, max_batch, max_batch))}
    return pickle.dumps({"version": version, "onnx": tiny_onnx().SerializeToString(), "profile": profile})


def put(model: Path, content: bytes, tensorrt: str = "10.3.0") -> None:
    """A plan for SM 8.6 with its manifest, as `arcface assemble` puts them there."""
    of = spec(tensorrt=tensorrt)
    manifest = PlanManifest(of, hashlib.sha256(content).hexdigest(), len(content))
    (model / "1" / "sm86.plan").write_bytes(content)
    write_manifest(model / "1" / "sm86.plan", manifest)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with the shipped arcface_trt and a plan for SM 8.6."""
    target = tmp_path / "repository" / "arcface_trt"
    (target / "1").mkdir(parents=True)
    shutil.copyfile(REPO / "model_repository" / "arcface_trt" / "config.pbtxt", target / "config.pbtxt")
    put(target, fake_plan())
    return target.parent


@pytest.fixture
def install(triton_binary: TritonBinary, tmp_path: Path) -> Callable[[str], None]:
    """install(code): the stubs find this as `tensorrt`.

    It goes into the server's working folder, which is on a stub's path (`folder=tmp_path`); a stub reads no PYTHONPATH.
    """
    if triton_binary.backend_directory is None:
        pytest.skip("this tritonserver has native backends")

    def install(code: str) -> None:
        head = f"from __future__ import annotations\nimport sys\nsys.path[:0] = {[p for p in sys.path if p]!r}\n"
        (tmp_path / "tensorrt.py").write_text(head + code)

    return install


@pytest.fixture
def start(install: Callable[[str], None], start_triton: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """start(repository, **environment): a tritonserver whose stubs find our TensorRT."""
    install((TESTS / "fake_tensorrt.py").read_text().partition("from __future__ import annotations\n")[2])

    def start(repository: Path, **environment: str) -> Any:
        return start_triton(repository, ["arcface_trt"], environment=environment, folder=tmp_path)

    return start


def ask(client: triton.InferenceServerClient, faces: np.ndarray) -> np.ndarray:
    tensor = triton.InferInput("face", list(faces.shape), "UINT8")
    tensor.set_data_from_numpy(faces)
    return client.infer("arcface_trt", [tensor]).as_numpy("embedding")


def reference(faces: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(tiny_onnx().SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["embedding"], {"face": faces})[0]


def test_the_plan_for_this_gpu_answers_and_the_config_is_completed(repository: Path, start: Callable[..., Any]) -> None:
    server = start(repository)
    faces = synthetic_faces(70)
    with triton.InferenceServerClient(server.grpc_url) as client, ThreadPoolExecutor(4) as pool:
        config = client.get_model_config("arcface_trt").config
        assert [(o.name, list(o.dims)) for o in config.output] == [("embedding", [DIM])]
        cuts = [(0, 1), (1, 3), (3, 6), (6, 38), (38, 70), (0, 64)]
        answers = list(pool.map(lambda cut: ask(client, faces[slice(*cut)]), cuts))
        for cut, answer in zip(cuts, answers, strict=True):
            np.testing.assert_allclose(answer, reference(faces[slice(*cut)]), atol=1e-6)
    assert "sm86.plan on GPU 0, SM 8.6, TensorRT 10.3.0, batches up to 64" in server.log_path.read_text()


def test_the_config_of_a_plan_set_is_accepted(repository: Path, start: Callable[..., Any]) -> None:
    """Triton itself checks instance groups; which profile is used is the backend's business."""
    config = repository / "arcface_trt" / "config.pbtxt"
    config.write_text(with_profiles(config.read_text(), 3) + CUDA_GRAPHS)
    server, faces = start(repository), synthetic_faces(5)
    with triton.InferenceServerClient(server.grpc_url) as client:
        found = client.get_model_config("arcface_trt").config
        assert [list(group.profile) for group in found.instance_group] == [["0", "1", "2"]]
        assert found.optimization.cuda.graphs
        np.testing.assert_allclose(ask(client, faces), reference(faces), atol=1e-6)


def test_requests_that_wait_together_are_one_run_and_a_bad_one_does_not_fail_its_neighbours(
    repository: Path, start: Callable[..., Any]
) -> None:
    config = repository / "arcface_trt" / "config.pbtxt"
    delayed = config.read_text().replace("max_queue_delay_microseconds: 0", "max_queue_delay_microseconds: 200000")
    config.write_text(delayed)
    server = start(repository, FAKE_TRT_FAULT="poison")
    faces = synthetic_faces(12)
    with triton.InferenceServerClient(server.grpc_url) as client, ThreadPoolExecutor(12) as pool:
        before = client.get_inference_statistics("arcface_trt").model_stats[0]
        answers = list(pool.map(lambda i: ask(client, faces[i : i + 1]), range(12)))
        after = client.get_inference_statistics("arcface_trt").model_stats[0]
        np.testing.assert_allclose(np.concatenate(answers), reference(faces), atol=1e-6)
        assert after.inference_count - before.inference_count == 12
        assert after.execution_count - before.execution_count < 12
        asked = [pool.submit(ask, client, part) for part in (faces[:2], np.zeros_like(faces[:1]), faces[2:5])]
        np.testing.assert_allclose(asked[0].result(), reference(faces[:2]), atol=1e-6)
        np.testing.assert_allclose(asked[2].result(), reference(faces[2:5]), atol=1e-6)
        with pytest.raises(triton.InferenceServerException, match="tensorrt: TensorRT could not run the plan"):
            asked[1].result()


@pytest.mark.parametrize(
    ("environment", "change", "message"),
    [
        ({"FAKE_SM": "61"}, lambda m: None,
         r"no plan for SM 6\.1 in cc_model_filenames \(mapped: .*8\.6.*\)\. Next, on this host: arcface plan build"),
        ({"FAKE_SM": "89"}, lambda m: (m / "1" / "sm86.plan").rename(m / "1" / "model.plan"),
         r"no plan sm89\.plan for SM 8\.9 in \S+ \(found: model\.plan\)\. Next, on an SM 8\.9 GPU"),
        ({}, lambda m: put(m, fake_plan("10.4.0"), tensorrt="10.4.0"),
         r"sm86\.plan was built with TensorRT 10\.4\.0, this server has 10\.3\.0\. Next: arcface plan build"),
        ({}, lambda m: put(m, fake_plan("10.4.0")),
         r"TensorRT 10\.3\.0 does not load sm86\.plan: it was built for another GPU"),
        ({}, lambda m: (m / "1" / "sm86.plan").write_bytes(b"never unpickled"),
         r"sm86\.plan does not match its manifest \(expected sha256 \w{12}\): it was damaged or changed"),
        ({}, lambda m: (m / "1" / "sm86.plan.json").unlink(),
         r"sm86\.plan has no readable manifest at \S+sm86\.plan\.json \(FileNotFoundError"),
        ({}, lambda m: (m / "1" / "sm86.plan.json").write_bytes(b"[" * 100_000), r"has no readable manifest"),
        ({}, lambda m: put(m, fake_plan(max_batch=8)),
         r"max_batch_size is 64, but the plan accepts batches up to 8\. Next: lower max_batch_size"),
    ],
    ids=["unmapped SM", "mapped and missing, no default", "another version", "another GPU", "changed", "no manifest",
         "a poisoned manifest", "too small a profile"],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused_by_name(
    repository: Path,
    start: Callable[..., Any],
    environment: dict[str, str],
    change: Callable[[Path], Any],
    message: str,
) -> None:
    change(repository / "arcface_trt")
    with pytest.raises(ServerFailed, match=message):
        start(repository, **environment)


def test_a_host_without_tensorrt_says_what_to_do(repository: Path, start_triton: Callable[..., Any]) -> None:
    with pytest.raises(
        ServerFailed,
        match=r"TensorRT is not installed for this server \(No module named 'tensorrt'\)\. Next: serve with ONNX",
    ):
        start_triton(repository, ["arcface_trt"])


def test_a_host_without_a_gpu_says_so(
    repository: Path, install: Callable[[str], None], start_triton: Callable[..., Any], tmp_path: Path
) -> None:
    """TensorRT installed, no driver: the real CUDA runtime of the wheel answers, with its own error."""
    pytest.importorskip("nvidia.cuda_runtime")
    install('__version__ = "10.3.0"\n')
    with pytest.raises(ServerFailed, match=r"no GPU 0 on this host \(CUDA error \d+, 0 GPUs\)"):
        start_triton(repository, ["arcface_trt"], folder=tmp_path)


@pytest.mark.gpu
def test_a_real_plan_is_served_on_a_real_gpu(
    repository: Path, triton_binary: TritonBinary, start_triton: Callable[..., Any], tmp_path: Path
) -> None:
    from arcface_build.plans.build import PlanProof, build_plan, tensorrt_version
    from arcface_build.plans.gpu import find_gpus
    from arcface_build.plans.typed import read_typed_onnx
    from arcface_clients.plans.spec import BuilderOptions, PlanSpec, sm_tag

    faces, sm = synthetic_faces(70), find_gpus()[0].sm
    typed = read_typed_onnx(write_tiny(tmp_path / "tiny.onnx"))
    options = BuilderOptions(external_tactics=False)
    asked = PlanSpec("tiny", typed.sha256, "fp32", sm, tensorrt_version(), 1, 32, 64, options)
    plan = repository / "arcface_trt" / "1" / f"{sm_tag(sm)}.plan"
    write_manifest(plan, build_plan(typed, asked, plan, PlanProof(faces, reference(faces))))
    server = start_triton(repository, ["arcface_trt"])
    with triton.InferenceServerClient(server.grpc_url) as client:
        for count in (1, 2, 7, 64):
            np.testing.assert_allclose(ask(client, faces[:count]), reference(faces[:count]), atol=1e-4)
