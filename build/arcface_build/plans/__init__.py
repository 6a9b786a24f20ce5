"""TensorRT plans: building them, proving their precision, storing and finding them."""
