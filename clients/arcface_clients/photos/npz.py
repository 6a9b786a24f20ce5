"""Photos embedded by the server into one .npz, the same that `bulk.npz` writes with the detector of this host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from arcface_clients.bulk.npz import Written, write_npz
from arcface_clients.errors import ContractMismatch, InvalidFaces
from arcface_clients.faces.detect import CROPS_NOT_PHOTOS
from arcface_clients.faces.images import ARRAY_SUFFIXES, Crop, Found
from arcface_clients.photos.embedder import PhotoEmbedder
from arcface_clients.photos.face import Face


def embed_photos_to_npz(
    files: Sequence[str],
    photos: PhotoEmbedder,
    output: Path,
    *,
    contract_id: str | None,
    model: str,
    on_file: Callable[[], None] = lambda: None,
) -> Written:
    """Embed every face of the photos `files` into `output`; without one face nothing is written.

    Args:
        files: paths of photos.
        photos: finds and embeds the faces.
        output: appears whole or not at all.
        contract_id: of the served model.
        model: its name.
        on_file: called after each file.

    Raises:
        DetectorMismatch: the server got another detector meanwhile.
        ContractMismatch: it has another model than `contract_id` says.
    """
    detector_id = photos.pin_detector()
    names: list[str] = []
    rows = []
    found: list[Found] = []
    refused: list[Crop] = []
    for name, answer in zip(files, _answers(files, photos), strict=True):
        if isinstance(answer, InvalidFaces) or not answer:
            refused.append(Crop(name, None, str(answer) if answer else "no face found"))
        else:
            for index, face in enumerate(answer):
                names.append(f"{name}[{index}]")
                rows.append(face.embedding)
                found.append(Found(face.score, face.box, face.landmarks))
            _check(photos.contract_prefix, contract_id)
        on_file()
    write_npz(output, names, rows, contract_id=contract_id, model=model, found=found, detector_id=detector_id)
    return Written(len(rows), len(rows[0]) if rows else 0, tuple(refused))


def _check(served: str | None, contract_id: str | None) -> None:
    """What served the first face; the client itself refuses faces of more than one contract."""
    if contract_id and served and contract_id[:32] != served:
        raise ContractMismatch(
            f"the faces were embedded by a model of contract {served[:12]}, expected {contract_id[:12]}: it was "
            "exchanged meanwhile. Run the command again"
        )


def _answers(files: Sequence[str], photos: PhotoEmbedder) -> Iterator[list[Face] | InvalidFaces]:
    """What became of each file, in order; arrays of crops are no photos."""
    answers = photos.faces_stream(Path(name) for name in files if not name.lower().endswith(ARRAY_SUFFIXES))
    for name in files:
        if name.lower().endswith(ARRAY_SUFFIXES):
            yield InvalidFaces(CROPS_NOT_PHOTOS)
        else:
            yield next(answers)
