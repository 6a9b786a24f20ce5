"""Ed25519 signatures on plan manifests: who vouches for a plan, and since when.

The manifest holds the plan's sha256, so signing the manifest covers the plan. The signature also covers the time of
signing, which exposes a store that serves an older plan than before (arcface_build.plans.seen).
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from arcface_clients.errors import Missing, PlanRefused, WrongUse
from arcface_clients.extras import how_to_get
from arcface_clients.plans.manifest import PlanManifest, now_utc

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


def sign(manifest: PlanManifest, private_key: Path) -> PlanManifest:
    """The manifest, signed now by this PEM private key (create one with `openssl genpkey -algorithm ed25519`).

    Raises:
        Missing: no such file, or `cryptography` is not installed.
        WrongUse: the file is not an ed25519 private key.
    """
    key = _load_private(private_key)
    public = key.public_key().public_bytes_raw().hex()
    manifest = replace(manifest, build={**manifest.build, "signed": now_utc()})
    value = key.sign(manifest.unsigned_bytes()).hex()
    return replace(manifest, signature={"algorithm": "ed25519", "public_key": public, "value": value})


def check_signature(manifest: PlanManifest, public_key: Path | None, where: str) -> None:
    """Check that the matching private key signed the manifest; does nothing if no public key is configured.

    Raises:
        PlanRefused: unsigned, signed by another key, or changed after it was signed.
        Missing, WrongUse: the public key file does not exist, or is not an ed25519 public key.
    """
    if public_key is None:
        return
    key = _load_public(public_key)
    if manifest.signature is None:
        raise PlanRefused(
            f"plan {where} is unsigned, but {public_key} is configured: expected its signature. "
            "Sign it on the host with the private key: arcface plan push --sign-key PRIVATE.pem"
        )
    expected = key.public_bytes_raw().hex()
    if manifest.signature.get("public_key") != expected:
        raise PlanRefused(
            f"plan {where} is signed by key {manifest.signature.get('public_key')}: expected {expected} ({public_key})."
        )
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(bytes.fromhex(manifest.signature.get("value", "")), manifest.unsigned_bytes())
    except (InvalidSignature, ValueError) as exc:
        raise PlanRefused(
            f"plan {where}: the manifest was changed after it was signed. Get it again from its builder."
        ) from exc


def _load_private(path: Path) -> Ed25519PrivateKey:
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError) as exc:
        raise WrongUse(f"{path} is not a PEM private key without a password ({exc}). {_HOW_TO_MAKE}") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise WrongUse(f"{path} holds a {type(key).__name__}: expected an ed25519 private key. {_HOW_TO_MAKE}")
    return key


def _load_public(path: Path) -> Ed25519PublicKey:
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read(path))
    except ValueError as exc:
        raise WrongUse(f"{path} is not a PEM public key ({exc}). {_HOW_TO_MAKE}") from exc
    if not isinstance(key, Ed25519PublicKey):
        raise WrongUse(f"{path} holds a {type(key).__name__}: expected an ed25519 public key. {_HOW_TO_MAKE}")
    return key


_HOW_TO_MAKE = (
    "Make a pair: openssl genpkey -algorithm ed25519 -out private.pem; "
    "openssl pkey -in private.pem -pubout -out public.pem"
)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise Missing(f"no key file at {path} ({exc.strerror}). {_HOW_TO_MAKE}") from exc


def _require_cryptography() -> None:
    if find_spec("cryptography") is None:
        raise Missing(f"signatures need the package cryptography. Next: {how_to_get('cryptography')}")
