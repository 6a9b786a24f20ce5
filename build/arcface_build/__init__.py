"""The build: from an ArcFace ONNX to a serving ONNX, variants, TensorRT plans and a filled model repository."""
