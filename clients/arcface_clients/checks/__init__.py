"""Checks: parity of a server, speed of an engine, the state of this host."""
