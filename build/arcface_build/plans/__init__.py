"""TensorRT plans: what identifies one, what proves one, how it is built, kept and found again."""
