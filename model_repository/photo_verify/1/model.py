"""Two photos in; the cosine of their most alike pair of faces, both boxes and a decision out.

`photo_faces` is called with both photos at once (BLS), so that they overlap. A photo that it refuses is refused here in
its words.
"""

import asyncio
import json

import numpy as np
import triton_python_backend_utils as pb_utils

NAMES = ("box", "embedding", "contract")
REFUSED = "photo refused: "


class TritonPythonModel:
    """One instance."""

    @staticmethod
    def auto_complete_config(config):
        """Nothing to add: config.pbtxt says it all."""
        return config

    def initialize(self, args):
        """Read the parameters."""
        told = json.loads(args["model_config"])["parameters"]
        self.photo_model = told["photo_model"]["string_value"]
        self.max_distance = float(told["max_distance"]["string_value"])

    async def execute(self, requests):
        """Answer each request on its own."""
        return [await self._answer(request) for request in requests]

    async def _answer(self, request):
        try:
            asked = json.loads(request.parameters() or "{}")
            max_distance = float(asked.pop("max_distance", self.max_distance))
            if not 0 <= max_distance <= 2:
                raise ValueError(f"max_distance is {max_distance}: expected a number in 0..2")
            images = [pb_utils.get_input_tensor_by_name(request, name) for name in ("image_a", "image_b")]
            answers = await asyncio.gather(*[self._faces(image.as_numpy(), asked) for image in images])
            found = best_pair(*answers, max_distance)
            wanted = [pb_utils.Tensor(name, found[name]) for name in request.requested_output_names()]
            return pb_utils.InferenceResponse(output_tensors=wanted)
        except ValueError as exc:
            return _error(str(exc), pb_utils.TritonError.INVALID_ARG)
        except Exception as exc:
            return _error(f"photo_verify: {exc}", pb_utils.TritonError.UNAVAILABLE)

    async def _faces(self, image, parameters):
        request = pb_utils.InferenceRequest(
            model_name=self.photo_model,
            requested_output_names=list(NAMES),
            inputs=[pb_utils.Tensor("image", image)],
            parameters=parameters,
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        answer = await request.async_exec()
        if answer.has_error():
            words = answer.error().message()
            raise (ValueError if REFUSED in words else RuntimeError)(words)
        return {name: pb_utils.get_output_tensor_by_name(answer, name).as_numpy() for name in NAMES}


def best_pair(a, b, max_distance):
    """One row for the most alike pair; no row where there is none."""
    if not len(a["box"]) or not len(b["box"]):
        none = {"similarity": np.empty(0, np.float32), "same": np.empty(0, np.bool_)}
        boxes = np.empty((0, 4), np.float32)
        return {**none, "box_a": boxes, "box_b": boxes, "contract": np.empty((0, 4), np.int32)}
    cosine = a["embedding"] @ b["embedding"].T
    i, j = np.unravel_index(cosine.argmax(), cosine.shape)
    similarity = cosine[i, j][None].astype(np.float32)
    return {
        "similarity": similarity,
        "same": 1 - similarity <= max_distance,
        "box_a": a["box"][i][None].copy(),
        "box_b": b["box"][j][None].copy(),
        "contract": a["contract"][:1].copy(),
    }


def _error(words, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(words, code))
