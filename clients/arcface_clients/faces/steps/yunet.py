"""YuNet, a small face detector: through ONNX Runtime where that is installed, else through OpenCV, which is slower.

Both find the same faces. YuNet's file declares 640×640 pixels, which OpenCV disregards and ONNX Runtime insists on,
although nothing in the network depends on it: the declarations are rewritten in memory, without the onnx package.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.float32]

LOOKS = 3  # its landmarks shift by several pixels with the size of the face; see find_faces
MAX_OVERLAP = 0.3  # intersection over union of two boxes of which one is dropped; OpenCV's default
STRIDES = (8, 16, 32)
OUTPUTS = [f"{kind}_{stride}" for stride in STRIDES for kind in ("cls", "obj", "bbox", "kps")]
KEPT_SIZES = 4  # OpenCV's networks in memory; each holds what one image of its size needs
_LOOK_SIDE = 128  # find_faces looks at faces of this size all the time: OpenCV's network for it is never dropped
_OPENCV_SIDE = 64  # in a narrower image OpenCV (4.11) finds faces of score 1 in memory that it has not written
_TRIED_SCORE = 0.5


class NotYuNet(ValueError):
    """A file that cannot be run as YuNet."""


def open_yunet(file: str, threads: int = 1, *, opencv: bool = False) -> YuNet | OpenCvYuNet:
    """YuNet in the fastest runtime that is installed; with `opencv` in OpenCV all the same, which has its own threads.

    Raises:
        NotYuNet: that runtime cannot run the file.
    """
    return OpenCvYuNet(file) if opencv or find_spec("onnxruntime") is None else YuNet(file, threads)


class YuNet:
    """YuNet through ONNX Runtime; may be called from any number of threads.

    Attributes:
        looks: how often a face should be looked at.
    """

    looks = LOOKS

    def __init__(self, file: str, threads: int = 1) -> None:
        """Load it, and try it on nothing.

        Args:
            file: YuNet's ONNX.
            threads: of a look; several photos at a time use the cores better than several threads.

        Raises:
            NotYuNet: not a file that ONNX Runtime can run as YuNet.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # everything it would log is raised as well
        try:
            model = for_any_size(Path(file).read_bytes())
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            self(np.zeros((_LOOK_SIDE, _LOOK_SIDE, 3), np.uint8), _TRIED_SCORE)
        except Exception as exc:  # ONNX Runtime raises one class per error code, without a common base
            raise NotYuNet(str(exc).partition("\n")[0] or type(exc).__name__) from exc

    def __call__(self, image_bgr: Image, min_score: float) -> Rows:
        """See `Look` in detect.py."""
        height, width = image_bgr.shape[:2]
        coarsest = STRIDES[-1]
        # Not np.zeros: jemalloc answers calloc with fresh pages, whose faults cost as much as a look at a face.
        padded = np.empty((1, 3, -(-height // coarsest) * coarsest, -(-width // coarsest) * coarsest), np.float32)
        padded[0, :, :height, :width] = image_bgr.transpose(2, 0, 1)
        padded[0, :, height:] = 0
        padded[0, :, :height, width:] = 0
        outputs = self._session.run(OUTPUTS, {"input": padded})
        return _without_overlaps(_found(outputs, padded.shape[3], min_score), min_score)


class OpenCvYuNet:
    """YuNet through OpenCV's own wrapper, for any number of threads, each with networks of its own.

    Attributes:
        looks: how often a face should be looked at.
    """

    looks = LOOKS

    def __init__(self, file: str) -> None:
        """Load it, and try it on nothing.

        Raises:
            NotYuNet: not a file that OpenCV can run as YuNet.
        """
        self._file, self._of_thread = file, threading.local()
        try:
            self(np.zeros((_LOOK_SIDE, _LOOK_SIDE, 3), np.uint8), _TRIED_SCORE)
        except cv2.error as exc:
            raise NotYuNet(exc.err or str(exc)) from exc

    def __call__(self, image_bgr: Image, min_score: float) -> Rows:
        """See `Look` in detect.py."""
        height, width = image_bgr.shape[:2]
        if min(height, width) < _OPENCV_SIDE:
            lower, right = max(0, _OPENCV_SIDE - height), max(0, _OPENCV_SIDE - width)
            image_bgr = np.asarray(cv2.copyMakeBorder(image_bgr, 0, lower, 0, right, cv2.BORDER_CONSTANT), np.uint8)
        network = self._network((image_bgr.shape[1], image_bgr.shape[0]))
        network.setScoreThreshold(min_score)
        rows = network.detect(image_bgr)[1]
        if rows is None:
            return np.empty((0, 15), np.float32)
        return np.asarray(rows[np.isfinite(rows).all(axis=1)], np.float32)

    def _network(self, size: tuple[int, int]) -> cv2.FaceDetectorYN:
        """This thread's network for images of this size, made or kept: the sizes used last, and that of faces always.

        OpenCV prepares a network anew for each size of image, which takes longer than to look at a small one.
        """
        if not hasattr(self._of_thread, "of_size"):
            self._of_thread.of_size = OrderedDict()
        of_size: OrderedDict[tuple[int, int], cv2.FaceDetectorYN] = self._of_thread.of_size
        network = of_size.get(size) or cv2.FaceDetectorYN.create(self._file, "", size, _TRIED_SCORE, MAX_OVERLAP)
        of_size[size] = network
        of_size.move_to_end(size)
        if len(of_size) > KEPT_SIZES:
            del of_size[next(each for each in of_size if each != (_LOOK_SIDE, _LOOK_SIDE))]
        return network


def _found(outputs: list[npt.NDArray[Any]], width: int, min_score: float) -> Rows:
    """All places of the grids with at least this score, float32 (P,15); decoded as OpenCV's face_detect.cpp does."""
    found = []
    for level, stride in enumerate(STRIDES):
        sure, present, box, points = outputs[4 * level : 4 * level + 4]
        product = (sure * present).ravel()  # both in 0..1; the score is its root
        (good,) = (product >= min_score**2).nonzero()
        if not len(good):
            continue
        place = np.stack(np.divmod(good, width // stride)[::-1], axis=1).astype(np.float32)
        size = stride * np.exp(box[0, good, 2:])
        corner = stride * (place + box[0, good, :2]) - size / 2
        landmarks = stride * (place[:, None] + points[0, good].reshape(-1, 5, 2))
        found.append(np.hstack([corner, size, landmarks.reshape(-1, 10), np.sqrt(product[good, None])]))
    rows: Rows = np.concatenate(found) if found else np.empty((0, 15), np.float32)
    finite: Rows = rows[np.isfinite(rows).all(axis=1)]
    return finite


def _without_overlaps(rows: Rows, min_score: float) -> Rows:
    """Rows without those whose box overlaps a better one; boxes are compared in whole pixels, as OpenCV does."""
    if len(rows) < 2:
        return rows
    kept = cv2.dnn.NMSBoxes(rows[:, :4].astype(np.int32).tolist(), rows[:, 14].tolist(), min_score, MAX_OVERLAP)
    best: Rows = rows[np.asarray(kept, np.intp)]
    return best


# Numbers of fields in onnx.proto, by message; wire types of protocol buffers.
_MODEL_GRAPH, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE_INFO = 7, 11, 12, 13
_NAME, _TYPE, _TENSOR_TYPE, _ELEMENT_TYPE, _SHAPE, _DIMENSION, _DIMENSION_NAME = 1, 2, 1, 1, 2, 1, 2
_FLOAT = 1
_VARINT, _EIGHT_BYTES, _WITH_LENGTH, _FOUR_BYTES = 0, 1, 2, 5


def for_any_size(model: bytes) -> bytes:
    """YuNet's ONNX with its input declared as float32 of any four dimensions, and all other shapes undeclared.

    Raises:
        ValueError: not ONNX.
    """
    unknown = b"".join(_field(_DIMENSION, _field(_DIMENSION_NAME, name)) for name in (b"n", b"c", b"h", b"w"))
    tensors = [_tensor(_GRAPH_INPUT, b"input", _field(_SHAPE, unknown))]
    tensors += [_tensor(_GRAPH_OUTPUT, name.encode()) for name in OUTPUTS]
    declared = (_GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE_INFO)
    parts = []
    for number, field, content in _fields(model):
        if number == _MODEL_GRAPH:
            kept = [inner for inner_number, inner, _ in _fields(content) if inner_number not in declared]
            field = _field(_MODEL_GRAPH, b"".join([*kept, *tensors]))
        parts.append(field)
    return b"".join(parts)


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Each field's number, all its bytes, and its content (empty for numbers)."""
    at = 0
    while at < len(message):
        tag, begin = _number(message, at)
        if tag & 7 == _WITH_LENGTH:
            length, begin = _number(message, begin)
            end = begin + length
        elif tag & 7 == _VARINT:
            begin = end = _number(message, begin)[1]
        elif tag & 7 in (_EIGHT_BYTES, _FOUR_BYTES):
            begin = end = begin + (8 if tag & 7 == _EIGHT_BYTES else 4)
        else:
            raise ValueError("not an ONNX file")
        if end > len(message):
            raise ValueError("not a whole ONNX file")
        yield tag >> 3, message[at:end], message[begin:end]
        at = end


def _number(message: bytes, at: int) -> tuple[int, int]:
    """The number that is encoded at a place, seven bits a byte, and the place after it."""
    value = 0
    for shift, byte in enumerate(message[at : at + 10]):
        value |= (byte & 127) << 7 * shift
        if byte < 128:
            return value, at + shift + 1
    raise ValueError("not a whole ONNX file")


def _tensor(number: int, name: bytes, shape: bytes = b"") -> bytes:
    """A float32 input or output of a graph."""
    element = bytes([_ELEMENT_TYPE << 3 | _VARINT, _FLOAT])
    return _field(number, _field(_NAME, name) + _field(_TYPE, _field(_TENSOR_TYPE, element + shape)))


def _field(number: int, content: bytes) -> bytes:
    """A field with a length; `number` is below 16."""
    length, left = bytearray(), len(content)
    while left > 127:
        length.append(left & 127 | 128)
        left >>= 7
    return bytes([number << 3 | _WITH_LENGTH, *length, left]) + content
