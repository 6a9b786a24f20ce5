"""get_or_build: the order of its steps, each of them switched off or broken, and one builder per key and host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from arcface_build.errors import PlanNotFound, StoreUnreachable
from arcface_build.plans.get_or_build import Builder, get_or_build
from arcface_build.plans.store import PlanStore, manifest_name, plan_name
from arcface_build.store import open_store
from arcface_clients.errors import Missing, PlanRefused, WrongUse
from arcface_clients.plans.manifest import PlanManifest
from arcface_clients.plans.spec import PlanSpec
from deadlines import HANG_S
from plan_samples import SPEC, spec, write_plan

TESTS = Path(__file__).resolve().parent


@pytest.fixture
def cache(tmp_path: Path) -> PlanStore:
    return PlanStore(open_store(str(tmp_path / "cache")))


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(open_store(str(tmp_path / "store")))


def builder(seed: int = 0) -> Builder:
    def build(of: PlanSpec, target: Path) -> PlanManifest:
        return write_plan(target, of, seed=seed)

    return build


def failing(of: PlanSpec, target: Path) -> PlanManifest:
    target.write_bytes(b"half a plan")
    raise PlanRefused("the plan holds fp32 convolutions")


def files(plans: PlanStore) -> list[str]:
    folder = plans.objects.folder
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_the_first_call_builds_and_uploads_the_next_is_served_from_the_cache_another_host_from_the_store(
    cache: PlanStore, store: PlanStore, tmp_path: Path
) -> None:
    built = get_or_build(SPEC, cache, store, builder(), upload=True)
    assert built.source == "build"
    assert built.path.name == "tiny-fp16-sm86.plan"
    assert built.notes == (
        f"cache: no plan of this key in cache {cache.url}",
        f"store: no plan of this key in store {store.url}",
        f"store: uploaded to {store.url}",
    )
    again = get_or_build(SPEC, cache, store, failing)
    assert (again.source, again.path, again.manifest, again.notes) == ("cache", built.path, built.manifest, ())
    elsewhere = PlanStore(open_store(str(tmp_path / "cache of another host")))
    other = get_or_build(SPEC, elsewhere, store, failing)
    assert (other.source, other.manifest) == ("store", built.manifest)
    assert other.path.read_bytes() == built.path.read_bytes()
    assert get_or_build(SPEC, elsewhere).source == "cache"
    assert files(elsewhere) == sorted([manifest_name(built.manifest), plan_name(built.manifest)])


def test_every_step_can_be_switched_off(cache: PlanStore, store: PlanStore) -> None:
    get_or_build(SPEC, cache, None, builder(seed=1))
    assert get_or_build(SPEC, cache, store, builder(seed=2), read_cache=False, upload=True).source == "build"
    assert get_or_build(SPEC, cache, store, None, read_cache=False).source == "store"
    with pytest.raises(PlanNotFound):
        get_or_build(spec(sm="8.9"), cache, store, None)


def test_a_missing_sm_lists_the_plans_that_exist(cache: PlanStore, store: PlanStore) -> None:
    for sm in ("8.6", "8.0"):
        get_or_build(spec(sm=sm), cache, store, builder(), upload=True)
    with pytest.raises(PlanNotFound) as caught:
        get_or_build(spec(sm="8.9"), cache, store)
    assert str(caught.value) == (
        f"no fp16 plan of tiny for SM 8.9 in {store.url} (found: 8.0, 8.6). "
        "Build one on an SM 8.9 GPU: arcface plan build tiny --precision fp16"
    )


@pytest.mark.parametrize(
    ("asked", "have"),
    [({"tensorrt": "11.0.0"}, "found: TensorRT 10.3.0, expected 11.0.0"), ({"precision": "int8"}, "found: tiny fp16"),
     ({"model": "r100", "sm": "7.5"}, "found: no plan of this model"),
     ({"max_batch": 128}, "found: the same SM and TensorRT version with another ONNX, profile or builder options")],
)  # fmt: skip
def test_a_plan_that_is_not_there_says_what_is_nearest(
    cache: PlanStore, store: PlanStore, asked: dict, have: str
) -> None:
    get_or_build(SPEC, cache, store, builder(), upload=True)
    with pytest.raises(PlanNotFound) as caught:
        get_or_build(spec(**asked), cache, store)
    assert f"({have})" in str(caught.value)


def test_a_damaged_cache_is_replaced_from_the_store(cache: PlanStore, store: PlanStore) -> None:
    built = get_or_build(SPEC, cache, store, builder(), upload=True)
    for damage in (b"", b"x" * built.manifest.size_bytes, built.path.read_bytes()[:-1]):
        built.path.write_bytes(damage)
        mended = get_or_build(SPEC, cache, store)
        assert mended.source == "store"
        assert mended.notes[0].startswith("cache: plan ")
    cache.objects.path(manifest_name(built.manifest)).write_bytes(b"{")
    assert get_or_build(SPEC, cache, store).source == "store"
    built.path.unlink()
    assert get_or_build(SPEC, cache, store).source == "store"


def test_a_damaged_plan_in_the_store_is_refused_or_built_anew(cache: PlanStore, store: PlanStore) -> None:
    built = get_or_build(SPEC, cache, store, builder(), upload=True)
    store.local_path(built.manifest).write_bytes(b"short")
    with pytest.raises(PlanRefused, match="is truncated: expected 300000 bytes, got 5"):
        get_or_build(SPEC, cache, store, read_cache=False)
    rebuilt = get_or_build(SPEC, cache, store, builder(), read_cache=False)
    assert rebuilt.source == "build"
    assert "is truncated" in rebuilt.notes[0]


def test_a_store_that_does_not_answer_is_named_or_the_plan_built(
    cache: PlanStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    store = PlanStore(open_store("s3://plans", endpoint_url="http://127.0.0.1:9", max_attempts=1))
    with pytest.raises(StoreUnreachable, match=r"http://127\.0\.0\.1:9"):
        get_or_build(SPEC, cache, store)
    built = get_or_build(SPEC, cache, store, builder(), upload=True)
    assert built.source == "build"
    assert [note[:20] for note in built.notes[1:]] == ["store: s3://plans at", "store: not uploaded:"]


def test_a_build_that_fails_leaves_nothing_behind(cache: PlanStore) -> None:
    with pytest.raises(PlanRefused, match="fp32 convolutions"):
        get_or_build(SPEC, cache, None, failing)
    assert files(cache) == []
    assert get_or_build(SPEC, cache, None, builder()).source == "build"


def test_the_host_that_loses_the_race_uses_its_own_build_and_says_so(
    cache: PlanStore, store: PlanStore, tmp_path: Path
) -> None:
    elsewhere = PlanStore(open_store(str(tmp_path / "elsewhere")))

    def slow(of: PlanSpec, target: Path) -> PlanManifest:
        get_or_build(SPEC, elsewhere, store, builder(seed=1), upload=True)
        return write_plan(target, of, seed=2)

    mine = get_or_build(SPEC, cache, store, slow, upload=True)
    assert mine.notes[-1].startswith("store: another host published a plan of this key first")
    assert store.manifests() == elsewhere.manifests() != cache.manifests()


def test_only_signed_plans_where_a_public_key_is_configured(tmp_path: Path, keys: dict[str, Path]) -> None:
    public, private = keys["ours"] / "public.pem", keys["ours"] / "private.pem"
    cache = PlanStore(open_store(str(tmp_path / "cache")), public)
    store = PlanStore(open_store(str(tmp_path / "store")), public)
    with pytest.raises(WrongUse, match="a plan built here must be signed: add --sign-key"):
        get_or_build(SPEC, cache, store, builder())
    assert get_or_build(SPEC, cache, store, builder(), sign_key=private, upload=True).manifest.signature
    unsigned = replace(store.manifests()[0], signature=None)
    store.objects.delete(manifest_name(unsigned))
    PlanStore(store.objects).put(cache.local_path(unsigned), unsigned)
    with pytest.raises(PlanRefused, match="is unsigned"):
        get_or_build(SPEC, cache, store, read_cache=False)


def test_the_cache_must_be_a_folder(store: PlanStore) -> None:
    with pytest.raises(WrongUse, match="expected a local folder"):
        get_or_build(SPEC, PlanStore(open_store("s3://bucket")), store)


def child(code: str, *argv: object) -> subprocess.Popen[str]:
    head = """
        import sys, time
        from pathlib import Path
        from arcface_build.plans.get_or_build import get_or_build
        from arcface_build.plans.store import PlanStore
        from arcface_build.store import open_store
        from plan_samples import SPEC, write_plan
        cache = PlanStore(open_store(sys.argv[1]))
    """
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code), *map(str, argv)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_on_one_host_build_once(cache: PlanStore) -> None:
    code = """
        def build(spec, target):
            time.sleep(0.5)
            return write_plan(target, spec)
        print(get_or_build(SPEC, cache, None, build).source)
    """
    both = [child(code, cache.url) for _ in range(2)]
    assert sorted(process.communicate(timeout=HANG_S)[0].strip() for process in both) == ["build", "cache"]


def test_a_builder_killed_in_the_middle_frees_the_key_and_leaves_no_plan(cache: PlanStore) -> None:
    code = """
        def build(spec, target):
            target.write_bytes(b"half a plan")
            print("building", flush=True)
            time.sleep(60)
        get_or_build(SPEC, cache, None, build)
    """
    process = child(code, cache.url)
    assert process.stdout.readline() == "building\n"
    with pytest.raises(Missing, match=r"another process has locked plan \w{12} for 0\.1 s"):
        get_or_build(SPEC, cache, None, builder(), lock_timeout_s=0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert cache.manifests() == []
    built = get_or_build(SPEC, cache, None, builder())
    assert built.source == "build"
    assert files(cache) == sorted([manifest_name(built.manifest), plan_name(built.manifest)])
    leftover = built.path.with_name(".tiny-fp16-sm86.plan.abc")  # as a killed download leaves one
    leftover.write_bytes(b"half a plan")
    assert get_or_build(SPEC, cache).source == "cache"
    assert not leftover.exists()
