"""Where this user's plans are: the cache and the store, from the configuration and options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arcface_build.errors import PlanNotFound
from arcface_build.plans.seen import SeenPlans
from arcface_build.plans.store import PlanStore
from arcface_build.store import open_store
from arcface_clients.config.schema import EmbeddingConfig
from arcface_clients.errors import WrongUse
from arcface_clients.extras import require
from arcface_clients.plans.manifest import PlanManifest
from arcface_clients.plans.read import read_plan


@dataclass(frozen=True)
class Places:
    """The cache in its folder, the store (None: there is none), and the configuration they came from."""

    cache: PlanStore
    store: PlanStore | None
    config: EmbeddingConfig
    folder: Path

    @property
    def timing_caches(self) -> Path:
        """TensorRT's timing caches; a dot folder, so not an object of the cache."""
        return self.folder / ".timing"

    @property
    def refused(self) -> Path:
        """Plans that failed their proof, beside their reports."""
        return self.folder / ".refused"

    def need_store(self) -> PlanStore:
        """The store.

        Raises:
            WrongUse: none is configured.
        """
        if self.store is None:
            raise WrongUse(
                "no plan store is configured: add --store s3://bucket/prefix (or a folder), or set storage.type and "
                "storage.bucket in config/embedding.yaml"
            )
        return self.store

    def all(self) -> Iterator[tuple[str, PlanStore]]:
        """("cache", …) and, if there is one, ("store", …)."""
        yield "cache", self.cache
        if self.store is not None:
            yield "store", self.store


def open_places(
    config: EmbeddingConfig, store: str | None = None, cache: Path | None = None, public_key: Path | None = None
) -> Places:
    """The configured places; given options override the configuration. Nothing is contacted yet."""
    storage = config.storage
    key = public_key or storage.public_key
    url = store or (f"s3://{storage.bucket}/{storage.prefix}" if storage.type == "s3" else None)
    folder = cache.expanduser() if cache else storage.plan_folder
    remote = None
    if url is not None:
        if url.startswith("s3://"):
            require("boto3", purpose=f"the plan store {url}")
        remote = open_store(
            url,
            endpoint_url=storage.endpoint,
            region=storage.region,
            path_style=storage.path_style,
            max_attempts=storage.retries + 1,
            read_timeout_s=storage.timeout_s,
        )
    cached = PlanStore(open_store(str(folder)), key)
    stored = PlanStore(remote, key, SeenPlans(folder / ".seen")) if remote else None
    return Places(cached, stored, config, folder)


def plan_by_name(places: Places, name: str) -> tuple[PlanManifest, Path | None, str]:
    """Find a plan by file (the plan or its .json), key or name: its manifest, its file if local, and where it is.

    Raises:
        PlanNotFound: it is nowhere.
        PlanRefused: a file that does not match its manifest.
    """
    path = Path(name)
    if path.is_file():
        plan = path.with_suffix("") if path.suffix == ".json" else path
        return read_plan(plan, places.cache.public_key).manifest, plan, str(plan)
    for where, plans in places.all():
        try:
            manifest = plans.resolve(name)
        except PlanNotFound as exc:
            missing = exc
            continue
        return manifest, plans.local_path(manifest) if where == "cache" else None, plans.url
    raise missing
