"""Variants of a serving ONNX: fp16, bf16 and int8, each with its gate verdicts and a recipe to reproduce it."""
