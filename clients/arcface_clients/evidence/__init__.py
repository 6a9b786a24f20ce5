"""Embeddings beside reference embeddings: drift, recognition accuracy, the verdict of a gate, the fault in words."""
