"""PhotoEmbedder: photos in; faces with their embeddings, from a Triton server, out."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import partial

from arcface_clients.closing import Closing
from arcface_clients.errors import InvalidFaces
from arcface_clients.photos.client import PhotoClient
from arcface_clients.photos.face import Face, Verified
from arcface_clients.photos.session import PhotoLike, encoded, refused
from arcface_clients.triton.client import STREAM_RETRY_FOR_S
from arcface_clients.triton.live import Live, in_turn
from arcface_clients.triton.options import check_retry
from arcface_clients.triton.sansio import Steps, T, run
from arcface_clients.triton.transports import open_transport


class PhotoEmbedder(PhotoClient, Closing):
    """Faces of photos from a Triton server; safe to use from many threads, connects with the first use.

    The arguments are those of `PhotoClient`.
    """

    def _set_up(self) -> None:
        super()._set_up()
        self._live = Live(partial(open_transport, self.options.connection()))
        self._finalizer = weakref.finalize(self, self._live.end)

    def faces(self, photo: PhotoLike) -> list[Face]:
        """The faces of a photo, best score first; an empty list if there are none.

        Raises:
            InvalidFaces: the photo cannot be decoded, or is too large.
            OSError: its file cannot be read.
            WrongUse: min_score, min_size, max_faces or max_distance is out of its range.
            ServerUnreachable, ModelNotReady, DeadlineExceeded: the server cannot answer.
            InferenceFailed: the server answered with an error.
            ContractMismatch: see `expected_contract`; or the model changed under way.
        """
        return self._run(self._session.faces(encoded(photo), self.options.retry_for_s))

    def faces_stream(
        self, photos: Iterable[PhotoLike], *, retry_for_s: float = STREAM_RETRY_FOR_S
    ) -> Iterator[list[Face] | InvalidFaces]:
        """What `faces` gives for each photo, in order, with `in_flight` photos on their way at a time.

        A bad photo yields its InvalidFaces instead of ending the stream; a file that cannot be read as well.

        Raises:
            ConfigError: retry_for_s is no time.
            What else `faces` raises, when the photo's turn comes.
        """
        check_retry(retry_for_s)
        submit, in_flight = self._live.submit, self.options.in_flight
        begun = (submit(in_flight, self._or_refused, photo, retry_for_s) for photo in photos)
        return in_turn(begun, in_flight)

    def verify(self, a: PhotoLike, b: PhotoLike, *, max_distance: float | None = None) -> Verified | None:
        """The most alike pair of faces of two photos; None if one of them shows no face.

        Args:
            a: a photo.
            b: another.
            max_distance: largest 1 − cosine of the same person; None: what was measured with the served
                weights (`Verified.calibrated`), else what the server is configured with.

        Raises:
            What `faces` raises.
        """
        return self._run(self._session.verify(encoded(a), encoded(b), max_distance))

    def ensure_ready(self) -> None:
        """Ask the server for the model now.

        Raises:
            ServerUnreachable, ModelNotReady, DeadlineExceeded: it cannot answer.
        """
        self._run(self._session.ready())

    def pin_detector(self) -> str | None:
        """Ask which detector finds the faces; `faces` and `faces_stream` refuse those of any other from now on.

        `verify` does not tell who found its faces.

        Returns:
            Its id: kind, sha256 and limits, as `steps.detect.detector_id` writes them. None, with a warning, where the
            server does not say; then nothing is refused.

        Raises:
            ServerUnreachable, ModelNotReady, DeadlineExceeded: it cannot answer. Later, from what asks for faces:
            DetectorMismatch.
        """
        return self._run(self._session.pin_detector())

    def probe(self) -> None:
        """Have a process of the model answer, without a photo: a server may be ready while it is dead.

        Raises:
            ServerUnreachable, ModelNotReady, DeadlineExceeded: it cannot answer.
        """
        self._run(self._session.probe())

    def close(self) -> None:
        """Give up the connection; may be called twice. Requests under way fail."""
        if self._finalizer.detach():
            self._live.end(wait=True)

    def _or_refused(self, photo: PhotoLike, retry_for_s: float) -> list[Face] | InvalidFaces:
        try:
            return self._run(self._session.faces(encoded(photo), retry_for_s))
        except (InvalidFaces, OSError) as exc:
            return refused(exc)

    def _run(self, steps: Steps[T]) -> T:
        session = self._session
        return run(session.in_time(steps, session.deadline_s()), self._live.transport())
