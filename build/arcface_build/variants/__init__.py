"""Typed variants of a serving ONNX: fp16 and int8 files that passed a gate, with the recipe that makes them again."""
