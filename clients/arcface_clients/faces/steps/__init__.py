"""The three steps from a photo to its faces, one module each: decode, detect, align; and the words of a refusal.

Each imports nothing of this package, so that the served photo models run the same files: those in
model_repository/photo_*/1/ are copies, and a test compares them byte by byte.
"""
