"""Two photos in; the cosine of their most alike pair of faces, both boxes and a decision out.

`photo_faces` is called with both photos at once (BLS), so that they overlap. A photo that it refuses is refused here in
its words.
"""

import asyncio
import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from refusal import NUMBER_EXPECTED, PHOTO_REFUSED

NAMES = ("box", "embedding", "contract")
WRONG = (PHOTO_REFUSED, NUMBER_EXPECTED)  # by these words of photo_faces the caller is at fault


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
        file = Path(args["model_repository"]) / args["model_version"] / "calibration.json"
        try:
            self.measured = measured(file)
        except (OSError, ValueError, KeyError, TypeError) as exc:
            self.measured = {}
            pb_utils.Logger.log_error(f"{file} cannot be read, so nothing is calibrated ({type(exc).__name__}: {exc})")

    async def execute(self, requests):
        """Answer each request on its own."""
        return [await self._answer(request) for request in requests]

    async def _answer(self, request):
        try:
            asked = json.loads(request.parameters() or "{}")
            asked.pop("probe", None)  # photo_faces would answer it without looking at the photo
            limit = asked.pop("max_distance", None)
            if limit is not None and not 0 <= float(limit) <= 2:
                raise ValueError(f"max_distance is {limit}{NUMBER_EXPECTED}0..2")
            images = [pb_utils.get_input_tensor_by_name(request, name) for name in ("image_a", "image_b")]
            answers = await asyncio.gather(*[self._faces(image.as_numpy(), asked) for image in images])
            check_one_contract(*answers)
            found = best_pair(*answers) | self._decision(answers[0]["contract"], limit)
            found["same"] = 1 - found["similarity"] <= found["max_distance"]
            if not len(found["similarity"]):
                found = {name: rows[:0] for name, rows in found.items()}
            wanted = [pb_utils.Tensor(name, found[name]) for name in request.requested_output_names()]
            return pb_utils.InferenceResponse(output_tensors=wanted)
        except ValueError as exc:
            return _error(str(exc), pb_utils.TritonError.INVALID_ARG)
        except Exception as exc:
            return _error(f"photo_verify: {exc}", pb_utils.TritonError.UNAVAILABLE)

    def _decision(self, contract, limit):
        """At which distance to decide, and whether that was measured with these weights; what the caller wants goes."""
        own = self.measured.get(tuple(contract[0].tolist())) if len(contract) and limit is None else None
        distance = self.max_distance if limit is None else float(limit)
        return {
            "max_distance": np.array([distance if own is None else own], np.float32),
            "calibrated": np.array([own is not None]),
        }

    async def _faces(self, image, parameters):
        request = pb_utils.InferenceRequest(
            model_name=self.photo_model,
            requested_output_names=list(NAMES),
            inputs=[pb_utils.Tensor("image", image)],
            parameters={key: str(value) if isinstance(value, float) else value for key, value in parameters.items()},
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        answer = await request.async_exec()
        if answer.has_error():
            words = answer.error().message()  # its code is INTERNAL here, whatever the model gave it
            raise (ValueError if any(wrong in words for wrong in WRONG) else RuntimeError)(words)
        return {name: pb_utils.get_output_tensor_by_name(answer, name).as_numpy() for name in NAMES}


def measured(file):
    """Contract → the distance that `arcface compare --pairs --calibrate` measured with these weights."""
    if not file.is_file():
        return {}
    return {tuple(row["contract"]): float(row["max_distance"]) for row in json.loads(file.read_text())["models"]}


def check_one_contract(a, b):
    """Refuse what a model that is exchanged meanwhile gives: faces of two models have no similarity."""
    contracts = np.concatenate([a["contract"], b["contract"]])
    if (contracts != contracts[:1]).any():
        raise RuntimeError("the photos were embedded by two models, one exchanged for the other: send them again")


def best_pair(a, b):
    """One row for the most alike pair; no row where there is none."""
    if not len(a["box"]) or not len(b["box"]):
        boxes, contract = np.empty((0, 4), np.float32), np.empty((0, 4), np.int32)
        return {"similarity": np.empty(0, np.float32), "box_a": boxes, "box_b": boxes, "contract": contract}
    cosine = a["embedding"] @ b["embedding"].T
    i, j = np.unravel_index(cosine.argmax(), cosine.shape)
    return {
        "similarity": cosine[i, j][None].astype(np.float32),
        "box_a": a["box"][i][None].copy(),
        "box_b": b["box"][j][None].copy(),
        "contract": a["contract"][:1].copy(),
    }


def _error(words, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(words, code))
