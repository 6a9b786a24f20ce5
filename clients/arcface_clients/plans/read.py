"""The only reader of plans: refuses any that is damaged, edited, without a manifest or not signed as configured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from arcface_clients.errors import Missing, PlanRefused
from arcface_clients.plans.manifest import (
    MAX_BYTES,
    REBUILD,
    PlanManifest,
    file_sha256,
    is_digest,
    manifest_path,
    parse_manifest,
)
from arcface_clients.plans.signing import check_signature


@dataclass(frozen=True)
class Plan:
    """A plan file and its manifest, which `read_plan` found to match."""

    path: Path
    manifest: PlanManifest

    def content(self) -> bytes:
        """The plan's bytes, read and checked again; load these, because the file may change later.

        Raises:
            PlanRefused: the file has changed.
            Missing: it is gone.
        """
        try:
            content = self.path.read_bytes()
        except OSError as exc:
            raise Missing(f"plan {self.path} is gone ({exc.strerror}). {REBUILD}") from exc
        _compare(len(content), hashlib.sha256(content).hexdigest, self.manifest, str(self.path))
        return content


def read_plan(path: Path, public_key: Path | None = None) -> Plan:
    """A plan file, read whole, with its manifest (`manifest_path`).

    Raises:
        Missing: no plan, or no public key, at that path.
        PlanRefused: it has no manifest or does not match it, or is not signed by the key of `public_key`.
        WrongUse: `public_key` is not an ed25519 public key.
    """
    if not path.is_file():
        raise Missing(f"no plan at {path}. Build one: arcface plan build, or fetch one: arcface plan pull")
    manifest = read_manifest(path, public_key)
    check_content(path, manifest, str(path))
    return Plan(path, manifest)


def read_manifest(plan: Path, public_key: Path | None = None) -> PlanManifest:
    """The manifest of a plan file, with its signature checked; the plan itself is not read.

    Raises:
        PlanRefused: there is none, or it is damaged, has another key, or is not signed by the private key.
    """
    file = manifest_path(plan)
    if not file.is_file():
        raise PlanRefused(f"plan {plan} has no manifest (expected {file}), so nothing says what it is. {REBUILD}")
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_BYTES + 1)
    except OSError as exc:
        raise PlanRefused(f"plan {plan}: its manifest {file} cannot be read ({exc.strerror}). {REBUILD}") from exc
    key = file.parent.name if file.name == "manifest.json" and is_digest(file.parent.name) else None
    return check_manifest(text, str(file), key, public_key)


def check_manifest(text: bytes, where: str, key: str | None = None, public_key: Path | None = None) -> PlanManifest:
    """A manifest from the contents of a file or of a store entry under `key` (None: no key).

    Raises:
        PlanRefused: damaged, has another key, or not signed as configured.
    """
    manifest = parse_manifest(text, where)
    if key is not None and manifest.key != key:
        raise PlanRefused(f"{where} is the manifest of another key, {manifest.key}. Delete it: arcface plan gc")
    check_signature(manifest, public_key, where)
    return manifest


def check_content(path: Path, manifest: PlanManifest, where: str) -> None:
    """Compare size, then digest, of the file at `path` with the manifest; `where` names the plan in messages.

    Raises:
        PlanRefused: truncated, too long or changed.
        Missing: no such file.
    """
    try:
        size = path.stat().st_size
    except OSError as exc:
        raise Missing(f"plan {where} is missing ({exc.strerror}), but its manifest exists. {REBUILD}") from exc
    _compare(size, lambda: file_sha256(path), manifest, where)


def _compare(size: int, sha256: Callable[[], str], manifest: PlanManifest, where: str) -> None:
    if size != manifest.size_bytes:
        kind = "truncated" if size < manifest.size_bytes else "too long"
        raise PlanRefused(f"plan {where} is {kind}: expected {manifest.size_bytes} bytes, got {size}. {REBUILD}")
    digest = sha256()
    if digest != manifest.sha256:
        raise PlanRefused(f"plan {where} is corrupted: expected sha256 {manifest.sha256}, got {digest}. {REBUILD}")
