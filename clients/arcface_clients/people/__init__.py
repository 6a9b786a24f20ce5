"""What is done with embeddings: distances, search, galleries, and the consensus of a person."""
