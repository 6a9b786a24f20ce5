"""The main job on real input: MobileFaceNet imported, served by a real Triton, equal to InsightFace on 400 faces."""

from __future__ import annotations

import urllib.request

import numpy as np
import pytest

from arcface_clients import TritonEmbedder
from arcface_clients.evidence.drift import compare_embeddings
from conftest import copy_repository, import_into

BACKENDS = ("arcface_onnx", "arcface")


@pytest.fixture(scope="module")
def served(request, assets, lfw_faces, triton_binary, tmp_path_factory):
    """Embeddings of the 400 faces by each backend, and the server's metrics afterwards."""
    from arcface_build.serving.ports import free_ports
    from arcface_build.serving.process import TritonProcess

    folder = tmp_path_factory.mktemp("mobilefacenet")
    repository = copy_repository(folder)
    import_into(repository, str(assets / "models" / "MobileFaceNet.onnx"))
    models = ["arcface", "arcface_parity"]
    with TritonProcess(
        triton_binary, repository, models, log_path=folder / "tritonserver.log", ports=free_ports()
    ) as server:
        server.wait_ready()
        embeddings = {}
        for model in ("arcface_reference", *BACKENDS):
            with TritonEmbedder(server.grpc_url, model) as embedder:
                embeddings[model] = embedder.encode(lfw_faces)
                contract = embedder.contract_id
        cosines = _through_parity_ensemble(server.grpc_url, lfw_faces)
        metrics = urllib.request.urlopen(server.metrics_url).read().decode()
    return embeddings, contract, cosines, metrics


def _through_parity_ensemble(url: str, faces: np.ndarray) -> np.ndarray:
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(url) as client:
        parts = []
        for start in range(0, len(faces), 50):
            tensor = triton.InferInput("face", faces[start : start + 50].shape, "UINT8")
            tensor.set_data_from_numpy(faces[start : start + 50])
            parts.append(client.infer("arcface_parity", [tensor]).as_numpy("cosine_onnx"))
    return np.concatenate(parts).ravel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_face_equals_the_reference(served, backend):
    embeddings, _, _, _ = served
    drift = compare_embeddings(embeddings["arcface_reference"], embeddings[backend])
    assert drift.faces == 400
    assert drift.min_cosine >= 0.99999


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_verification_decision_is_the_references(served, assets, backend):
    embeddings, _, _, _ = served
    left, right, same = read_pairs(assets)
    scores = {m: np.einsum("nd,nd->n", e[left], e[right]) for m, e in embeddings.items()}
    reference = scores["arcface_reference"]
    candidates = np.unique(reference)
    best = max((candidates[1:] + candidates[:-1]) / 2, key=lambda t: ((reference > t) == same).mean())
    assert ((reference > best) == same).mean() > 0.98, "the reference itself must tell people apart"
    assert np.array_equal(scores[backend] > best, reference > best)


def test_the_parity_ensemble_gives_cosines_and_counts_them_in_tritons_metrics(served):
    _, contract, cosines, metrics = served
    assert len(contract) == 64
    assert cosines.shape == (400,) and cosines.min() >= 0.99999
    assert 'arcface_drift_faces{backend="onnx"} 400' in metrics
    assert 'arcface_drift_bucket{backend="onnx",le="1e-05"} 400' in metrics


def read_pairs(assets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of faces/index.csv of each pair, and whether both are one person."""
    index = (assets / "faces" / "index.csv").read_text().splitlines()[1:]
    row_of = {line.split(",")[0]: i for i, line in enumerate(index)}
    pairs = [line.split(",") for line in (assets / "faces" / "pairs.csv").read_text().splitlines()[1:]]
    left, right = (np.array([row_of[pair[side]] for pair in pairs]) for side in (0, 1))
    return left, right, np.array([pair[2] == "1" for pair in pairs])
