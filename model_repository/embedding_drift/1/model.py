"""Drift as a Triton model: reference and candidate embeddings in, cosine a face out, drift into Triton's own metrics.

:8002/metrics then shows arcface_drift (histogram of 1 − cosine, label backend) and arcface_drift_faces (counter).
"""

import numpy as np
import triton_python_backend_utils as pb_utils

CANDIDATES = ("onnx", "tensorrt")
BUCKETS = [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]  # the gates of fp32, fp16 and int8 are among the edges


class TritonPythonModel:
    """One instance; it holds no weights."""

    @staticmethod
    def auto_complete_config(config):
        """Nothing to add: config.pbtxt says it all."""
        return config

    def initialize(self, args):
        """Register a histogram and a counter for each backend."""
        drift = pb_utils.MetricFamily(
            name="arcface_drift",
            description="1 - cosine of a face's embedding to the reference's",
            kind=pb_utils.MetricFamily.HISTOGRAM,
        )
        faces = pb_utils.MetricFamily(
            name="arcface_drift_faces",
            description="faces compared with the reference",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self.families = (drift, faces)  # kept alive: a metric ends with its family
        self.drift = {name: drift.Metric(labels={"backend": name}, buckets=BUCKETS) for name in CANDIDATES}
        self.faces = {name: faces.Metric(labels={"backend": name}) for name in CANDIDATES}

    def execute(self, requests):
        """Answer each request on its own."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        try:
            reference = pb_utils.get_input_tensor_by_name(request, "reference").as_numpy()
            outputs = []
            for name in CANDIDATES:
                tensor = pb_utils.get_input_tensor_by_name(request, name)
                if tensor is not None:
                    cosine = cosine_per_face(reference, tensor.as_numpy())
                    self._count(name, cosine)
                    outputs.append(pb_utils.Tensor(f"cosine_{name}", cosine[:, None]))
            return pb_utils.InferenceResponse(output_tensors=outputs)
        except Exception as exc:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"embedding_drift: {exc}"))

    def _count(self, name, cosine):
        for value in cosine:
            drift = 1.0 - float(value)
            # NaN or zero rows of a broken backend have no cosine: as far off as can be, not in the first bucket.
            self.drift[name].observe(max(0.0, drift) if np.isfinite(drift) else 2.0)
        self.faces[name].increment(len(cosine))


def cosine_per_face(reference, candidate):
    """Row-wise cosine as float64 (N,): in float32 the drift of an exact model, near 1e-7, would be noise."""
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    return np.einsum("nd,nd->n", a, b) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
