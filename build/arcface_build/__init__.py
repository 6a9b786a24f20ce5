"""Build scripts: ONNX in; serving ONNX, typed variants, TensorRT plans and a filled model repository out."""
