"""Measurements: variants taken in turns in one run, so that their ratios hold on a shared machine."""
