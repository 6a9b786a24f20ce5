"""The commands of the tools, one module each."""
