"""Compares embeddings with reference embeddings: drift, recognition accuracy, the gate's verdict, and a diagnosis."""
