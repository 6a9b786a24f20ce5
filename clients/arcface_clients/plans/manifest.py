"""The JSON beside a plan: what it was built from, where, what proves it; and the checks made before its use."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from arcface_clients.errors import Missing, PlanRefused
from arcface_clients.plans.spec import PlanSpec

FORMAT = 1
_REBUILD = "Delete it and get it again: arcface plan pull, or arcface plan build"


@dataclass(frozen=True)
class PlanManifest:
    """Everything known about one plan. Sizes in bytes; `drift` is a DriftReport as JSON, or None where not measured.

    gpu: name, driver, cuda, memory_bytes. build: seconds, peak_vram_bytes, created (UTC, ISO 8601), tools.
    precision_proof: layer counts by precision, from the engine inspector (arcface_build.plans.inspect).
    signature: None, or {algorithm, public_key, value} over all other fields (arcface_clients.plans.signing).
    """

    spec: PlanSpec
    sha256: str
    bytes: int
    gpu: Mapping[str, Any] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)
    precision_proof: Mapping[str, Any] = field(default_factory=dict)
    drift: Mapping[str, Any] | None = None
    contract_id: str | None = None
    dim: int | None = None
    signature: Mapping[str, str] | None = None

    @property
    def key(self) -> str:
        """The key of the spec."""
        return self.spec.key

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `key` and `file` are written for readers and checked on loading."""
        data = asdict(self)
        data["spec"] = self.spec.to_json()
        return {"format": FORMAT, "key": self.key, "file": self.spec.file_name, **data}

    def unsigned_bytes(self) -> bytes:
        """What a signature covers: the canonical JSON of every field but the signature."""
        data = replace(self, signature=None).to_json()
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def manifest_bytes(manifest: PlanManifest) -> bytes:
    """The manifest as it is stored: indented JSON with a final newline."""
    return (json.dumps(manifest.to_json(), indent=2) + "\n").encode()


def parse_manifest(text: str | bytes, where: str) -> PlanManifest:
    """A manifest from JSON; `where` names it in messages.

    Raises:
        PlanRefused: not a manifest of this format, or its key or file name does not follow from its parts.
    """
    try:
        data = dict(json.loads(text))
        written = {name: data.pop(name) for name in ("format", "key", "file")}
        if written["format"] != FORMAT:
            raise PlanRefused(f"{where} has format {written['format']}: expected {FORMAT}. Update arcface-triton.")
        manifest = PlanManifest(**{**data, "spec": PlanSpec.from_json(data["spec"])})
    except PlanRefused:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise PlanRefused(f"{where} is not a plan manifest ({type(exc).__name__}: {exc}). {_REBUILD}") from exc
    if written["key"] != manifest.key or written["file"] != manifest.spec.file_name:
        raise PlanRefused(
            f"{where} says key {written['key']}, but its parts give {manifest.key}: it was edited. {_REBUILD}"
        )
    return manifest


def load_manifest(path: Path) -> PlanManifest:
    """The manifest in this file.

    Raises:
        Missing: there is no such file.
        PlanRefused: it is not a manifest.
    """
    try:
        text = path.read_bytes()
    except OSError as exc:
        raise Missing(f"no plan manifest at {path} ({exc.strerror}). Get one: arcface plan pull") from exc
    return parse_manifest(text, str(path))


def manifest_path(plan: Path) -> Path:
    """Where the manifest of a plan file lies: x.plan → x.plan.json; in a cache or folder store <key>/manifest.json."""
    if all(re.fullmatch(r"[0-9a-f]{64}", folder.name) for folder in (plan.parent, plan.parent.parent)):
        return plan.parent.parent / "manifest.json"
    return plan.with_name(plan.name + ".json")


def file_sha256(path: Path) -> str:
    """Sha256 (hex) of a file, read in blocks of 1 MB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_content(path: Path, manifest: PlanManifest, where: str) -> None:
    """Compare size, then digest, of the file at `path` with the manifest; `where` names the origin in messages.

    Raises:
        PlanRefused: truncated, too long or changed.
        Missing: no such file.
    """
    try:
        size = path.stat().st_size
    except OSError as exc:
        raise Missing(f"plan {where} is not there ({exc.strerror}), but its manifest is. {_REBUILD}") from exc
    if size != manifest.bytes:
        kind = "truncated" if size < manifest.bytes else "too long"
        raise PlanRefused(f"plan {where} is {kind}: expected {manifest.bytes} bytes, got {size}. {_REBUILD}")
    digest = file_sha256(path)
    if digest != manifest.sha256:
        raise PlanRefused(f"plan {where} is corrupted: expected sha256 {manifest.sha256}, got {digest}. {_REBUILD}")


def now_utc() -> str:
    """The time as manifests hold it: 2026-01-31T12:00:00+00:00."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
