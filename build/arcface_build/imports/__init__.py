"""Imports an ArcFace file or pack into models/NAME/, with a serving ONNX proved equal to the reference."""
