"""The manifest beside a plan: what it was built from, on what, and the proof of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from arcface_clients.atomic import new_file
from arcface_clients.errors import PlanRefused
from arcface_clients.plans.spec import PlanSpec

FORMAT = 1
MAX_BYTES = 1 << 20  # a manifest has about 3 KB; no more than this is read from any store
MAX_DEPTH = 32  # ours nest 5 deep; json.loads recurses, and overflows the stack at a few thousand
REBUILD = "Delete it and get it again: arcface plan pull, or arcface plan build"

_DIGEST = re.compile(r"[0-9a-f]{64}")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)


class LaterFormat(PlanRefused):
    """A manifest in a format newer than this version: neither ours to read nor ours to remove."""


@dataclass(frozen=True)
class PlanManifest:
    """Everything known about one plan. `drift` is a DriftReport as JSON, or None if it was not measured.

    size_bytes: of the plan; in the JSON it is called `bytes`.
    gpu: name, driver, cuda, memory_bytes. build: seconds, peak_vram_bytes, created and signed (UTC, ISO 8601), tools;
        memory: what the plan takes on a GPU (arcface_build.plans.memory); form (arcface_build.graph.tensorrt_form).
    precision_proof: layer counts by precision, from the engine inspector (arcface_build.plans.inspect).
    signature: None, or {algorithm, public_key, value} over all other fields (arcface_clients.plans.signing).
    """

    spec: PlanSpec
    sha256: str
    size_bytes: int
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

    @property
    def published(self) -> datetime | None:
        """When it was signed, else when it was built; None if the manifest has no readable time."""
        try:
            time = datetime.fromisoformat(self.build.get("signed") or self.build["created"])
        except (KeyError, TypeError, ValueError):
            return None
        return time if time.tzinfo else time.replace(tzinfo=timezone.utc)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `key` and `file` are written for readers and checked on loading."""
        fields = asdict(self)
        fields["spec"] = self.spec.to_json()
        data = {"bytes" if name == "size_bytes" else name: value for name, value in fields.items()}
        return {"format": FORMAT, "key": self.key, "file": self.spec.file_name, **data}

    def unsigned_bytes(self) -> bytes:
        """The bytes that a signature covers: the canonical JSON of every field but the signature."""
        data = replace(self, signature=None).to_json()
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def manifest_bytes(manifest: PlanManifest) -> bytes:
    """The manifest as it is stored: indented JSON with a final newline."""
    return (json.dumps(manifest.to_json(), indent=2) + "\n").encode()


def parse_manifest(text: bytes, where: str) -> PlanManifest:
    """A manifest from untrusted JSON; `where` names it in messages.

    Raises:
        PlanRefused: not a manifest of this format, or its key or file name does not match its contents.
    """
    if len(text) > MAX_BYTES:
        raise PlanRefused(f"{where} is larger than {MAX_BYTES} bytes: no plan manifest is. {REBUILD}")
    if _depth(text) > MAX_DEPTH:
        raise PlanRefused(f"{where} is nested deeper than {MAX_DEPTH} levels: no plan manifest is. {REBUILD}")
    try:
        data = dict(json.loads(text))
        written = {name: data.pop(name) for name in ("format", "key", "file")}
        if written["format"] != FORMAT:
            raise LaterFormat(f"{where} has format {written['format']!r}: expected {FORMAT}. Update arcface-triton.")
        manifest = _manifest(data)
    except PlanRefused:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise PlanRefused(f"{where} is not a plan manifest ({type(exc).__name__}: {exc}). {REBUILD}") from exc
    if written["key"] != manifest.key or written["file"] != manifest.spec.file_name:
        raise PlanRefused(
            f"{where} states key {written['key']!r}, but its contents give {manifest.key}: it was edited. {REBUILD}"
        )
    return manifest


def write_manifest(plan: Path, manifest: PlanManifest) -> None:
    """Write the manifest where it belongs for this plan file, atomically."""
    with new_file(manifest_path(plan)) as temporary:
        temporary.write_bytes(manifest_bytes(manifest))


def manifest_path(plan: Path) -> Path:
    """Path of a plan file's manifest: x.plan → x.plan.json; in a cache or folder store <key>/manifest.json."""
    if is_digest(plan.parent.name) and is_digest(plan.parent.parent.name):
        return plan.parent.parent / "manifest.json"
    return plan.with_name(plan.name + ".json")


def is_digest(text: object) -> bool:
    """Whether this is a sha256 in our notation: 64 lower-case hexadecimal digits."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def file_sha256(path: Path) -> str:
    """Sha256 (hex) of a file, read in blocks of 1 MB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def now_utc() -> str:
    """The time in the format of manifests: 2026-01-31T12:00:00+00:00."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _manifest(data: dict[str, Any]) -> PlanManifest:
    """The dataclass, with the type of every field checked.

    Raises:
        ValueError, TypeError, KeyError: a field is missing, unknown, or of the wrong type.
    """
    data["size_bytes"] = data.pop("bytes")
    manifest = PlanManifest(**{**data, "spec": PlanSpec.from_json(data["spec"])})
    signature = manifest.signature
    wrong = {
        "sha256": not is_digest(manifest.sha256),
        "bytes": type(manifest.size_bytes) is not int or manifest.size_bytes < 0,
        "drift": not isinstance(manifest.drift, dict | None),
        "contract_id": not isinstance(manifest.contract_id, str | None),
        "dim": type(manifest.dim) not in (int, type(None)),
        "signature": signature is not None
        and not (isinstance(signature, dict) and all(isinstance(value, str) for value in signature.values())),
        **{name: not isinstance(getattr(manifest, name), dict) for name in ("gpu", "build", "precision_proof")},
    }
    if any(wrong.values()):
        names = ", ".join(name for name, is_wrong in wrong.items() if is_wrong)
        raise ValueError(f"invalid {names}")
    return manifest


def _depth(text: bytes) -> int:
    """The deepest nesting of brackets outside strings, found without running a parser."""
    depth = deepest = 0
    for byte in _STRING.sub(b"", text):
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest
