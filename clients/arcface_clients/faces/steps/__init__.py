"""The three steps from a photo to its faces, one module each: decode, detect, align.

Each imports nothing of this package, so that the served model `photo_faces` runs the same files: those in
model_repository/photo_faces/1/ are copies, and a test compares them byte by byte.
"""
