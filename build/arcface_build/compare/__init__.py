"""Compares any two sources of embeddings: drift, accuracy, likely faults, and layer by layer."""
