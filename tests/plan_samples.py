"""Plans for tests of everything but TensorRT: bytes that stand for a plan, put where the project itself puts plans."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.plans.get_or_build import get_or_build
from arcface_build.plans.store import PlanStore
from arcface_build.store import open_store
from arcface_clients.plans.manifest import PlanManifest, now_utc
from arcface_clients.plans.read import Plan
from arcface_clients.plans.spec import PlanSpec

SPEC = PlanSpec(model="tiny", onnx_sha256="ab" * 32, precision="fp16", sm="8.6", tensorrt="10.3.0")


def spec(**changes: object) -> PlanSpec:
    return replace(SPEC, **changes)


def write_plan(path: Path, of: PlanSpec = SPEC, size: int = 300_000, seed: int = 0, **facts: Any) -> PlanManifest:
    """Random bytes at `path` and what a builder says of them; another seed is another build of the same key."""
    content = np.random.default_rng(seed).bytes(size)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    manifest = PlanManifest(
        spec=of,
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=size,
        gpu={"name": "NVIDIA A10", "driver": "550.54.15", "cuda": "12.4", "memory_bytes": 24 << 30},
        build={"seconds": 1.0, "peak_vram_bytes": None, "created": now_utc(), "tools": {}},
    )
    return replace(manifest, **facts)


def in_cache(folder: Path, of: PlanSpec = SPEC, sign_key: Path | None = None, seed: int = 0, **facts: Any) -> Plan:
    """A plan that was built into the cache `folder`, as `arcface plan build` does it."""
    cache = PlanStore(open_store(str(folder)))
    obtained = get_or_build(of, cache, None, lambda s, p: write_plan(p, s, seed=seed, **facts), sign_key=sign_key)
    return Plan(obtained.path, obtained.manifest)


def make_keys(folder: Path) -> Path:
    """A folder with private.pem and public.pem."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    public = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    (folder / "private.pem").write_bytes(private)
    (folder / "public.pem").write_bytes(public)
    return folder
