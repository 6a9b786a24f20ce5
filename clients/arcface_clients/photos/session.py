"""The exchanges of a client that sends photos: asking, trying again, checking the answer; as steps without I/O."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from arcface_clients.arrays import Array
from arcface_clients.contract import CONTRACT_OUTPUT, contract_words
from arcface_clients.errors import (
    BackendUnavailable,
    ConfigError,
    DeadlineExceeded,
    DetectorMismatch,
    InferenceFailed,
    InvalidFaces,
    ModelNotReady,
    WrongUse,
)
from arcface_clients.extras import importing
from arcface_clients.faces.photos import MAX_PIXELS, photo_bytes
from arcface_clients.faces.steps.refusal import NUMBER_EXPECTED, PHOTO_REFUSED
from arcface_clients.photos.face import Face, Verified
from arcface_clients.triton.answer import Tensors, checked_contract, checked_rows, other_contract
from arcface_clients.triton.options import ClientOptions
from arcface_clients.triton.sansio import CONTROL_TIMEOUT_S, Steps, backoff_s
from arcface_clients.triton.session import Exchanges
from arcface_clients.triton.transports import Files, Parameter

PhotoLike = bytes | Path | str | Array
"""A photo: a file's bytes, its path, or pixels uint8 (H,W,3) BGR, which are sent as PNG."""
VERIFY_MODEL = "photo_verify"
# A process of the server that ends after so long may have ended over the photo: it is sent once more, and then refused.
LONG_S = 30.0
_OUTPUTS = ("box", "score", "landmarks", "embedding", "norm", CONTRACT_OUTPUT)
_DETECTOR = "detector"  # the output that says which detector found the faces, and how
_VERIFY_OUTPUTS = ("similarity", "same", "box_a", "box_b", "max_distance", "calibrated", CONTRACT_OUTPUT)
_log = logging.getLogger(__name__)


class PhotoRequest(NamedTuple):
    """What goes to a model that takes photos."""

    model: str
    files: Files
    outputs: tuple[str, ...]
    parameters: Mapping[str, Parameter]


