"""Engines: the ways in which faces become embeddings, behind one protocol and by name."""

from __future__ import annotations

from arcface_clients.engines.protocol import EmbeddingEngine
from arcface_clients.engines.registry import EngineRegistry

__all__ = ["EmbeddingEngine", "EngineRegistry"]
