"""An ONNX Runtime session for a look at a graph: CPU only, and nothing logged, because what fails is raised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx


def quiet_session(model: onnx.ModelProto | Path) -> Any:
    """A session on a file or a model in memory; raises ONNX Runtime's own classes, which have no common root."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
