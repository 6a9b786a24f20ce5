"""Plans in an object store: publishes, finds, verifies, lists and cleans up plans by key.

Layout: `<key>/manifest.json` and `<key>/<sha256 of the plan>/<model>-<precision>-sm<SM>.plan`. Two builds of one key
differ in their bytes, so a plan is stored under its own digest, and the manifest, created last and only if there is
none, decides which of two uploads is the plan of this key. A plan without a manifest does not exist; `gc` removes it.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from arcface_build.errors import PlanNotFound
from arcface_build.plans.seen import SeenPlans
from arcface_build.store.local import LocalStore, disk_error
from arcface_build.store.objects import ObjectStore, Progress, Stored
from arcface_clients.atomic import new_file
from arcface_clients.errors import ArcFaceError, PlanRefused, WrongUse
from arcface_clients.plans.manifest import (
    MAX_BYTES,
    LaterFormat,
    PlanManifest,
    is_digest,
    manifest_bytes,
    write_manifest,
)
from arcface_clients.plans.read import check_content, check_manifest
from arcface_clients.plans.signing import check_signature
from arcface_clients.plans.spec import PlanSpec

_MANIFEST = "manifest.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Put:
    """Result of `put`: `created` is False if this key already had a plan; `manifest` is the store's."""

    created: bool
    manifest: PlanManifest


class PlanStore:
    """Plans by key in one object store. With `public_key`, only manifests signed by its private key are accepted.

    With `seen` as well, a plan signed earlier than one that this host has seen under the same key is refused.
    """

    def __init__(self, objects: ObjectStore, public_key: Path | None = None, seen: SeenPlans | None = None) -> None:
        self.objects = objects
        self.public_key = public_key
        self.seen = seen if public_key is not None else None  # without a signature the time proves nothing

    @property
    def url(self) -> str:
        """The address of the object store."""
        return self.objects.url

    def find(self, key: str) -> PlanManifest | None:
        """The manifest of a key, with its signature checked, or None.

        Raises:
            PlanRefused: it is damaged, has another key, is not signed as configured, or is older than one seen before.
            StoreUnreachable: the store did not answer.
        """
        data = self.objects.read(f"{key}/{_MANIFEST}", MAX_BYTES + 1)
        if data is None:
            return None
        where = f"{self.url}/{key}/{_MANIFEST}"
        manifest = check_manifest(data, where, key, self.public_key)
        if self.seen is not None:
            self.seen.check(manifest, where)
        return manifest

    def manifests(self, on_refused: Callable[[str, ArcFaceError], None] | None = None) -> list[PlanManifest]:
        """All manifests, by model, precision, SM, version.

        A refused one does not stop the others: it goes to `on_refused(key, error)`, or logged as a warning if None.
        """
        tell = on_refused or (lambda key, exc: _log.warning("refused: %s", exc))
        names = (stored.name.split("/") for stored in self.objects.stored())
        keys = [parts[0] for parts in names if len(parts) == 2 and is_digest(parts[0]) and parts[1] == _MANIFEST]

        def find(key: str) -> PlanManifest | None:
            try:
                return self.find(key)
            except PlanRefused as exc:
                tell(key, exc)
                return None

        with ThreadPoolExecutor(8) as pool:
            found = [manifest for manifest in pool.map(find, keys) if manifest]
        return sorted(found, key=lambda m: (m.spec.model, m.spec.precision, float(m.spec.sm), m.spec.tensorrt, m.key))

    def resolve(self, name: str) -> PlanManifest:
        """The only plan whose key begins with `name` (at least 6 digits) or whose file name is `name`.

        Raises:
            PlanNotFound: none, or several.
            PlanRefused: there is one of this key, but it is refused.
        """
        refused: dict[str, ArcFaceError] = {}
        plans = self.manifests(refused.__setitem__)
        found = [m for m in plans if (len(name) >= 6 and m.key.startswith(name)) or m.spec.file_name == name]
        if len(found) == 1:
            return found[0]
        if found:
            keys = ", ".join(m.key[:12] for m in found)
            raise PlanNotFound(f"{len(found)} plans in {self.url} are called {name}: give a key ({keys}).")
        for key, error in refused.items():
            if len(name) >= 6 and key.startswith(name):
                raise error
        raise PlanNotFound(f"no plan {name} in {self.url}. List the plans: arcface plan list --store {self.url}")

    def fetch(self, manifest: PlanManifest, target: Path, progress: Progress | None = None) -> Path:
        """Fetch the plan into the file `target`, verified before it gets that name.

        Raises:
            PlanRefused: the data received is truncated or changed.
            PlanNotFound: the manifest exists, but not the plan.
            StoreUnreachable: the store did not answer, or the disk is full.
        """
        try:
            with new_file(target) as temporary:
                self._fetch(manifest, temporary, progress)
        except OSError as exc:
            raise disk_error(exc, str(target.parent)) from exc
        return target

    def pull(self, manifest: PlanManifest, folder: Path, progress: Progress | None = None) -> Path:
        """Fetch the plan into `folder`, with its manifest beside it; raises like `fetch`."""
        plan = self.fetch(manifest, folder / manifest.spec.file_name, progress)
        write_manifest(plan, manifest)
        return plan

    def verify(self, manifest: PlanManifest, progress: Progress | None = None) -> None:
        """Read the whole plan and compare it with its manifest, keeping nothing; raises like `fetch`."""
        with tempfile.TemporaryDirectory(prefix="arcface-verify-") as folder:
            self._fetch(manifest, Path(folder) / "plan", progress)

    def _fetch(self, manifest: PlanManifest, file: Path, progress: Progress | None) -> None:
        where = f"{self.url}/{plan_name(manifest)}"
        for last in (False, True):  # a second attempt mends corruption in transit
            if not self.objects.download(plan_name(manifest), file, progress):
                raise PlanNotFound(f"plan {where} is missing, but its manifest exists. Put it back: arcface plan push")
            try:
                return check_content(file, manifest, where)
            except PlanRefused:
                if last:
                    raise

    def put(
        self, plan: Path, manifest: PlanManifest, progress: Progress | None = None, *, replace: bool = False
    ) -> Put:
        """Publish a plan: the file first, then the manifest, if this key has none or with `replace`.

        Raises:
            PlanRefused: the file does not match the manifest, or is unsigned although a key is configured.
            StoreUnreachable: the store did not answer; nothing was published.
        """
        check_content(plan, manifest, str(plan))
        check_signature(manifest, self.public_key, str(plan))
        if replace:
            self.objects.upload(plan, plan_name(manifest), progress)
            self.objects.delete(manifest_name(manifest))
            return Put(self.objects.create(manifest_name(manifest), manifest_bytes(manifest)), manifest)
        there = self.find(manifest.key)
        if there is not None and there.sha256 != manifest.sha256:
            return Put(created=False, manifest=there)
        self.objects.upload(plan, plan_name(manifest), progress)
        if self.objects.create(manifest_name(manifest), manifest_bytes(manifest)):
            # S3 reports identical existing bytes as created: a retry cannot tell them from its own
            return Put(created=there is None, manifest=manifest)
        winner = self.find(manifest.key)
        if winner is None:  # deleted between the two calls: the upload is now an orphan, which gc removes
            raise PlanNotFound(f"plan {manifest.key} was deleted from {self.url} during the upload. Push it again.")
        if winner.sha256 != manifest.sha256:
            self.objects.delete(plan_name(manifest))
        return Put(created=False, manifest=winner)

    def delete(self, key: str) -> None:
        """Remove a plan: the manifest first, so that readers do not find a manifest without a plan for long."""
        self.objects.delete(f"{key}/{_MANIFEST}")
        for stored in self.objects.stored(f"{key}/"):
            self.objects.delete(stored.name)

    def orphans(self, min_age_s: float = 3600.0) -> list[Stored]:
        """Objects under a key that no valid manifest refers to: lost races, interrupted uploads, damaged manifests.

        Younger ones are excluded: their upload may be in progress. So are objects that are not under a key.
        """
        stored = [stored for stored in self.objects.stored() if _key_of(stored)]
        later: set[str] = set()  # keys of a later format: not our plans

        def on_refused(key: str, exc: ArcFaceError) -> None:
            if isinstance(exc, LaterFormat):
                later.add(key)

        manifests = PlanStore(self.objects).manifests(on_refused)  # unsigned plans count too
        known = {manifest_name(m) for m in manifests} | {plan_name(m) for m in manifests}
        old = [s for s in stored if s.modified_s < time.time() - min_age_s]
        return [s for s in old if s.name not in known and _key_of(s) not in later]

    def local_path(self, manifest: PlanManifest) -> Path:
        """The plan's file, for a store that is a folder.

        Raises:
            WrongUse: the store is not a folder.
        """
        if not isinstance(self.objects, LocalStore):
            raise WrongUse(f"{self.url} is not a folder. Pull the plan first: arcface plan pull {manifest.key[:12]}")
        return self.objects.path(plan_name(manifest))


