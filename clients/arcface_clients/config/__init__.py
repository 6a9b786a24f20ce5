"""config/embedding.yaml, environment and arguments: one checked configuration."""
