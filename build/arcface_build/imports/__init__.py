"""An ArcFace file or pack in; models/NAME/ with a serving ONNX, proved equal to the reference, out."""
