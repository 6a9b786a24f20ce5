"""Gets the plan for a spec from the cache, else from the store, else by building it, and says which and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from arcface_build.errors import PlanNotFound
from arcface_build.plans.store import PlanStore, manifest_name, plan_name, what_there_is
from arcface_build.store.local import LocalStore, disk_error
from arcface_build.store.objects import Progress
from arcface_clients.errors import ArcFaceError, Missing, PlanRefused, WrongUse
from arcface_clients.extras import how_to_get
from arcface_clients.plans.manifest import PlanManifest, manifest_bytes
from arcface_clients.plans.read import read_plan
from arcface_clients.plans.signing import sign
from arcface_clients.plans.spec import PlanSpec

Builder = Callable[[PlanSpec, Path], PlanManifest]
"""Builds the plan of a spec into the given file and returns its manifest; leaves nothing behind if it fails."""


@dataclass(frozen=True)
class Obtained:
    """A verified plan on this host. source: "cache", "store" or "build"; notes: why earlier sources had none."""

    path: Path
    manifest: PlanManifest
    source: str
    notes: tuple[str, ...] = ()


def get_or_build(
    spec: PlanSpec,
    cache: PlanStore,
    store: PlanStore | None = None,
    build: Builder | None = None,
    *,
    read_cache: bool = True,
    read_store: bool = True,
    upload: bool = False,
    sign_key: Path | None = None,
    lock_timeout_s: float = 1800.0,
    progress: Progress | None = None,
) -> Obtained:
    """The plan of this spec, verified, in the cache folder; one process per key and host at a time.

    Sources, in order: the cache (`read_cache`), the store (`read_store`; None: no store), a build (None: disabled). A
    damaged or refused plan counts as missing and is noted; so is a store that does not answer, if a build may follow.
    With `upload` a plan built here is published; if another host was first, that is noted, and the plan built here is
    used.

    Raises:
        PlanNotFound: no source had it.
        PlanRefused, StoreUnreachable: the only plan was refused, or the store failed, and building is disabled.
        WrongUse: a plan built here would be refused: a public key is configured, but no key to sign with.
        Missing: another process held the key for lock_timeout_s.
    """
    folder = _folder(cache)
    with _locked(folder, spec.key, lock_timeout_s):
        folder.sweep(spec.key)
        notes: list[str] = []
        failures: list[ArcFaceError] = []

        def tried(step: Callable[[], PlanManifest | None], name: str, place: PlanStore) -> PlanManifest | None:
            try:
                found = step()
            except (PlanRefused, Missing) as exc:
                failures.append(exc)
                notes.append(f"{name}: {exc}")
                return None
            if found is None:
                notes.append(f"{name}: no plan of this key in {name} {place.url}")
            return found

        if read_cache:
            manifest = tried(lambda: _from_cache(cache, spec), "cache", cache)
            if manifest:
                return Obtained(cache.local_path(manifest), manifest, "cache", tuple(notes))
        if store is not None and read_store:
            manifest = tried(lambda: _from_store(cache, store, spec, progress), "store", store)
            if manifest:
                return Obtained(cache.local_path(manifest), manifest, "store", tuple(notes))
        if build is None:
            if failures:
                raise failures[-1]
            raise _not_found(spec, cache, store)
        if (cache.public_key or (store and store.public_key)) and sign_key is None:
            raise WrongUse(
                "a public key is configured, so a plan built here must be signed: add --sign-key PRIVATE.pem, "
                "or build it where the private key is and push it."
            )
        manifest = _build(cache, spec, build, sign_key)
        if upload and store is not None:
            notes.append(_upload(cache, store, manifest, progress))
        return Obtained(cache.local_path(manifest), manifest, "build", tuple(notes))


def _from_cache(cache: PlanStore, spec: PlanSpec) -> PlanManifest | None:
    manifest = cache.find(spec.key)
    return manifest and read_plan(cache.local_path(manifest), cache.public_key).manifest


def _from_store(cache: PlanStore, store: PlanStore, spec: PlanSpec, progress: Progress | None) -> PlanManifest | None:
    manifest = store.find(spec.key)
    if manifest is None:
        return None
    store.fetch(manifest, cache.local_path(manifest), progress)
    return _adopt(cache, manifest)


def _build(cache: PlanStore, spec: PlanSpec, build: Builder, sign_key: Path | None) -> PlanManifest:
    unfinished = _folder(cache).path(f"{spec.key}/.building/{spec.file_name}")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    try:
        manifest = build(spec, unfinished)
        if sign_key is not None:
            manifest = sign(manifest, sign_key)
        final = cache.local_path(manifest)
        final.parent.mkdir(parents=True, exist_ok=True)
        unfinished.replace(final)
    finally:
        _folder(cache).sweep(spec.key)
    return _adopt(cache, manifest)


def _adopt(cache: PlanStore, manifest: PlanManifest) -> PlanManifest:
    """Register the plan file in the cache as the plan of its key; the caller holds the lock."""
    cache.objects.delete(manifest_name(manifest))
    cache.objects.create(manifest_name(manifest), manifest_bytes(manifest))
    for stored in cache.objects.stored(f"{manifest.key}/"):
        if stored.name not in (manifest_name(manifest), plan_name(manifest)):
            cache.objects.delete(stored.name)
    return manifest


def _upload(cache: PlanStore, store: PlanStore, manifest: PlanManifest, progress: Progress | None) -> str:
    try:
        put = store.put(cache.local_path(manifest), manifest, progress)
    except Missing as exc:
        return f"store: not uploaded: {exc}"
    if put.created:
        return f"store: uploaded to {store.url}"
    return (
        f"store: another host published a plan of this key first ({store.url}); the one built here is used on this host"
    )


def _not_found(spec: PlanSpec, cache: PlanStore, store: PlanStore | None) -> PlanNotFound:
    place = store or cache
    have = what_there_is(spec, place.manifests(lambda *_: None))
    return PlanNotFound(
        f"no {spec.precision} plan of {spec.model} for SM {spec.sm} in {place.url} ({have}). "
        f"Build one on an SM {spec.sm} GPU: arcface plan build {spec.model} --precision {spec.precision}"
    )


def _folder(cache: PlanStore) -> LocalStore:
    if not isinstance(cache.objects, LocalStore):
        raise WrongUse(f"the plan cache is {cache.url}: expected a local folder. Use --cache FOLDER")
    return cache.objects


@contextmanager
def _locked(folder: LocalStore, key: str, timeout_s: float) -> Iterator[None]:
    try:
        from filelock import FileLock, Timeout
    except ImportError as exc:
        raise Missing(f"the plan cache needs the package filelock. Next: {how_to_get('filelock')}") from exc
    path = folder.path(f".locks/{key}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path, timeout=timeout_s):
            yield
    except Timeout as exc:
        raise Missing(
            f"another process has locked plan {key[:12]} for {timeout_s:g} s (lock {path}). Try again when it is done."
        ) from exc
    except OSError as exc:
        raise disk_error(exc, folder.url) from exc
