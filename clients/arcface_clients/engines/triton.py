"""Registers the server's client under the name `triton`."""

from __future__ import annotations

from typing import Any

from arcface_clients.engines.registry import EngineRegistry
from arcface_clients.triton.embedder import TritonEmbedder


@EngineRegistry.register("triton")
def triton_engine(**options: Any) -> TritonEmbedder:
    """A `TritonEmbedder` with the given keyword arguments."""
    return TritonEmbedder(**options)
