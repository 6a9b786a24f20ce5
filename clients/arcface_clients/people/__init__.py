"""Working with embeddings: distances, search, galleries, and the consensus on a person."""
