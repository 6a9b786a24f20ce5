"""The reference network as a function without preprocessing, for `evidence.diagnose`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from arcface_clients.contract import Preprocessing
from arcface_clients.engines.model_folder import folder_of
from arcface_clients.engines.runtimes import open_session
from arcface_clients.evidence.diagnose import Network


def reference_network(source: Path) -> tuple[Network, Preprocessing]:
    """The network of an unmodified source ONNX, and the preprocessing stated in the manifest beside it."""
    session = open_session(source)
    tensor = session.get_inputs()[0]
    step = tensor.shape[0] if isinstance(tensor.shape[0], int) else 32

    def network(blob: np.ndarray) -> np.ndarray:
        parts = [session.run(None, {tensor.name: blob[i : i + step]})[0] for i in range(0, len(blob), step)]
        return np.concatenate(parts)

    return network, folder_of(source).preprocessing


def source_beside(*texts: str) -> Path | None:
    """The source ONNX beside one of the compared files (models/NAME/source.onnx), or None."""
    for text in texts:
        path = Path(text)
        for folder in (path.parent, path.parent.parent) if path.suffix in (".onnx", ".plan") else ():
            if (folder / "source.onnx").is_file():
                return folder / "source.onnx"
    return None
