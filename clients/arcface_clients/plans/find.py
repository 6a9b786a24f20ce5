"""Finds the plan for this host: the one that `arcface assemble` installed, else the newest one in the cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from arcface_clients.errors import ArcFaceError, Missing, PlanRefused
from arcface_clients.plans.fit import misfit
from arcface_clients.plans.manifest import PlanManifest
from arcface_clients.plans.read import Plan, read_manifest, read_plan
from arcface_clients.plans.spec import sm_tag

_log = logging.getLogger(__name__)
_BEFORE_ALL = datetime.min.replace(tzinfo=timezone.utc)


def find_plan(
    sm: str,
    precision: str,
    *,
    model_repository: Path | None,
    cache: Path,
    model: str | None = None,
    tensorrt: str | None = None,
    public_key: Path | None = None,
    gpu: str | None = None,
) -> Plan:
    """The plan for this SM and precision, read and checked: the one in arcface_trt, else the newest in the cache.

    A refused plan is logged as an error, and the next one that fits is used.

    Args:
        sm: of the GPU, "8.6".
        precision: of the plan; no other is used.
        model_repository: where `arcface assemble` puts plans; None: only the cache is searched.
        cache: searched recursively.
        model: name of the model; None accepts any.
        tensorrt: version that will load the plan; None: unknown, not checked.
        public_key: PEM; if given, plans not signed by its private key are refused.
        gpu: name of the card; if two plans fit, the one tuned on such a card is used.

    Raises:
        PlanRefused: there are plans that fit, but every one was refused.
        Missing: none fits; the message lists those that exist.
    """
    there: set[str] = set()
    refused: list[ArcFaceError] = []
    fitting: list[tuple[Path, PlanManifest]] = []
    served = newest_version(model_repository / "arcface_trt") if model_repository else None
    for path in [*([served / f"{sm_tag(sm)}.plan"] if served else []), *_plans_below(cache.expanduser())]:
        if not path.is_file():
            continue
        try:
            manifest = read_manifest(path)
        except PlanRefused as exc:
            if path.parent == served or path.stem.endswith(f"-{precision}-{sm_tag(sm)}"):  # as its name says
                refused.append(exc)
            _log.error("refused: %s", exc)
            continue
        there.add(manifest.spec.file_name.removesuffix(".plan"))
        if misfit(manifest, sm, tensorrt, precision=precision, model=model) is None:
            fitting.append((path, manifest))

    def rank(candidate: tuple[Path, PlanManifest]) -> tuple[bool, bool, bool, datetime]:
        path, manifest = candidate
        own_card = gpu is None or not _tuned_elsewhere(manifest, gpu)
        return path.parent == served, manifest.spec.sm == sm, own_card, manifest.published or _BEFORE_ALL

    for path, manifest in sorted(fitting, key=rank, reverse=True):
        try:
            plan = read_plan(path, public_key)
            if gpu is not None and _tuned_elsewhere(manifest, gpu):
                _log.warning(
                    "%s was tuned on %s, this is %s: it may be slow here. Build one: arcface plan build",
                    path,
                    _card(manifest),
                    gpu,
                )
            return plan
        except PlanRefused as exc:
            refused.append(exc)
            _log.error("refused: %s", exc)
    if refused:
        raise PlanRefused(f"every {precision} plan for SM {sm} was refused. " + " ".join(map(str, refused)))
    places = [model_repository / "arcface_trt", cache] if model_repository else [cache]
    raise Missing(
        f"no {precision} plan for SM {sm} in {' or '.join(map(str, places))} "
        f"(found: {', '.join(sorted(there)) or 'none'}). "
        f"Build one here: arcface plan build --precision {precision}, or fetch one: arcface plan pull"
    )


def newest_version(model: Path) -> Path | None:
    """The version folder of a served model that a server loads: the highest with a manifest; None if there is none."""
    versions = (manifest.parent for manifest in model.glob("*/manifest.json"))
    return max((v for v in versions if v.name.isdecimal()), key=lambda v: int(v.name), default=None)


def _card(manifest: PlanManifest) -> str | None:
    """The card that a plan was tuned on; None if it is not tied to one card."""
    if manifest.spec.options.hardware_compatible or manifest.spec.options.same_compute_capability:
        return None
    return manifest.spec.gpu or manifest.gpu.get("name")  # older keys had no card; the builder recorded its own


def _tuned_elsewhere(manifest: PlanManifest, gpu: str) -> bool:
    return _card(manifest) not in (None, gpu)


def _plans_below(folder: Path) -> Iterator[Path]:
    """Plan files of a folder; names that begin with a dot are unfinished or refused."""
    for path in sorted(folder.rglob("*.plan")):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path
