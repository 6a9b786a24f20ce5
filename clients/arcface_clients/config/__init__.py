"""The configuration: config/embedding.yaml, environment and arguments, merged and checked."""
