"""Runs a whole import: finds, converts and proves the source, unless an earlier import of it is still valid."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from arcface_build.imports.child import TIMEOUT_S, ImportJob, run_child
from arcface_build.imports.preprocessing import Stated
from arcface_build.imports.source import CACHE
from arcface_clients.atomic import new_folder
from arcface_clients.engines.import_manifest import ImportManifest
from arcface_clients.evidence.drift import DRIFT_LIMITS


@dataclass(frozen=True)
class Imported:
    """The import in `folder`. `reused`: it was already there. `variants_gone`: stale variants were removed."""

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
    limits: Mapping[str, float] = DRIFT_LIMITS,
    timeout_s: float = TIMEOUT_S,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Imported:
    """Import `source` into a folder under `models_dir`: a child process builds it elsewhere, then it is moved there.

    Args:
        source: an ONNX file, a known model, an InsightFace pack or a demo.
        models_dir: the folder `models/`.
        cache: where downloads are kept.
        name: name of that folder; None uses the source's.
        stated: the preprocessing stated by the user.
        output: name of the embedding, if the file has several possible outputs.
        faces: crops for the proof; None uses synthetic ones.
        accept_licence: accept the licence of anything that has to be downloaded.
        insightface_root: where InsightFace keeps its packs.
        force: import again even if nothing has changed.
        limits: largest drift by precision; the proof applies that of fp32.
        timeout_s: stop an import that takes longer.
        say: called with a line about each download.
        progress: called with (phase, done, total).

    Raises:
        Missing, WrongUse, SourceRefused, ProofFailed: nothing is left behind.
    """
    models_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".import-", dir=models_dir) as scratch:
        job = ImportJob(
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
            limits=dict(limits),
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
