"""The object stores: one set of tests for the folder and for S3, then S3 with a server and a network that fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from arcface_build.errors import PlanNotFound, StoreUnreachable
from arcface_build.plans.seen import SeenPlans
from arcface_build.plans.store import PlanStore, manifest_name, plan_name
from arcface_build.store import open_store
from arcface_build.store.objects import ObjectStore
from arcface_build.store.s3 import S3Store
from arcface_clients.errors import PlanRefused, WrongUse
from arcface_clients.plans.manifest import PlanManifest, manifest_bytes, manifest_path
from arcface_clients.plans.signing import sign
from deadlines import HANG_S
from fault_proxy import FaultProxy, Faults
from plan_samples import SPEC, spec, write_plan

TESTS = Path(__file__).resolve().parent


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket `plans` on the real S3 server, with credentials in the environment."""
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    resource = boto3.resource("s3", endpoint_url=s3_server, region_name="us-east-1")
    bucket = resource.create_bucket(Bucket="plans")
    yield "s3://plans/pre/fix"
    bucket.objects.delete()
    bucket.delete()


@pytest.fixture
def network(s3_server: str) -> Iterator[FaultProxy]:
    host, port = s3_server.removeprefix("http://").split(":")
    proxy = FaultProxy((host, int(port)))
    yield proxy
    proxy.close()


@pytest.fixture
def remote(bucket: str, network: FaultProxy) -> PlanStore:
    """A plan store on S3 behind a network that a test may break."""
    return PlanStore(open_store(bucket, endpoint_url=network.url, max_attempts=3, read_timeout_s=0.7))