class PhotoSession(Exchanges):
    """What is known of `photo_faces` on one server, and the exchanges with it."""

    def __init__(self, options: ClientOptions, parameters: Mapping[str, float | None], crops: bool) -> None:
        """Nothing is sent yet.

        Args:
            options: how the server is called.
            parameters: of every request; None: the server's default.
            crops: ask for the aligned faces too.

        Raises:
            ConfigError: a parameter is no number, or `expected_contract` no contract id.
        """
        super().__init__(options)
        self._parameters: dict[str, Parameter] = {k: _number(k, v) for k, v in parameters.items() if v is not None}
        self._parameters |= {"crop": True} if crops else {}
        self._outputs: tuple[str, ...] = (*_OUTPUTS, *["crop"] * crops)
        self._detector_id: str | None = None
        expected = options.expected_contract
        self._lock = threading.Lock()
        try:
            self.contract: npt.NDArray[np.int32] | None = contract_words(expected) if expected else None
        except ValueError as exc:
            raise ConfigError(f"expected_contract: {exc}.", "expected_contract") from exc

    def ready(self) -> Steps[Mapping[str, Any]]:
        """Ask the server for the model: its configuration.

        Raises:
            ServerUnreachable, ModelNotReady, DeadlineExceeded: it cannot answer.
        """
        try:
            config: Mapping[str, Any] = yield (
                "model_config",
                self.options.model,
                min(self.options.timeout_s, CONTROL_TIMEOUT_S),
            )
        except ModelNotReady as exc:
            raise ModelNotReady(f"{exc} (photos need a detector there: arcface import-detector FILE)") from exc
        return config

    def pin_detector(self) -> Steps[str | None]:
        """Learn which detector finds the faces, which each answer then has to name; see `PhotoEmbedder.pin_detector`.

        Raises:
            What `ready` and `faces` raise.
        """
        config = yield from self.ready()
        if _DETECTOR not in [output.get("name") for output in config.get("output", [])]:
            _log.warning(
                "%s does not say which detector finds the faces: that it is exchanged would go unnoticed. Take "
                "model_repository/photo_faces/ of this version of arcface-triton",
                self.who,
            )
            return None
        parameters = {**self._parameters, _DETECTOR: True, "probe": True}
        found = yield from self._asked(
            PhotoRequest(self.options.model, {"image": b""}, (_DETECTOR,), parameters), self.options.retry_for_s
        )
        self._detector_id = self._detector_of(found)
        self._parameters[_DETECTOR] = True
        self._outputs = (*self._outputs, *[_DETECTOR] * (_DETECTOR not in self._outputs))
        return self._detector_id

    def probe(self) -> Steps[None]:
        """Have a process of the model answer without a photo; it does not count in the model's own metrics.

        Raises:
            What `faces` raises.
        """
        request = PhotoRequest(self.options.model, {"image": b""}, ("score",), {"probe": True})
        with suppress(InvalidFaces):  # a model.py of before refuses the photo, which is as good an answer
            yield from self._asked(request, self.options.retry_for_s)

    def faces(self, photo: bytes, retry_for_s: float) -> Steps[list[Face]]:
        """The faces of an encoded photo; see `PhotoEmbedder.faces`."""
        request = PhotoRequest(self.options.model, {"image": photo}, self._outputs, self._parameters)
        return self._faces((yield from self._asked(request, retry_for_s)))

    def verify(self, a: bytes, b: bytes, max_distance: float | None) -> Steps[Verified | None]:
        """The most alike faces of two encoded photos; see `PhotoEmbedder.verify`."""
        limit = {} if max_distance is None else {"max_distance": _number("max_distance", max_distance)}
        parameters = self._parameters | limit
        request = PhotoRequest(VERIFY_MODEL, {"image_a": a, "image_b": b}, _VERIFY_OUTPUTS, parameters)
        found = yield from self._asked(request, self.options.retry_for_s)
        if not len(found["similarity"]):
            return None
        self._check_contract(found, 1)
        return Verified(
            float(found["similarity"][0]),
            bool(found["same"][0]),
            _box(found["box_a"][0]),
            _box(found["box_b"][0]),
            float(found["max_distance"][0]),
            bool(found["calibrated"][0]),
        )

    def _asked(self, request: PhotoRequest, retry_for_s: float) -> Steps[Tensors]:
        """The answer to a request, which is sent again to a server or model that is not there; see `Session.embed`."""
        give_up_s, attempt, ended = time.monotonic() + retry_for_s, 0, 0
        while True:
            sent_s = time.monotonic()
            try:
                found: Tensors = yield "infer_files", *request, self.options.timeout_s
                break
            except DeadlineExceeded:
                raise
            except BackendUnavailable as exc:
                ended += isinstance(exc, ModelNotReady) and time.monotonic() - sent_s > LONG_S
                if ended == 2:
                    raise InvalidFaces(f"two processes of the server ended while they were at it ({exc})") from exc
                wait_s = backoff_s(attempt)
                if time.monotonic() + wait_s > give_up_s:
                    raise
            except InferenceFailed as exc:
                _, bad, why = str(exc).partition(PHOTO_REFUSED)
                if bad:
                    raise InvalidFaces(why) from exc
                if NUMBER_EXPECTED in str(exc):
                    raise WrongUse(f"{exc}.") from exc
                raise
            yield "sleep", wait_s
            attempt += 1
        missing = [name for name in request.outputs if name not in found]
        if missing:
            raise InferenceFailed(f"{request.model!r} at {self.address} answered without {', '.join(missing)}.")
        return found

    def _faces(self, found: Tensors) -> list[Face]:
        if self._detector_id is not None and (other := self._detector_of(found)) != self._detector_id:
            raise DetectorMismatch(
                f"{self.who} answered with the faces that {other} finds; expected those of {self._detector_id}, "
                "as before. Serve that one again: arcface rollback --model photo_faces, then start the server again"
            )
        count = len(found["box"])
        shapes = {"box": (count, 4), "score": (count,), "landmarks": (count, 5, 2)}
        wrong = [f"{name} {found[name].shape}" for name, shape in shapes.items() if found[name].shape != shape]
        if wrong:
            raise InferenceFailed(f"{self.who} answered {', '.join(wrong)} for {count} faces.")
        if not count:
            return []
        self._check_contract(found, count)
        answer = checked_rows(found, (count, found["embedding"].shape[-1]), self.who)
        crops = found.get("crop")
        return [
            Face(
                _box(found["box"][i]),
                float(found["score"][i]),
                found["landmarks"][i],
                answer.embeddings[i],
                float(answer.norms[i]),
                None if crops is None else crops[i],
            )
            for i in range(count)
        ]

    def _detector_of(self, found: Tensors) -> str:
        if found[_DETECTOR].shape != (1,):
            raise InferenceFailed(f"{self.who} answered {_DETECTOR} {found[_DETECTOR].shape}; expected (1,).")
        return str(found[_DETECTOR][0])

    def _check_contract(self, found: Tensors, count: int) -> None:
        """Raises ContractMismatch where the rows are not of the first answer's contract, or of the expected one."""
        row = checked_contract(found, count, self.who)
        with self._lock:
            if self.contract is None:
                self.contract = row
            expected = self.contract
        if not np.array_equal(row, expected):
            raise other_contract(row, expected, self.who)


