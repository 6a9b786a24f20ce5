"""InsightFace itself as an engine, running the source ONNX: the reference for every comparison."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arcface_clients.arrays import Array, FaceArray, FloatArray, unit_rows
from arcface_clients.contract import FACE_SHAPE, Preprocessing
from arcface_clients.engines.in_process import LocalEngine
from arcface_clients.engines.model_folder import WantedModel
from arcface_clients.engines.registry import EngineRegistry
from arcface_clients.engines.runtimes import NO_IDLE_SPINNING, first_line, open_session
from arcface_clients.errors import ConfigError, InferenceFailed, InvalidEmbeddings, ModelMissing
from arcface_clients.extras import importing


@EngineRegistry.register("insightface")
class InsightFaceEngine(LocalEngine):
    """InsightFace's ArcFaceONNX on the CPU; its output is normalised here, because InsightFace does not.

    `get_feat` is used if InsightFace guesses the stated preprocessing; otherwise `forward`, which takes a blob, with
    mean and std set to the stated values per channel.
    """

    name = "insightface"
    precision = "fp32"

    def __init__(
        self,
        file: str | Path | None = None,
        *,
        models_dir: str | Path = "models",
        model: str | None = None,
        served: Callable[[], str | None] = lambda: None,
        model_repository: Path | None = None,
        preprocessing: Preprocessing | None = None,
        threads: int = 0,
        settings: Mapping[str, str] = NO_IDLE_SPINNING,
        max_batch: int = 64,
    ) -> None:
        """Choose what to load; nothing is loaded yet.

        Args:
            file: a source ONNX (not a serving one); None uses models_dir/model/source.onnx.
            models_dir: where imported models are.
            model: name of the model; None uses the served one, or the only one there (beside demo networks).
            served: the contract id that the server names; asked only where there are several models.
            model_repository: where the installed model is, if nothing is served.
            preprocessing: None uses the manifest beside the file, else InsightFace's own guess.
            threads: intra-op threads; 0 lets ONNX Runtime decide.
            settings: session configuration entries.
            max_batch: largest batch passed to one run.
        """
        super().__init__(max_batch)
        self._file = Path(file).expanduser() if file is not None else None
        self._wanted = WantedModel(self._file, models_dir, model, served, model_repository)
        self._stated, self._threads, self._settings = preprocessing, threads, settings
        self._net: Any = None
        self._one_by_one = False
        self._guess_fits = True
        self._color = "rgb"

    @property
    def contract_id(self) -> str | None:
        """From the manifest beside the file; None if there is none."""
        return self._wanted.folder().contract_id

    def _load(self) -> None:
        folder = self._wanted.folder()
        file = self._file or folder.source()
        if not file.is_file():
            raise ModelMissing(f"no source ONNX at {file}. Import one: arcface import SOURCE")
        folder.check_proved(file)
        with importing("the reference"), warnings.catch_warnings():  # InsightFace's imports raise warnings of their own
            warnings.simplefilter("ignore")
            from insightface.model_zoo.arcface_onnx import ArcFaceONNX
        session = open_session(file, threads=self._threads, settings=self._settings)
        shape = session.get_inputs()[0].shape
        if len(shape) != 4 or list(shape[1:]) != [3, *FACE_SHAPE[:2]]:
            raise ConfigError(
                f"{file}: expected a source ONNX with input [N,3,112,112], got {shape}. The reference runs "
                "the imported file, not the serving ONNX: models/NAME/source.onnx"
            )
        try:
            net = ArcFaceONNX(model_file=str(file), session=session)
        except Exception as exc:
            raise ConfigError(f"{file}: InsightFace cannot load it: {first_line(exc)}") from exc
        guess = Preprocessing(mean=(net.input_mean,) * 3, std=(net.input_std,) * 3)
        stated = self._stated or (folder.preprocessing if folder.manifest else guess)
        self._guess_fits = stated == guess
        if not self._guess_fits:
            net.input_mean = np.asarray(stated.mean, np.float32).reshape(1, 3, 1, 1)
            net.input_std = np.asarray(stated.std, np.float32).reshape(1, 3, 1, 1)
        self._color = stated.color
        self._one_by_one = net.input_shape[0] == 1
        width = net.output_shape[-1]
        self._dim = width if isinstance(width, int) else None
        self._net = net
        self.taken = {
            "provider": session.get_providers()[0],
            "reason": "the reference runs on the CPU",
            "file": str(file),
            "call": "get_feat" if self._guess_fits else "forward",
            "preprocessing": stated.to_json(),
            "precision": self.precision,
        }

    def _run(self, faces: FaceArray) -> FloatArray:
        net = self._net
        if net is None:
            raise InferenceFailed("insightface: the engine was closed while it was encoding.")
        step = 1 if self._one_by_one else len(faces)
        try:
            rows = [self._features(net, faces[i : i + step]) for i in range(0, len(faces), step)]
        except Exception as exc:
            raise InferenceFailed(f"insightface: {first_line(exc)} (batch {len(faces)})") from exc
        try:
            return unit_rows(np.concatenate(rows))
        except InvalidEmbeddings as exc:
            raise InferenceFailed(f"insightface: {exc}") from exc

    def _features(self, net: Any, faces: FaceArray) -> Array:
        if self._guess_fits:
            return np.asarray(net.get_feat(list(faces)))
        ordered = faces[..., ::-1] if self._color == "rgb" else faces
        return np.asarray(net.forward(ordered.transpose(0, 3, 1, 2).astype(np.float32)))

    def _unload(self) -> None:
        self._net = None
