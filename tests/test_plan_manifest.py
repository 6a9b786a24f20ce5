"""Manifests and signatures: what is written is read again, and everything that was changed is refused by name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from arcface_clients.errors import Missing, PlanRefused, WrongUse
from arcface_clients.plans.manifest import PlanManifest, manifest_bytes, manifest_path, parse_manifest, write_manifest
from arcface_clients.plans.read import Plan, check_content, read_manifest, read_plan
from arcface_clients.plans.signing import check_signature, sign
from plan_samples import SPEC, spec, write_plan


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return tmp_path / SPEC.file_name


@pytest.fixture
def manifest(plan: Path) -> PlanManifest:
    return write_plan(plan)


def test_a_manifest_is_read_as_it_was_written(plan: Path, manifest: PlanManifest) -> None:
    write_manifest(plan, manifest)
    assert read_plan(plan) == Plan(plan, manifest)
    written = json.loads(manifest_path(plan).read_text())
    assert (written["file"], written["bytes"]) == ("tiny-fp16-sm86.plan", 300_000)
    with pytest.raises(Missing, match="no plan at"):
        read_plan(plan.with_name("other.plan"))
    with pytest.raises(PlanRefused, match=r"other\.plan has no manifest"):
        read_manifest(plan.with_name("other.plan"))


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("text", "why"),
    [(text, "here is not a plan manifest")
     for text in (b"", b"\x00\xff", b"[]", b"{}", b'{"format": 1}', b"null", b'"plan"', b'{"key": "\xff"}')]
    + [(text, "nested deeper than 32 levels") for text in (DEEP, b'{"gpu": ' + DEEP, b'"' + DEEP + b'"[' + DEEP)]
    + [(b" " * (1 << 21), "larger than 1048576 bytes")],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(text: bytes, why: str) -> None:
    with pytest.raises(PlanRefused, match=why):
        parse_manifest(text, "here")


def test_brackets_within_words_are_words(manifest: PlanManifest) -> None:
    named = replace(manifest, gpu={"name": "[" * 100 + '\\" {' * 100})
    assert parse_manifest(manifest_bytes(named), "here") == named


@pytest.mark.parametrize(
    ("field", "value"),
    [("signature", []), ("signature", {"value": 1}), ("signature", "signed"), ("sha256", "../../x"), ("sha256", None),
     ("bytes", -1), ("bytes", True), ("bytes", "300000"), ("gpu", []), ("build", None), ("precision_proof", 1),
     ("drift", "none"), ("contract_id", 1), ("dim", "512"), ("dim", 1.5), ("colour", "red"), ("spec", None),
     ("spec", [])],
)  # fmt: skip
def test_a_field_of_another_type_is_refused(manifest: PlanManifest, field: str, value: object) -> None:
    with pytest.raises(PlanRefused, match="here is not a plan manifest"):
        parse_manifest(edited(manifest, **{field: value}), "here")


@pytest.mark.parametrize(
    "change",
    [{"model": 1}, {"sm": []}, {"tensorrt": 10.3}, {"min_batch": "1"}, {"max_batch": 1.5}, {"options": []},
     {"options": {"tf32": "no"}}, {"options": {"workspace_bytes": "1GB"}}, {"model": "x" * 300}],
)  # fmt: skip
def test_a_spec_of_other_types_is_refused(manifest: PlanManifest, change: dict) -> None:
    with pytest.raises(PlanRefused, match="here is not a plan manifest"):
        parse_manifest(edited(manifest, spec={**manifest.spec.to_json(), **change}), "here")


def edited(manifest: PlanManifest, **changes: object) -> bytes:
    return json.dumps({**manifest.to_json(), **changes}).encode()


@pytest.mark.parametrize(
    "change", [{"key": "0" * 64}, {"spec": spec(sm="8.9").to_json()}, {"file": "tiny-fp16-sm89.plan"}]
)
def test_a_manifest_whose_parts_do_not_give_its_key_is_refused(manifest: PlanManifest, change: dict) -> None:
    with pytest.raises(PlanRefused, match="it was edited"):
        parse_manifest(edited(manifest, **change), "here")


def test_a_manifest_of_a_later_format_asks_for_an_update(manifest: PlanManifest) -> None:
    with pytest.raises(PlanRefused, match=r"has format 2: expected 1\. Update arcface-triton"):
        parse_manifest(edited(manifest, format=2), "here")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(lambda b: b[:-1], "is truncated: expected 300000 bytes, got 299999"), (lambda b: b"", "is truncated"),
     (lambda b: b + b"x", "is too long"), (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "is corrupted: expected sha256")],
)  # fmt: skip
def test_a_damaged_plan_is_refused(plan: Path, manifest: PlanManifest, damage, message: str) -> None:
    check_content(plan, manifest, "here")
    plan.write_bytes(damage(plan.read_bytes()))
    with pytest.raises(PlanRefused, match=message):
        check_content(plan, manifest, "here")


def test_a_signed_manifest_is_accepted_also_after_a_round_trip(manifest: PlanManifest, keys: dict[str, Path]) -> None:
    signed = sign(manifest, keys["ours"] / "private.pem")
    check_signature(signed, keys["ours"] / "public.pem", "here")
    check_signature(parse_manifest(manifest_bytes(signed), "here"), keys["ours"] / "public.pem", "here")
    check_signature(manifest, None, "here")  # no key configured: unsigned will do


def test_what_a_signature_covers_is_what_it_was_so_that_older_signatures_stay_good() -> None:
    of_old = PlanManifest(
        SPEC, "0" * 64, 7, build={"created": "2026-01-01T00:00:00+00:00"}, contract_id="c" * 64, dim=512
    )
    covered = hashlib.sha256(of_old.unsigned_bytes()).hexdigest()
    assert covered == "bf0da66ea859191c03b826f11382091cbfd7e042f182930a4f25c3e9a58e4374"


def test_unsigned_foreign_and_changed_manifests_are_refused_where_a_key_is_configured(
    manifest: PlanManifest, keys: dict[str, Path]
) -> None:
    public = keys["ours"] / "public.pem"
    signed = sign(manifest, keys["ours"] / "private.pem")
    with pytest.raises(PlanRefused, match=r"is unsigned, but .*public\.pem is configured"):
        check_signature(manifest, public, "here")
    with pytest.raises(PlanRefused, match="is signed by key"):
        check_signature(sign(manifest, keys["theirs"] / "private.pem"), public, "here")
    for changed in (
        replace(signed, sha256="0" * 64),
        replace(signed, build={**signed.build, "signed": "2100-01-01T00:00:00+00:00"}),
        replace(signed, drift={"max_drift": 0.0}),
        replace(signed, signature={**signed.signature, "value": "00" * 64}),
        replace(signed, signature={**signed.signature, "value": "not hex"}),
        replace(signed, signature={"public_key": signed.signature["public_key"]}),
    ):
        with pytest.raises(PlanRefused, match="was changed after it was signed"):
            check_signature(changed, public, "here")


def test_key_files_that_are_none_are_named(manifest: PlanManifest, keys: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Missing, match="openssl genpkey -algorithm ed25519"):
        sign(manifest, tmp_path / "absent.pem")
    (tmp_path / "text.pem").write_text("hello")
    with pytest.raises(WrongUse, match="is not a PEM private key"):
        sign(manifest, tmp_path / "text.pem")
    with pytest.raises(WrongUse, match="is not a PEM public key"):
        check_signature(manifest, tmp_path / "text.pem", "here")
    with pytest.raises(WrongUse, match="is not a PEM private key"):
        sign(manifest, keys["ours"] / "public.pem")
