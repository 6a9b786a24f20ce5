"""TensorRT plans on disk: the one reader of a plan, its manifest and its signature."""