def _key_of(stored: Stored) -> str | None:
    """The key that an object belongs to; None if it belongs to no plan."""
    first = stored.name.partition("/")[0]
    return first if is_digest(first) else None


def plan_name(manifest: PlanManifest) -> str:
    """The name of the plan's object."""
    return f"{manifest.key}/{manifest.sha256}/{manifest.spec.file_name}"


def manifest_name(manifest: PlanManifest) -> str:
    """The name of the manifest's object."""
    return f"{manifest.key}/{_MANIFEST}"


def what_there_is(spec: PlanSpec, manifests: Iterable[PlanManifest]) -> str:
    """What the store has instead of the requested plan: the SMs, else the versions, else the precisions."""
    same = [m.spec for m in manifests if m.spec.model == spec.model and m.spec.precision == spec.precision]
    if not same:
        others = sorted({f"{m.spec.model} {m.spec.precision}" for m in manifests if m.spec.model == spec.model})
        return f"found: {', '.join(others)}" if others else "found: no plan of this model"
    sms = sorted({s.sm for s in same}, key=float)
    if spec.sm not in sms:
        return f"found: {', '.join(sms)}"
    versions = sorted({s.tensorrt for s in same if s.sm == spec.sm})
    if spec.tensorrt not in versions:
        return f"found: TensorRT {', '.join(versions)}, expected {spec.tensorrt}"
    cards = sorted({s.gpu for s in same if s.gpu and (s.sm, s.tensorrt) == (spec.sm, spec.tensorrt)} - {spec.gpu})
    tuned = f", tuned on {', '.join(cards)}" if cards else ""
    return f"found: the same SM and TensorRT version with another ONNX, profile or builder options{tuned}"
