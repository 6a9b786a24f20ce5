"""A whole import: the source is found, converted and proved, unless an earlier import of it still stands."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from arcface_build.imports.importing import check_name, existing_import, import_model
from arcface_build.imports.proof_faces import drawn_faces, read_faces
from arcface_build.imports.source import CACHE, known_models, resolve, with_file
from arcface_clients.contract import Preprocessing
from arcface_clients.engines.import_manifest import ImportManifest


@dataclass(frozen=True)
class Imported:
    """What stands in `folder` now; `reused`: it did before. `variants_gone`: variants were of another serving ONNX."""

    manifest: ImportManifest
    folder: Path
    reused: bool
    variants_gone: bool


def import_source(
    source: str,
    models_dir: Path,
    *,
    cache: Path = CACHE,
    name: str | None = None,
    stated: Preprocessing | None = None,
    faces: Path | None = None,
    accept_licence: bool = False,
    insightface_root: Path | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Imported:
    """Import what `source` means into a folder under `models_dir`.

    Args:
        source: an ONNX file, a known model, an InsightFace pack or a demo.
        models_dir: the folder `models/`.
        cache: where downloads are kept.
        name: of the folder under it; None takes the source's.
        stated: the user's word on preprocessing.
        faces: crops to prove on; None takes drawn ones.
        accept_licence: agree to the licence of what has to be downloaded.
        insightface_root: where InsightFace keeps its packs.
        force: import again although nothing has changed.
        say: told of downloads.
        progress: told (phase, done, total).

    Raises:
        Missing, WrongUse, SourceRefused, ProofFailed: nothing is left behind.
    """
    with tempfile.TemporaryDirectory(prefix="arcface-import-") as workspace:
        found = resolve(
            source,
            Path(workspace),
            known=known_models(),
            cache=cache,
            accept_licence=accept_licence,
            insightface_root=insightface_root,
            say=say,
        )
        folder = models_dir / check_name(name or found.name)
        had_variants = (folder / "variants").is_dir()
        manifest = None if force else existing_import(folder, found, stated)
        if manifest is not None:
            return Imported(manifest, folder, True, False)
        found = with_file(found, lambda done, total: progress("build the demo network", done, total))
        crops, faces_from = read_faces(faces) if faces else drawn_faces()
        manifest = import_model(found, folder, crops, faces_from, stated=stated, progress=progress)
    return Imported(manifest, folder, False, had_variants and not (folder / "variants").is_dir())
