"""Engines turn faces into embeddings; they share one protocol and are created by name."""

from __future__ import annotations

from arcface_clients.engines.protocol import EmbeddingEngine
from arcface_clients.engines.registry import EngineRegistry

__all__ = ["EmbeddingEngine", "EngineRegistry"]
