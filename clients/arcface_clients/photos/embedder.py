"""PhotoEmbedder: photos in; faces with their embeddings, from a Triton server, out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from arcface_clients.arrays import Array
from arcface_clients.contract import contract_prefix, contract_words
from arcface_clients.errors import (
    BackendUnavailable,
    DeadlineExceeded,
    InferenceFailed,
    InvalidFaces,
    ModelNotReady,
    WrongUse,
)
from arcface_clients.extras import importing
from arcface_clients.photos.face import Face, Verified
from arcface_clients.triton.address import Tls
from arcface_clients.triton.answer import Tensors, checked_contract, checked_rows, other_contract
from arcface_clients.triton.client import STREAM_RETRY_FOR_S
from arcface_clients.triton.options import ClientOptions
from arcface_clients.triton.sansio import CONTROL_TIMEOUT_S, Steps, backoff_s, run
from arcface_clients.triton.transports import FileTransport, open_transport
from arcface_clients.triton.transports.refusals import closed

if TYPE_CHECKING:
    from typing_extensions import Self

PhotoLike = bytes | Path | str | Array
"""A photo: a file's bytes, its path, or pixels uint8 (H,W,3) BGR, which are sent as PNG."""
VERIFY_MODEL = "photo_verify"
_REFUSED = "photo refused: "  # how the model's message of a bad photo begins
_OUTPUTS = ("box", "score", "landmarks", "embedding", "norm", "contract")


