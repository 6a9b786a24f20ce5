"""A whole import: the source is found, converted and proved, unless an earlier import of it still stands."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from arcface_build.imports.child import TIMEOUT_S, Job, run_child
from arcface_build.imports.preprocessing import Stated
from arcface_build.imports.source import CACHE
from arcface_clients.atomic import new_folder
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
    stated: Stated | None = None,
    output: str | None = None,
    faces: Path | None = None,
    accept_licence: bool = False,
    insightface_root: Path | None = None,
    force: bool = False,
    timeout_s: float = TIMEOUT_S,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Imported:
    """Import what `source` means into a folder under `models_dir`: made aside in a child process, then moved.

    Args:
        source: an ONNX file, a known model, an InsightFace pack or a demo.
        models_dir: the folder `models/`.
        cache: where downloads are kept.
        name: of the folder under it; None takes the source's.
        stated: the user's word on preprocessing.
        output: the embedding, where the file has several outputs that can be one.
        faces: crops to prove on; None takes drawn ones.
        accept_licence: agree to the licence of what has to be downloaded.
        insightface_root: where InsightFace keeps its packs.
        force: import again although nothing has changed.
        timeout_s: end an import that takes longer.
        say: told of downloads.
        progress: told (phase, done, total).

    Raises:
        Missing, WrongUse, SourceRefused, ProofFailed: nothing is left behind.
    """
    models_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".import-", dir=models_dir) as scratch:
        job = Job(
            source=source,
            models_dir=str(models_dir),
            scratch=scratch,
            cache=str(cache),
            name=name,
            stated=(stated or Stated()).to_json(),
            output=output,
            faces=str(faces) if faces else None,
            accept_licence=accept_licence,
            insightface_root=str(insightface_root) if insightface_root else None,
            force=force,
        )
        done = run_child(job, timeout_s, progress, say)
        manifest, folder = ImportManifest(**done.manifest), models_dir / done.name
        if not done.made:
            return Imported(manifest, folder, True, False)
        had_variants = (folder / "variants").is_dir()
        with new_folder(folder) as whole:
            for part in Path(done.made).iterdir():
                part.rename(whole / part.name)
    return Imported(manifest, folder, False, had_variants and not (folder / "variants").is_dir())