@pytest.fixture(params=["folder", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    url = request.getfixturevalue("bucket")
    return open_store(url, endpoint_url=request.getfixturevalue("s3_server"))


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return tmp_path / "made" / SPEC.file_name


@pytest.fixture
def manifest(plan: Path) -> PlanManifest:
    return write_plan(plan)


def names(store: ObjectStore) -> list[str]:
    return [stored.name for stored in store.stored()]


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# --- the protocol, on a folder and on S3 ---


def test_objects_come_back_as_they_were_put(objects: ObjectStore, tmp_path: Path) -> None:
    source, target, moved = tmp_path / "source", tmp_path / "target", []
    source.write_bytes(os.urandom(100_000))
    assert names(objects) == []
    objects.upload(source, "a/b", moved.append)
    assert sum(moved) == 100_000
    assert objects.download("a/b", target, moved.append)
    assert target.read_bytes() == source.read_bytes()
    assert sum(moved) == 200_000
    assert objects.create("a/c", b"small")
    assert objects.read("a/c", 1000) == b"small"
    assert [(s.name, s.size_bytes) for s in objects.stored("a/")] == [("a/b", 100_000), ("a/c", 5)]
    assert all(abs(s.modified_s - time.time()) < 60 for s in objects.stored())
    objects.delete("a/b")
    objects.delete("a/b")  # none of this name is no error
    assert names(objects) == ["a/c"]


def test_what_is_not_there_is_none_and_not_an_error(objects: ObjectStore, tmp_path: Path) -> None:
    assert objects.read("a/b", 1000) is None
    assert objects.download("a/b", tmp_path / "x") is False
    assert objects.stored("a/") == []


def test_only_the_first_creation_counts(objects: ObjectStore) -> None:
    assert objects.create("k", b"first")
    assert not objects.create("k", b"second")
    assert objects.read("k", 1000) == b"first"


@pytest.mark.parametrize("url", ["gs://bucket/x", "http://host/x", "s3://", "s3:///prefix"])
def test_an_address_that_is_no_store_is_refused(url: str) -> None:
    with pytest.raises(WrongUse, match="expected s3://bucket/prefix"):
        open_store(url)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(WrongUse, match=r"expected a relative path without"):
        open_store(str(tmp_path)).read(name, 1000)


def test_environment_variables_choose_the_endpoint(
    bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert open_store(bucket).create("k", b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(StoreUnreachable, match=r"s3://plans/pre/fix at http://127\.0\.0\.1:9: could not read k"):
        open_store(bucket, max_attempts=1).read("k", 1000)


def test_an_endpoint_that_is_no_url_is_refused(bucket: str) -> None:
    with pytest.raises(WrongUse, match=r"^S3 endpoint is 'minio:9000' .* expected a URL such as http://minio:9000\.$"):
        open_store(bucket, endpoint_url="minio:9000").stored()


# --- plans in a store ---


def test_a_plan_that_was_put_is_found_listed_pulled_and_deleted(
    objects: ObjectStore, plan: Path, manifest: PlanManifest, tmp_path: Path
) -> None:
    store = PlanStore(objects)
    assert store.find(manifest.key) is None
    assert store.put(plan, manifest).created
    assert store.manifests() == [manifest]
    assert store.resolve(manifest.key[:8]) == store.resolve("tiny-fp16-sm86.plan") == manifest
    store.verify(manifest)
    pulled = store.pull(manifest, tmp_path / "pulled")
    assert pulled.read_bytes() == plan.read_bytes()
    assert files(tmp_path / "pulled") == ["tiny-fp16-sm86.plan", "tiny-fp16-sm86.plan.json"]
    assert manifest_path(pulled).exists()
    store.delete(manifest.key)
    assert names(objects) == []
    with pytest.raises(PlanNotFound, match=r"no plan tiny-fp16-sm86\.plan in"):
        store.resolve("tiny-fp16-sm86.plan")


def test_of_two_builds_of_one_key_the_first_is_kept_and_the_other_leaves_nothing(
    objects: ObjectStore, plan: Path, manifest: PlanManifest, tmp_path: Path
) -> None:
    other = write_plan(tmp_path / "other.plan", seed=1)
    store = PlanStore(objects)
    store.put(plan, manifest)
    put = store.put(tmp_path / "other.plan", other)
    assert (put.created, put.manifest) == (False, manifest)
    assert names(objects) == sorted([manifest_name(manifest), plan_name(manifest)])


def test_pushing_again_mends_a_plan_that_was_damaged_in_the_store(
    objects: ObjectStore, plan: Path, manifest: PlanManifest, tmp_path: Path
) -> None:
    store = PlanStore(objects)
    store.put(plan, manifest)
    (tmp_path / "half").write_bytes(plan.read_bytes()[:1000])
    objects.upload(tmp_path / "half", plan_name(manifest))
    with pytest.raises(PlanRefused, match="is truncated: expected 300000 bytes, got 1000"):
        store.fetch(manifest, tmp_path / "out" / "x.plan")
    assert files(tmp_path / "out") == []
    assert not store.put(plan, manifest).created, "its manifest was there"
    store.verify(manifest)
    objects.delete(plan_name(manifest))
    with pytest.raises(PlanNotFound, match="is missing, but its manifest exists"):
        store.verify(manifest)


def test_a_file_that_is_not_its_manifest_is_never_uploaded(
    objects: ObjectStore, plan: Path, manifest: PlanManifest
) -> None:
    plan.write_bytes(b"short")
    with pytest.raises(PlanRefused, match="is truncated"):
        PlanStore(objects).put(plan, manifest)
    assert names(objects) == []


def test_a_damaged_manifest_stops_its_own_plan_only(
    objects: ObjectStore, plan: Path, manifest: PlanManifest, tmp_path: Path
) -> None:
    other = write_plan(tmp_path / "other.plan", of=spec(precision="int8"))
    store, refused = PlanStore(objects), []
    store.put(tmp_path / "other.plan", other)
    objects.create(manifest_name(manifest), b"{")
    with pytest.raises(PlanRefused, match="is not a plan manifest"):
        store.find(manifest.key)
    assert store.manifests(lambda key, exc: refused.append(key)) == [other]
    assert refused == [manifest.key]
    assert [s.name for s in store.orphans(min_age_s=0)] == [manifest_name(manifest)]
    assert store.orphans() == []  # younger than an hour: it may be somebody's upload


POISONED = {
    "brackets": b"[" * 100_000,
    "no UTF-8": b"\xff\xfe{\x00",
    "wrong types": b'{"format": 1, "key": [], "file": {}, "spec": 1, "signature": []}',
    "large": b" " * (3 << 20),
    "empty": b"",
}


@pytest.mark.parametrize("poison", POISONED.values(), ids=POISONED)
def test_a_poisoned_manifest_costs_its_own_plan_only(
    objects: ObjectStore, plan: Path, manifest: PlanManifest, poison: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store, key = PlanStore(objects), "0" * 64
    store.put(plan, manifest)
    objects.create(f"{key}/manifest.json", poison)
    assert store.manifests() == [manifest]
    assert f"{key}/manifest.json" in caplog.text
    assert store.resolve("tiny-fp16-sm86.plan") == manifest
    assert [s.name for s in store.orphans(min_age_s=0)] == [f"{key}/manifest.json"]
    with pytest.raises(PlanRefused, match=f"{key}/manifest.json is "):
        store.find(key)


def test_a_signature_that_is_a_list_costs_its_own_plan_only(
    objects: ObjectStore, manifest: PlanManifest, keys: dict[str, Path]
) -> None:
    objects.create(manifest_name(manifest), json.dumps({**manifest.to_json(), "signature": []}).encode())
    refused: dict[str, Exception] = {}
    assert PlanStore(objects, keys["ours"] / "public.pem").manifests(refused.__setitem__) == []
    assert "invalid signature" in str(refused[manifest.key])


@pytest.mark.parametrize("kind", ["manifest", "plan", "folder"])
def test_a_link_out_of_a_folder_store_is_not_followed(
    tmp_path: Path, plan: Path, manifest: PlanManifest, kind: str
) -> None:
    store, secret = PlanStore(open_store(str(tmp_path / "store"))), tmp_path / "elsewhere"
    good = write_plan(tmp_path / "good.plan", of=spec(sm="9.0"))
    store.put(tmp_path / "good.plan", good)
    store.put(plan, manifest)
    path = {
        "manifest": store.local_path(manifest).parent.parent / "manifest.json",
        "plan": store.local_path(manifest),
        "folder": store.local_path(manifest).parent.parent,
    }[kind]
    path.rename(secret)
    path.symlink_to(secret)
    with pytest.raises(PlanRefused, match="is a link out of the store, to"):
        store.verify(store.find(manifest.key) or manifest)
    assert good in store.manifests(lambda *_: None)
    store.verify(good)


def test_a_pipe_in_the_place_of_a_manifest_is_not_waited_for(tmp_path: Path, manifest: PlanManifest) -> None:
    store = PlanStore(open_store(str(tmp_path / "store")))
    (tmp_path / "store" / manifest.key).mkdir(parents=True)
    os.mkfifo(tmp_path / "store" / manifest_name(manifest))
    with pytest.raises(PlanRefused, match="is not a file"):
        store.find(manifest.key)
    assert store.manifests() == []


def test_what_is_under_no_key_or_of_a_later_format_is_not_ours_to_remove(
    objects: ObjectStore, manifest: PlanManifest
) -> None:
    later = {**manifest.to_json(), "format": 2}
    objects.create(manifest_name(manifest), json.dumps(later).encode())
    objects.create(f"{manifest.key}/{'1' * 64}/x.plan", b"its plan")
    objects.create("README.md", b"whose bucket this is")
    objects.create("other/manifest.json", b"{}")
    store = PlanStore(objects)
    assert store.manifests() == []
    assert store.orphans(min_age_s=0) == []


# --- an older plan of the same key, put back ---


def signed_at(
    manifest: PlanManifest, hour: int, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> PlanManifest:
    monkeypatch.setattr("arcface_clients.plans.signing.now_utc", lambda: f"2026-01-01T{hour:02}:00:00+00:00")
    return sign(manifest, keys["ours"] / "private.pem")


def test_an_older_plan_put_back_is_noticed_by_who_has_seen_the_newer_one(
    objects: ObjectStore, plan: Path, keys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = write_plan(plan), write_plan(tmp_path / "second.plan", seed=1)
    old, new = signed_at(first, 1, keys, monkeypatch), signed_at(second, 2, keys, monkeypatch)
    public = keys["ours"] / "public.pem"
    here = PlanStore(objects, public, SeenPlans(tmp_path / "seen"))
    here.put(plan, old)
    assert here.find(old.key) == old
    here.put(tmp_path / "second.plan", new, replace=True)
    assert here.find(old.key) == here.find(old.key) == new
    PlanStore(objects, public).put(plan, old, replace=True)  # the attacker: an old plan, and its true signature
    for again in (here, PlanStore(objects, public, SeenPlans(tmp_path / "seen"))):
        with pytest.raises(PlanRefused, match=r"was signed 2026-01-01T01:.* has seen .* 2026-01-01T02:"):
            again.find(old.key)
        assert again.manifests() == []
    fresh = PlanStore(objects, public, SeenPlans(tmp_path / "of a host that never asked"))
    assert fresh.find(old.key) == old, "what a fresh host cannot know: SECURITY.md"
    meant = signed_at(first, 3, keys, monkeypatch)
    here.put(plan, meant, replace=True)
    assert here.find(old.key) == meant, "an older build that is signed again is meant"


def test_the_time_of_signing_is_under_the_signature(
    objects: ObjectStore, plan: Path, manifest: PlanManifest, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = signed_at(manifest, 1, keys, monkeypatch)
    forged = replace(old, build={**old.build, "signed": "2027-01-01T00:00:00+00:00"})
    PlanStore(objects).put(plan, forged)
    with pytest.raises(PlanRefused, match="was changed after it was signed"):
        PlanStore(objects, keys["ours"] / "public.pem").find(old.key)


def test_without_a_public_key_nothing_is_remembered_because_a_time_is_anybodys_word(
    objects: ObjectStore, plan: Path, manifest: PlanManifest, tmp_path: Path
) -> None:
    store = PlanStore(objects, None, SeenPlans(tmp_path / "seen"))
    store.put(plan, manifest)
    assert store.find(manifest.key) == manifest
    assert not (tmp_path / "seen").exists()


def test_a_damaged_memory_is_said_and_not_forgotten(
    objects: ObjectStore, plan: Path, manifest: PlanManifest, keys: dict[str, Path], tmp_path: Path
) -> None:
    signed = sign(manifest, keys["ours"] / "private.pem")
    store = PlanStore(objects, keys["ours"] / "public.pem", SeenPlans(tmp_path / "seen"))
    store.put(plan, signed)
    store.find(signed.key)
    (tmp_path / "seen" / signed.key).write_text("yesterday")
    with pytest.raises(PlanRefused, match=f"seen/{signed.key} cannot be read .* rm "):
        store.find(signed.key)


def test_a_manifest_under_a_foreign_key_is_refused(objects: ObjectStore, manifest: PlanManifest) -> None:
    foreign = "0" * 64
    objects.create(f"{foreign}/manifest.json", manifest_bytes(manifest))
    with pytest.raises(PlanRefused, match=f"is the manifest of another key, {manifest.key}"):
        PlanStore(objects).find(foreign)


def test_unsigned_plans_are_refused_where_a_key_is_configured_but_are_nobodys_orphans(
    objects: ObjectStore, plan: Path, manifest: PlanManifest, keys: dict[str, Path]
) -> None:
    trusting, strict = PlanStore(objects), PlanStore(objects, keys["ours"] / "public.pem")
    with pytest.raises(PlanRefused, match="is unsigned"):
        strict.put(plan, manifest)
    trusting.put(plan, manifest)
    with pytest.raises(PlanRefused, match="is unsigned"):
        strict.find(manifest.key)
    assert strict.orphans(min_age_s=0) == []
    strict.objects.delete(manifest_name(manifest))
    signed = sign(manifest, keys["ours"] / "private.pem")
    assert strict.put(plan, signed).created
    assert strict.find(manifest.key) == signed


# --- S3 that fails ---


@pytest.mark.parametrize("faults", [Faults(cuts=2), Faults(busy=2), Faults(stalls=1)], ids=["cuts", "503s", "a stall"])
def test_passing_faults_are_retried_and_the_plan_arrives_whole(
    remote: PlanStore, network: FaultProxy, plan: Path, manifest: PlanManifest, tmp_path: Path, faults: Faults
) -> None:
    remote.put(plan, manifest)
    fresh = PlanStore(S3Store("plans", "pre/fix", remote.objects.options))  # a connection that is open may be spared
    wanted = max(faults.cuts, faults.busy, faults.stalls)
    network.faults = faults
    fresh.fetch(manifest, tmp_path / "out" / "x.plan")
    assert network.happened == wanted
    assert (tmp_path / "out" / "x.plan").read_bytes() == plan.read_bytes()


def test_a_manifest_cut_in_the_middle_is_read_again(
    remote: PlanStore, network: FaultProxy, plan: Path, manifest: PlanManifest
) -> None:
    remote.put(plan, manifest)
    fresh = PlanStore(S3Store("plans", "pre/fix", remote.objects.options))
    network.faults = Faults(cuts=2, after_bytes=900)  # past the head of the answer, before its end
    assert fresh.find(manifest.key) == manifest
    assert network.happened == 2
    network.faults = Faults(cuts=99, after_bytes=900)
    with pytest.raises(StoreUnreachable, match=r"could not read \w{12}/manifest\.json: "):
        PlanStore(S3Store("plans", "pre/fix", remote.objects.options)).find(manifest.key)


@pytest.mark.parametrize(
    ("faults", "message"),
    [(Faults(cuts=99), r"could not download .*tiny-fp16-sm86\.plan: the connection was cut each time"),
     (Faults(busy=99), r"the server answered 503 each time .*Try again later"),
     (Faults(stalls=99), r"Read timeout .*Check the endpoint and the network")],
    ids=["cuts", "503s", "stalls"],
)  # fmt: skip
def test_lasting_faults_are_named_and_leave_nothing_behind(
    remote: PlanStore, network: FaultProxy, plan: Path, manifest: PlanManifest, tmp_path: Path, faults, message: str
) -> None:
    remote.put(plan, manifest)
    fresh = PlanStore(S3Store("plans", "pre/fix", remote.objects.options))
    network.faults = faults
    with pytest.raises(StoreUnreachable, match=message) as caught:
        fresh.fetch(manifest, tmp_path / "out" / "x.plan")
    assert str(caught.value).startswith(f"s3://plans/pre/fix at {network.url}: ")
    assert files(tmp_path / "out") == []


@pytest.mark.parametrize("size", [300_000, 40_000_000], ids=["in one part", "in several parts"])
def test_a_byte_changed_on_the_way_is_fetched_again_and_refused_if_it_stays_changed(
    remote: PlanStore, network: FaultProxy, plan: Path, tmp_path: Path, size: int
) -> None:
    manifest = write_plan(plan, size=size)
    remote.put(plan, manifest)
    network.faults = Faults(flips=1)
    remote.fetch(manifest, tmp_path / "out" / "x.plan")
    assert (tmp_path / "out" / "x.plan").read_bytes() == plan.read_bytes()
    assert network.happened == 1
    network.faults = Faults(flips=99)
    with pytest.raises((PlanRefused, StoreUnreachable), match=r"is corrupted: expected sha256|was corrupted each time"):
        remote.fetch(manifest, tmp_path / "out" / "y.plan")
    assert files(tmp_path / "out") == ["x.plan"]


def test_an_upload_that_fails_publishes_nothing(
    remote: PlanStore, network: FaultProxy, plan: Path, manifest: PlanManifest
) -> None:
    network.faults = Faults(busy=99)
    with pytest.raises(StoreUnreachable, match="503"):
        remote.put(plan, manifest)
    network.faults = Faults()
    assert remote.manifests() == []
    assert names(remote.objects) == []


def test_a_large_plan_goes_in_parts_and_comes_back_whole(remote: PlanStore, tmp_path: Path) -> None:
    large, moved = write_plan(tmp_path / "large.plan", size=40_000_000), []
    remote.put(tmp_path / "large.plan", large, moved.append)
    remote.fetch(large, tmp_path / "out" / "x.plan", moved.append)
    assert len(moved) > 4
    assert sum(moved) == 80_000_000


def test_a_bucket_that_is_missing_is_named(bucket: str, s3_server: str, plan: Path, manifest: PlanManifest) -> None:
    store = PlanStore(open_store("s3://elsewhere/pre", endpoint_url=s3_server))
    for action in (store.manifests, lambda: store.find(manifest.key), lambda: store.objects.upload(plan, "x")):
        with pytest.raises(StoreUnreachable, match=r"there is no bucket 'elsewhere' .*aws s3 mb s3://elsewhere"):
            action()


def test_wrong_credentials_are_named(remote: PlanStore, s3_server: str, plan: Path, manifest: PlanManifest) -> None:
    import requests

    requests.post(f"{s3_server}/moto-api/reset-auth", data="0", timeout=HANG_S)  # from now on the server checks keys
    try:
        for action in (remote.manifests, lambda: remote.find(manifest.key), lambda: remote.put(plan, manifest)):
            with pytest.raises(
                StoreUnreachable, match=r"the credentials were refused \(InvalidAccessKeyId.*AWS_PROFILE"
            ):
                action()
    finally:
        requests.post(f"{s3_server}/moto-api/reset-auth", data="inf", timeout=HANG_S)


def test_no_credentials_are_named(bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreUnreachable, match="no usable credentials"):
        open_store(bucket, endpoint_url=s3_server).stored()
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(StoreUnreachable, match=r"no usable credentials .*absent"):
        open_store(bucket, endpoint_url=s3_server).stored()


# --- this host fails ---


def run(code: str, *argv: object, wait: bool = True, **env: str) -> subprocess.Popen[str]:
    """Python code in a process of its own, with `store(url)` and this folder's modules at hand."""
    head = """
        import os, resource, sys
        from pathlib import Path
        from arcface_build.plans.store import PlanStore
        from arcface_build.store import open_store
        from plan_samples import SPEC, write_plan
        def store(url): return PlanStore(open_store(url, max_attempts=2))
    """
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code), *map(str, argv)],
        env={**os.environ, "PYTHONPATH": path, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if wait:
        process.wait(HANG_S)
    return process


def test_a_full_disk_is_named_and_leaves_nothing_behind(
    bucket: str, s3_server: str, plan: Path, manifest: PlanManifest, tmp_path: Path
) -> None:
    PlanStore(open_store(bucket, endpoint_url=s3_server)).put(plan, manifest)
    code = """
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file may grow past this
        remote, out = store(sys.argv[1]), Path(sys.argv[2])
        try:
            remote.fetch(remote.manifests()[0], out / "x.plan")
        except Exception as exc:
            print(type(exc).__name__, exc)
    """
    process = run(code, bucket, tmp_path / "out", AWS_ENDPOINT_URL=s3_server)
    said, complaint = process.communicate()
    assert "StoreUnreachable" in said, complaint
    assert f"{tmp_path / 'out'}: the disk is full" in said
    assert files(tmp_path / "out") == []


def test_a_folder_that_may_not_be_written_is_named(plan: Path, manifest: PlanManifest) -> None:
    with pytest.raises(StoreUnreachable, match=r"^/proc/plans: .*Choose another folder"):
        PlanStore(open_store("/proc/plans")).put(plan, manifest)


def test_a_download_killed_in_the_middle_leaves_no_plan_under_its_name(
    remote: PlanStore, network: FaultProxy, plan: Path, manifest: PlanManifest, bucket: str, tmp_path: Path
) -> None:
    remote.put(plan, manifest)
    code = """
        remote, out = store(sys.argv[1]), Path(sys.argv[2])
        def stop(moved):
            print("moving", flush=True)
            import time; time.sleep(60)
        remote.fetch(remote.manifests()[0], out / "x.plan", stop)
    """
    process = run(code, bucket, tmp_path / "out", wait=False, AWS_ENDPOINT_URL=network.url)
    assert process.stdout.readline() == "moving\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out" / "x.plan").exists()
    remote.fetch(manifest, tmp_path / "out" / "x.plan")
    assert (tmp_path / "out" / "x.plan").read_bytes() == plan.read_bytes()


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_two_processes_that_upload_one_key_agree_on_one_plan(
    bucket: str, s3_server: str, tmp_path: Path, kind: str
) -> None:
    url = bucket if kind == "s3" else str(tmp_path / "store")
    code = """
        url, seed, go = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
        manifest = write_plan(go.parent / f"{seed}.plan", size=3_000_000, seed=seed)
        mine = store(url)
        print("ready", flush=True)
        while not go.exists(): pass
        put = mine.put(go.parent / f"{seed}.plan", manifest)
        print(put.created, put.manifest.sha256)
    """
    both = [run(code, url, seed, tmp_path / "go", wait=False, AWS_ENDPOINT_URL=s3_server) for seed in (1, 2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    answers = [process.communicate(timeout=HANG_S)[0].split() for process in both]
    assert sorted(created for created, _ in answers) == ["False", "True"]
    assert answers[0][1] == answers[1][1]
    store = PlanStore(open_store(url, endpoint_url=s3_server))
    (kept,) = store.manifests()
    store.verify(kept)
    assert names(store.objects) == sorted([manifest_name(kept), plan_name(kept)])
