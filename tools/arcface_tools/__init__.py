"""Benchmarks of this project itself; used from a checkout, not part of the wheel."""
