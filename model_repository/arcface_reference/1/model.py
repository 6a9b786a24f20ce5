"""InsightFace as a Triton model: uint8 BGR faces in, InsightFace's embeddings brought to unit length out.

Beside this file the build puts source.onnx (the file as it came) and manifest.json (the preprocessing that it wants).
Where InsightFace guesses that preprocessing right, its get_feat runs as in any pipeline; where it would guess wrong,
its forward runs with the stated mean and std. A source whose batch is fixed to 1 is called once a face.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance of the reference."""

    @staticmethod
    def auto_complete_config(config):
        """Add the output with the width that the manifest states."""
        stub_argument = Path("/proc/self/cmdline").read_bytes().split(b"\0")[1].decode()
        dim = _manifest(Path(stub_argument).parent)["dim"]
        config.add_output({"name": "embedding", "data_type": "TYPE_FP32", "dims": [dim]})
        config.add_output({"name": "norm", "data_type": "TYPE_FP32", "dims": [1]})
        config.add_output({"name": "contract", "data_type": "TYPE_INT32", "dims": [4]})
        return config

    def initialize(self, args):
        """Open source.onnx the way InsightFace does."""
        from insightface.model_zoo.arcface_onnx import ArcFaceONNX

        folder = Path(args["model_repository"]) / args["model_version"]
        manifest = _manifest(folder)
        source = folder / "source.onnx"
        options = ort.SessionOptions()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        self.arcface = ArcFaceONNX(model_file=str(source), session=session)
        self.contract = np.frombuffer(bytes.fromhex(manifest["contract_id"])[:16], ">i4").astype(np.int32)
        stated = manifest["preprocessing"]
        self.rgb = stated["color"] == "rgb"
        guess = [self.arcface.input_mean] * 3, [self.arcface.input_std] * 3
        self.guess_fits = self.rgb and guess == (stated["mean"], stated["std"])
        if not self.guess_fits:
            self.arcface.input_mean = np.array(stated["mean"], np.float32).reshape(1, 3, 1, 1)
            self.arcface.input_std = np.array(stated["std"], np.float32).reshape(1, 3, 1, 1)
        self.one_by_one = session.get_inputs()[0].shape[0] == 1
        way = "get_feat" if self.guess_fits else f"forward with mean {stated['mean']}, std {stated['std']}"
        pb_utils.Logger.log_info(
            f"{args['model_instance_name']}: InsightFace {way}{', one face a call' * self.one_by_one}"
        )

    def execute(self, requests):
        """Answer each request on its own: this model is here to be right, not fast."""
        responses = []
        for request in requests:
            try:
                faces = pb_utils.get_input_tensor_by_name(request, "face").as_numpy()
                answer = self._embed(faces)
                wanted = [pb_utils.Tensor(name, answer[name]) for name in request.requested_output_names()]
                responses.append(pb_utils.InferenceResponse(output_tensors=wanted))
            except Exception as exc:
                responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError(f"arcface_reference: {exc}")))
        return responses

    def _embed(self, faces):
        step = 1 if self.one_by_one else len(faces)
        features = np.concatenate([self._features(faces[i : i + step]) for i in range(0, len(faces), step)])
        norm = np.linalg.norm(features, axis=1, keepdims=True)
        return {"embedding": features / norm, "norm": norm, "contract": np.tile(self.contract, (len(faces), 1))}

    def _features(self, faces):
        if self.guess_fits:
            return self.arcface.get_feat(list(faces))
        ordered = faces[..., ::-1] if self.rgb else faces
        return self.arcface.forward(ordered.transpose(0, 3, 1, 2).astype(np.float32))


def _manifest(folder):
    path = folder / "manifest.json"
    if not path.is_file():
        raise pb_utils.TritonModelException(f"no weights in {folder}: arcface import demo, or YOUR.onnx")
    return json.loads(path.read_text())
