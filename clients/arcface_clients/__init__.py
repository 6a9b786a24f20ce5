"""Python clients for ArcFace embeddings on Triton; importing the package loads numpy and nothing heavier."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arcface_clients.checks.benchmark import benchmark_embedder as benchmark_embedder
    from arcface_clients.config.sources import load_config as load_config
    from arcface_clients.engines.fallback import FallbackEmbedder as FallbackEmbedder
    from arcface_clients.engines.protocol import EmbeddingEngine as EmbeddingEngine
    from arcface_clients.engines.registry import EngineRegistry as EngineRegistry
    from arcface_clients.evidence.gate import run_embedding_regression_tests as run_embedding_regression_tests
    from arcface_clients.people.cache import EmbeddingCache as EmbeddingCache
    from arcface_clients.people.gallery import Gallery as Gallery
    from arcface_clients.photos.aio import AsyncPhotoEmbedder as AsyncPhotoEmbedder
    from arcface_clients.photos.embedder import PhotoEmbedder as PhotoEmbedder
    from arcface_clients.pipeline import get_embedding_backend as get_embedding_backend
    from arcface_clients.triton.address import Tls as Tls
    from arcface_clients.triton.aio import AsyncTritonEmbedder as AsyncTritonEmbedder
    from arcface_clients.triton.embedder import TritonEmbedder as TritonEmbedder
    from arcface_clients.triton.fake import FakeEmbedder as FakeEmbedder

__version__ = "0.1.0"

_HOMES = {  # public name -> module, loaded on first use (PEP 562)
    "AsyncPhotoEmbedder": "arcface_clients.photos.aio",
    "AsyncTritonEmbedder": "arcface_clients.triton.aio",
    "EmbeddingCache": "arcface_clients.people.cache",
    "EmbeddingEngine": "arcface_clients.engines.protocol",
    "EngineRegistry": "arcface_clients.engines.registry",
    "FakeEmbedder": "arcface_clients.triton.fake",
    "FallbackEmbedder": "arcface_clients.engines.fallback",
    "Gallery": "arcface_clients.people.gallery",
    "PhotoEmbedder": "arcface_clients.photos.embedder",
    "Tls": "arcface_clients.triton.address",
    "TritonEmbedder": "arcface_clients.triton.embedder",
    "benchmark_embedder": "arcface_clients.checks.benchmark",
    "get_embedding_backend": "arcface_clients.pipeline",
    "load_config": "arcface_clients.config.sources",
    "run_embedding_regression_tests": "arcface_clients.evidence.gate",
}
__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from arcface_clients.extras import importing

    with importing(name):
        return getattr(import_module(_HOMES[name]), name)
