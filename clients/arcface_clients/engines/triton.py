"""Registers the server's client under the name `triton`."""

from __future__ import annotations

from arcface_clients.engines.registry import EngineRegistry


@EngineRegistry.register("triton")
def triton_engine(url: str = "localhost:8001", **kwargs: object) -> object:
    """A `TritonEmbedder`; the keyword arguments are its own."""
    from arcface_clients.triton.embedder import TritonEmbedder

    return TritonEmbedder(url, **kwargs)
