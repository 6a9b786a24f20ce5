"""The command lines of the tools, one module each."""
