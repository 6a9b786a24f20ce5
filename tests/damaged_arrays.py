"""Files of faces that came to harm: what happens to a .npz on disks, networks and in scripts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

DAMAGED_ARRAYS = (
    *("empty", "text", "cut off", "a flipped byte", "a hole at the begin", "pickled objects", "another"),
    *("a header torn open", "an unknown compression", "a password"),
)


def write_damaged(path: Path, damage: str) -> Path:
    """Write such a file; its name stays what the caller says."""
    faces = np.random.default_rng(0).integers(0, 255, (2, 112, 112, 3), dtype=np.uint8)
    with path.open("wb") as file:
        np.savez_compressed(file, faces=faces)
    content = bytearray(path.read_bytes())
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("hello")
    elif damage == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "a flipped byte":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif damage == "a hole at the begin":
        content[60:80] = bytes(20)
        path.write_bytes(content)
    elif damage == "a header torn open":
        np.savez(path, faces=faces)
        path.write_bytes(path.read_bytes().replace(b"'shape': (2, ", b"'shape': ((2,", 1))
    elif damage in ("an unknown compression", "a password"):
        field, value = (6, 1) if damage == "a password" else (8, 99)
        for place in (field, content.rfind(b"PK\1\2") + field + 2):  # before the data, and in the directory
            content[place] |= value
        path.write_bytes(content)
    elif damage == "pickled objects":
        np.savez(path, faces=np.array([{}], object))
    else:
        np.savez(path, x=np.zeros(3))
    return path
