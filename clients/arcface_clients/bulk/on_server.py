"""Has the server find the faces of a unit's photos: what the detector of this host would give, in the same order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from arcface_clients.arrays import FaceArray, FloatArray
from arcface_clients.bulk.files import Files
from arcface_clients.bulk.read import Item, Raw, no_photo, read_raw
from arcface_clients.bulk.units import Unit
from arcface_clients.errors import InvalidFaces
from arcface_clients.faces.images import Found


class FoundFace(Protocol):
    """A face as the server answers it, with its crop."""

    @property
    def box(self) -> tuple[float, float, float, float]: ...  # noqa: D102
    @property
    def score(self) -> float: ...  # noqa: D102
    @property
    def landmarks(self) -> FloatArray: ...  # noqa: D102
    @property
    def embedding(self) -> FloatArray: ...  # noqa: D102
    @property
    def crop(self) -> FaceArray | None: ...  # noqa: D102


class PhotoServer(Protocol):
    """An engine that takes photos too."""

    @property
    def detector_id(self) -> str | None:
        """Which detector finds the faces, and how; None where the server does not say."""
        ...

    def faces_stream(
        self, photos: Iterable[bytes], *, retry_for_s: float = ...
    ) -> Iterator[Sequence[FoundFace] | InvalidFaces]:
        """The faces of each photo, with their crops, in order; an InvalidFaces for a bad one."""
        ...


def photo_rows(
    unit: Unit,
    server: PhotoServer,
    files: Files | None,
    min_score: float,
    retry_for_s: float | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Item, FloatArray | None]]:
    """The items of a unit as `read_unit` gives them, each face with its embedding (D,).

    Args:
        unit: whose sources hold photos.
        server: finds and embeds.
        files: how URLs are opened.
        min_score: the detector's, for the words of a refusal.
        retry_for_s: how long a lost server is tried again; None: as long as the client does.
        check: called before each entry is read; may raise.
    """
    waiting: deque[Raw] = deque()

    def photos() -> Iterator[bytes]:
        for raw in read_raw(unit, files):
            check()
            waiting.append(raw)
            if isinstance(raw.data, bytes):
                yield raw.data

    def others() -> Iterator[tuple[Item, None]]:
        """What stands before the next photo."""
        while waiting and not isinstance(waiting[0].data, bytes):
            yield no_photo(waiting.popleft()), None

    options = {} if retry_for_s is None else {"retry_for_s": retry_for_s}
    for answer in server.faces_stream(photos(), **options):
        yield from others()
        yield from _items(waiting.popleft(), answer or InvalidFaces(f"no face found (score of at least {min_score:g})"))
    yield from others()


def _items(raw: Raw, answer: Sequence[FoundFace] | InvalidFaces) -> Iterator[tuple[Item, FloatArray | None]]:
    if isinstance(answer, InvalidFaces):
        yield Item(raw.name, raw.identity, None, str(answer)), None
        return
    for index, face in enumerate(answer):
        found = Found(face.score, face.box, face.landmarks)
        yield Item(f"{raw.name}[{index}]", raw.identity, face.crop, found=found), face.embedding
