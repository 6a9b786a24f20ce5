"""Shared memory between client and server: system and CUDA regions, their slots, and what dead clients left."""