def encoded(photo: PhotoLike) -> bytes:
    """The bytes of a photo's file.

    Raises:
        OSError: it cannot be read.
        InvalidFaces: None, as `cv2.imread` gives for what it cannot read; an array without pixels, or with more than
            `MAX_PIXELS` or a PNG has room for; see `photo_bytes` too.
        WrongUse: this is no photo.
    """
    if isinstance(photo, (bytes, bytearray, memoryview)):
        return bytes(photo)
    if isinstance(photo, (str, Path)):
        return photo_bytes(photo)
    if photo is None:
        raise InvalidFaces("None, as cv2.imread gives for a file that it cannot read; expected a photo.")
    if not isinstance(photo, np.ndarray) or photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
        got = f"{photo.dtype} {photo.shape}" if isinstance(photo, np.ndarray) else type(photo).__name__
        raise WrongUse(f"expected a photo as a path, a file's bytes, or pixels uint8 (H, W, 3) BGR; got {got}.")
    if not photo.size:
        raise InvalidFaces(f"the photo has no pixels: expected uint8 (H, W, 3) BGR, got {photo.shape}.")
    if photo.shape[0] * photo.shape[1] > MAX_PIXELS:
        raise InvalidFaces(f"{photo.shape[1]} × {photo.shape[0]} pixels; expected at most {MAX_PIXELS:,}.")
    with importing("sending pixels"):
        import cv2
    written, png = cv2.imencode(".png", photo, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not written:
        raise InvalidFaces(f"pixels {photo.shape} do not fit a PNG: a side may have 1,000,000.")
    return bytes(png)


def refused(exc: InvalidFaces | OSError) -> InvalidFaces:
    """What a stream yields for a photo that cannot be used, instead of ending.

    Raises:
        BackendUnavailable: it is the server that cannot answer.
    """
    if isinstance(exc, InvalidFaces):
        return exc
    if isinstance(exc, BackendUnavailable):
        raise exc
    return InvalidFaces(exc.strerror or str(exc))


def _number(key: str, value: object) -> Parameter:
    """A parameter as every protocol can carry it; its range is the server's to judge."""
    if not isinstance(value, Real):
        raise ConfigError(f"{key} is {value!r}; expected a number.", key)
    if isinstance(value, Integral) and abs(int(value)) < 1 << 63:
        return int(value)
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _box(row: Array) -> tuple[float, float, float, float]:
    x, y, width, height = row.tolist()
    return x, y, width, height