class PhotoEmbedder:
    """Faces of photos from a Triton server that has `photo_faces`; safe to use from many threads.

    Args:
        url, model, timeout_s, retry_for_s, in_flight, expected_contract, compression, headers, tls: as in
            `ClientOptions`.
        min_score: lowest detector score of a face, 0..1; None: the server's default.
        min_size: smallest side of a face, in pixels of the photo; None: the server's default.
        max_faces: so many of the best; None: the server's limit.
        crops: answer the aligned faces too.
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        model: str = "photo_faces",
        *,
        min_score: float | None = None,
        min_size: int | None = None,
        max_faces: int | None = None,
        crops: bool = False,
        timeout_s: float = 120.0,
        retry_for_s: float = 5.0,
        in_flight: int = 4,
        expected_contract: str | None = None,
        compression: str | None = None,
        headers: Mapping[str, str] | None = None,
        tls: Tls | None = None,
    ) -> None:
        """Check the arguments; nothing is sent yet."""
        self.options = ClientOptions(
            url=url,
            model=model,
            timeout_s=timeout_s,
            retry_for_s=retry_for_s,
            in_flight=in_flight,
            expected_contract=expected_contract,
            compression=compression,
            headers=headers or {},
            tls=tls or Tls(),
        )
        self.options.tls.check_files()
        told = {"min_score": min_score, "min_size": min_size, "max_faces": max_faces}
        self._parameters: dict[str, float] = {key: value for key, value in told.items() if value is not None}
        self._parameters |= {"crop": True} if crops else {}
        self._crops = crops
        self._lock = threading.Lock()
        self._transport: FileTransport | None = None
        self._closed = False
        self._contract: npt.NDArray[np.int32] | None = contract_words(expected_contract) if expected_contract else None

    def faces(self, photo: PhotoLike) -> list[Face]:
        """The faces of a photo, best score first; an empty list if there are none.

        Raises:
            InvalidFaces: the photo cannot be decoded, or is too large.
            OSError: its file cannot be read.
            ServerUnreachable, ModelNotReady, DeadlineExceeded: the server cannot answer.
            InferenceFailed: the server answered with an error.
            ContractMismatch: see `expected_contract`; or the model changed under way.
        """
        return self._faces(photo, self.options.retry_for_s)

    def faces_stream(
        self, photos: Iterable[PhotoLike], *, retry_for_s: float = STREAM_RETRY_FOR_S
    ) -> Iterator[list[Face] | InvalidFaces]:
        """What `faces` gives for each photo, in order, with `in_flight` photos on their way at a time.

        A bad photo yields its InvalidFaces instead of ending the stream; a file that cannot be read as well.

        Raises:
            What else `faces` raises, when the photo's turn comes.
        """
        window: deque[Future[list[Face] | InvalidFaces]] = deque()
        with ThreadPoolExecutor(self.options.in_flight, thread_name_prefix="arcface-photos") as workers:
            try:
                for photo in photos:
                    window.append(workers.submit(self._or_refused, photo, retry_for_s))
                    while window and (len(window) > self.options.in_flight or window[0].done()):
                        yield window.popleft().result()
                while window:
                    yield window.popleft().result()
            finally:
                for future in window:
                    future.cancel()

    def verify(self, a: PhotoLike, b: PhotoLike, *, max_distance: float | None = None) -> Verified | None:
        """The most alike pair of faces of two photos; None if one of them shows no face.

        Args:
            a: a photo.
            b: another.
            max_distance: largest 1 − cosine of the same person; None: what the server is configured with.

        Raises:
            What `faces` raises.
        """
        parameters = dict(self._parameters) | ({} if max_distance is None else {"max_distance": max_distance})
        files = {"image_a": _encoded(a), "image_b": _encoded(b)}
        outputs = ("similarity", "same", "box_a", "box_b")
        found = self._ask(VERIFY_MODEL, files, outputs, parameters, self.options.retry_for_s)
        if not len(found["similarity"]):
            return None
        return Verified(
            float(found["similarity"][0]), bool(found["same"][0]), _box(found["box_a"][0]), _box(found["box_b"][0])
        )

    def ensure_ready(self) -> None:
        """Ask the server for the model now.

        Raises:
            ServerUnreachable, ModelNotReady, DeadlineExceeded: it cannot answer.
        """
        limit_s = min(self.options.timeout_s, CONTROL_TIMEOUT_S)
        try:
            self._open().model_config(self.options.model, limit_s)
        except ModelNotReady as exc:
            raise ModelNotReady(f"{exc} (photos need a detector there: arcface import-detector FILE)") from exc

    @property
    def contract_prefix(self) -> str | None:
        """The first 32 digits of the contract id of the embeddings; None before the first face came."""
        return None if self._contract is None else contract_prefix(self._contract)

    def close(self) -> None:
        """Give up the connection; may be called twice. Requests under way fail."""
        with self._lock:
            self._closed, transport, self._transport = True, self._transport, None
        if transport is not None:
            transport.close()

    def _or_refused(self, photo: PhotoLike, retry_for_s: float) -> list[Face] | InvalidFaces:
        try:
            return self._faces(photo, retry_for_s)
        except InvalidFaces as exc:
            return exc
        except OSError as exc:
            if isinstance(exc, BackendUnavailable):
                raise
            return InvalidFaces(exc.strerror or str(exc))

    def _faces(self, photo: PhotoLike, retry_for_s: float) -> list[Face]:
        outputs = (*_OUTPUTS, *["crop"] * self._crops)
        found = self._ask(self.options.model, {"image": _encoded(photo)}, outputs, self._parameters, retry_for_s)
        return self._checked(found)

    def _ask(
        self,
        model: str,
        files: Mapping[str, bytes],
        outputs: tuple[str, ...],
        parameters: Mapping[str, float],
        retry_for_s: float,
    ) -> Tensors:
        try:
            found = run(self._exchange(model, files, outputs, parameters, retry_for_s), self._open())
        except InferenceFailed as exc:
            _, bad, why = str(exc).partition(_REFUSED)
            if bad:
                raise InvalidFaces(why) from exc
            raise
        missing = [name for name in outputs if name not in found]
        if missing:
            raise InferenceFailed(f"{model!r} at {self.options.address} answered without {', '.join(missing)}.")
        return found

    def _exchange(
        self,
        model: str,
        files: Mapping[str, bytes],
        outputs: tuple[str, ...],
        parameters: Mapping[str, float],
        retry_for_s: float,
    ) -> Steps[Tensors]:
        """A request, sent again to a server or model that is not there; see `Session.embed`."""
        give_up_s, attempt = time.monotonic() + retry_for_s, 0
        while True:
            try:
                tensors: Tensors = yield "infer_files", model, files, outputs, parameters, self.options.timeout_s
                return tensors
            except DeadlineExceeded:
                raise
            except BackendUnavailable:
                wait_s = backoff_s(attempt)
                if time.monotonic() + wait_s > give_up_s:
                    raise
            yield "sleep", wait_s
            attempt += 1

    def _checked(self, found: Tensors) -> list[Face]:
        count, who = len(found["box"]), f"{self.options.model!r} at {self.options.address}"
        shapes = {"box": (count, 4), "score": (count,), "landmarks": (count, 5, 2)}
        wrong = [f"{name} {found[name].shape}" for name, shape in shapes.items() if found[name].shape != shape]
        if wrong:
            raise InferenceFailed(f"{who} answered {', '.join(wrong)} for {count} faces.")
        if not count:
            return []
        row = checked_contract(found, count, who)
        with self._lock:
            if self._contract is None:
                self._contract = row
            expected = self._contract
        if not np.array_equal(row, expected):
            raise other_contract(row, expected, who)
        answer = checked_rows(found, (count, found["embedding"].shape[-1]), who)
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

    def _open(self) -> FileTransport:
        with self._lock:
            if self._closed:
                raise closed()
            if self._transport is None:
                self._transport = open_transport(self.options.connection())
            return self._transport

    def __enter__(self) -> Self:
        """The embedder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """URL and model."""
        return f"{type(self).__name__}({str(self.options.address)!r}, model={self.options.model!r})"


def _encoded(photo: PhotoLike) -> bytes:
    if isinstance(photo, (bytes, bytearray, memoryview)):
        return bytes(photo)
    if isinstance(photo, (str, Path)):
        return Path(photo).read_bytes()
    if not isinstance(photo, np.ndarray) or photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
        got = f"{photo.dtype} {photo.shape}" if isinstance(photo, np.ndarray) else type(photo).__name__
        raise WrongUse(f"expected a photo as a path, a file's bytes, or pixels uint8 (H, W, 3) BGR; got {got}.")
    with importing("sending pixels"):
        import cv2
    return bytes(cv2.imencode(".png", photo, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1])


def _box(row: Array) -> tuple[float, float, float, float]:
    x, y, width, height = row.tolist()
    return x, y, width, height
