"""Clients of the served models that take photos: a photo in, its faces with their embeddings out."""
