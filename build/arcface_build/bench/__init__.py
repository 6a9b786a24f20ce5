"""Benchmarks: variants are measured interleaved in one run, so that their ratios hold on a shared machine."""
