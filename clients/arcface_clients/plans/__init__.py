"""TensorRT plans on disk: the only reader of a plan, its manifest and its signature."""
