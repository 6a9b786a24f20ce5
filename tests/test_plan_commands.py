"""`arcface plan …` as a user runs it: exit codes, messages and JSON, on a folder store and on S3."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from arcface_build.cli import main
from arcface_build.plans.get_or_build import get_or_build
from arcface_build.plans.store import PlanStore, manifest_name, plan_name
from arcface_build.store import open_store
from arcface_clients.plans.manifest import PlanManifest
from arcface_clients.plans.spec import BuilderOptions, PlanSpec
from plan_samples import SPEC, spec, write_plan

REPO = Path(__file__).resolve().parent.parent


class Arcface:
    """arcface plan …, in this process; `exit`, `out` and `err` are of the last call."""

    def __init__(self, capsys: pytest.CaptureFixture[str], places: list[str]) -> None:
        self.capsys, self.places = capsys, places

    def __call__(self, *arguments: object) -> int:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["plan", str(arguments[0]), *self.places, *map(str, arguments[1:])])
        self.out, self.err = self.capsys.readouterr()
        return caught.value.code

    def json(self, *arguments: object, exit_code: int = 0) -> Any:
        assert self(*arguments, "--json") == exit_code, self.err
        return json.loads(self.out)


@pytest.fixture
def cache(tmp_path: Path) -> PlanStore:
    return PlanStore(open_store(str(tmp_path / "cache")))


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(open_store(str(tmp_path / "store")))


@pytest.fixture
def arcface(
    cache: PlanStore,
    store: PlanStore,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Arcface:
    monkeypatch.chdir(tmp_path)  # no config/embedding.yaml here
    return Arcface(capsys, ["--cache", cache.url, "--store", store.url])


def built(cache: PlanStore, of: PlanSpec = SPEC, seed: int = 0) -> PlanManifest:
    return get_or_build(of, cache, None, lambda spec, target: write_plan(target, spec, seed=seed)).manifest


def test_help_names_every_command_with_examples() -> None:
    from arcface_build.commands.plan import COMMANDS, command

    said = CliRunner().invoke(command, ["--help"]).output
    for name in COMMANDS:
        assert f"\n  {name} " in said
        assert "Examples:" in CliRunner().invoke(command, [name, "--help"]).output


def test_a_plan_is_pushed_listed_and_pulled_on_another_host(
    arcface: Arcface, cache: PlanStore, store: PlanStore, tmp_path: Path
) -> None:
    manifest = built(cache)
    assert arcface("list") == 0
    assert "tiny-fp16-sm86.plan  8.6  10.3.0    1/32/64  0.3 MB  not measured  no" in arcface.out
    assert arcface.json("push", "--all")[0]["state"] == "pushed"
    assert arcface.json("push", manifest.key[:10])[0]["state"] == "already there"
    assert arcface.json("list")["plans"][0]["where"] == ["cache", "store"]
    arcface.places[1] = str(tmp_path / "another cache")
    (pulled,) = arcface.json("pull", "--sm", "sm86")
    assert pulled["state"] == "pulled"
    assert Path(pulled["path"]).read_bytes() == cache.local_path(manifest).read_bytes()
    assert arcface.json("pull", "tiny-fp16-sm86.plan")[0]["state"] == "already there"
    assert arcface("pull", manifest.key, "-o", tmp_path / "folder") == 0
    assert arcface("show", tmp_path / "folder" / "tiny-fp16-sm86.plan") == 0
    assert manifest.key in arcface.out


def test_show_takes_a_file_a_key_or_a_name(arcface: Arcface, cache: PlanStore, tmp_path: Path) -> None:
    manifest = built(cache)
    cache.pull(manifest, tmp_path / "folder")
    path = tmp_path / "folder" / "tiny-fp16-sm86.plan"
    in_cache = cache.local_path(manifest)
    for name in (manifest.key, manifest.key[:6], "tiny-fp16-sm86.plan", path, f"{path}.json", in_cache):
        assert arcface.json("show", name)["key"] == manifest.key
    path.write_bytes(b"short")
    assert arcface("show", path) == 1
    assert arcface.err.startswith(f"PlanRefused: plan {path} is truncated")
    assert arcface("show", "absent.plan") == 3
    assert arcface.err.startswith("PlanNotFound: no plan absent.plan in")


def test_fit_says_what_a_card_has_memory_for_and_refuses_what_it_has_not(
    arcface: Arcface, cache: PlanStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    told = {"memory": {"loaded_bytes": 250 << 20, "context_bytes": [3 << 30]}}
    get_or_build(SPEC, cache, None, lambda of, target: write_plan(target, of, build=told))
    assert arcface("fit", SPEC.key[:12]) == 0, arcface.err
    assert "tiny-fp16-sm86.plan: 2 × max batch 64, " in arcface.out
    assert "(the NVIDIA A10 that it was built on, less 1GB)" in arcface.out
    assert "instance_group [ { count: 2 kind: KIND_AUTO } ]" in arcface.out
    small = arcface.json("fit", SPEC.key[:12], "--memory", "3GB")
    assert (small["instances"], small["max_batch"], small["rebuilt"]) == (1, 32, True)
    assert arcface("fit", SPEC.key[:12], "--memory", "3GB") == 0
    assert "An estimate for a smaller plan: arcface plan build tiny --max-batch 32" in arcface.out
    assert arcface("show", SPEC.key[:12]) == 0
    assert re.search(r"takes +262\.1 MB loaded, 3221\.2 MB of contexts", arcface.out)
    assert arcface("fit", SPEC.key[:12], "--memory", "2GB", "--instances", "4") == 3
    assert "4 instances need 2.2 GB even for one face at a time" in arcface.err


def test_verify_reads_everything_and_names_what_is_refused(
    arcface: Arcface, cache: PlanStore, store: PlanStore
) -> None:
    good, bad, torn = built(cache), built(cache, spec(sm="8.9")), built(cache, spec(sm="9.0"))
    arcface("push", "--all")
    assert arcface("verify") == 0
    content = bytearray(store.local_path(bad).read_bytes())
    content[1000] ^= 1
    store.local_path(bad).write_bytes(content)
    store.objects.path(manifest_name(torn)).write_bytes(b"{")
    assert arcface("verify") == 1
    lines = arcface.out.splitlines()
    assert len([line for line in lines if "good" in line]) == 4
    assert any(line.startswith("tiny-fp16-sm89.plan: REFUSED: plan") and "is corrupted" in line for line in lines)
    assert any(line.startswith(f"{torn.key[:12]}: REFUSED") and "is not a plan manifest" in line for line in lines)
    assert arcface("verify", good.key) == 0
    assert arcface("verify", "absent") == 1


def test_a_second_push_with_a_signature_says_that_the_store_keeps_the_first_manifest(
    arcface: Arcface, cache: PlanStore, store: PlanStore, keys: dict[str, Path]
) -> None:
    manifest = built(cache)
    assert arcface.json("push", manifest.key)[0]["state"] == "pushed"
    (again,) = arcface.json("push", manifest.key, "--sign-key", keys["ours"] / "private.pem")
    assert again["state"] == "already there, NOT signed by this key"


def test_signing_on_push_satisfies_hosts_that_have_the_public_key(
    arcface: Arcface, cache: PlanStore, store: PlanStore, keys: dict[str, Path], tmp_path: Path
) -> None:
    manifest = built(cache)
    trusted = ["--public-key", keys["ours"] / "public.pem"]
    assert arcface("push", manifest.key, *trusted) == 1
    assert "is unsigned" in arcface.err
    assert arcface("push", manifest.key, "--sign-key", keys["ours"] / "private.pem", *trusted) == 0
    arcface.places[1] = str(tmp_path / "another cache")
    assert arcface("pull", manifest.key, *trusted) == 0
    assert arcface("pull", manifest.key, "--public-key", keys["theirs"] / "public.pem") == 1
    assert "is signed by key" in arcface.err
    assert arcface("verify", *trusted) == 0
    assert arcface("verify", "--public-key", keys["theirs"] / "public.pem") == 1
    assert "is signed by key" in arcface.out


def test_matrix_says_what_is_there_and_what_is_missing(arcface: Arcface, cache: PlanStore, tmp_path: Path) -> None:
    gpus = tmp_path / "gpus.yaml"
    gpus.write_text(
        'sms: { "8.6": {architecture: Ampere, cards: [A10], plans: [fp16, int8]},'
        ' "8.9": {architecture: Ada, cards: [L4], plans: [fp16]} }'
    )
    built(cache)
    built(cache, spec(sm="9.0", tensorrt="11.0.0"))
    told = arcface.json("matrix", "--gpus", gpus, exit_code=1)
    cells = {(c["sm"], c["precision"], c["tensorrt"]): c["state"] for c in told}
    assert cells == {
        ("8.6", "fp16", "10.3.0"): "cache", ("8.6", "fp16", "11.0.0"): "MISSING",
        ("8.6", "int8", "10.3.0"): "MISSING", ("8.6", "int8", "11.0.0"): "MISSING",
        ("8.9", "fp16", "10.3.0"): "MISSING", ("8.9", "fp16", "11.0.0"): "MISSING",
        ("9.0", "fp16", "10.3.0"): "-", ("9.0", "fp16", "11.0.0"): "cache",
    }  # fmt: skip
    (tmp_path / "models" / "other").mkdir(parents=True)
    assert arcface("matrix", "--gpus", REPO / "config" / "gpus.yaml", "--model", "other") == 1
    assert "other  8.6  A10, A40" in arcface.out and " missing. Build one on a GPU of that SM" in arcface.out
    assert arcface("matrix", "--gpus", tmp_path / "absent.yaml") == 3


def test_matrix_of_a_complete_store_is_good(arcface: Arcface, cache: PlanStore, tmp_path: Path) -> None:
    gpus = tmp_path / "gpus.yaml"
    gpus.write_text('sms: { "8.6": {architecture: Ampere, cards: [A10], plans: [fp16]} }')
    built(cache)
    assert arcface("matrix", "--gpus", gpus) == 0


def test_matrix_of_a_mistyped_model_says_which_there_are(arcface: Arcface, cache: PlanStore) -> None:
    built(cache)
    assert arcface("matrix", "--gpus", REPO / "config" / "gpus.yaml", "--model", "tnyi") == 3
    assert arcface.err.startswith("Missing: no model 'tnyi': expected a plan of it, or models/tnyi (plans of: tiny;")


def test_matrix_counts_a_hardware_compatible_plan_for_every_sm_that_it_loads_on(
    arcface: Arcface, cache: PlanStore, tmp_path: Path
) -> None:
    gpus = tmp_path / "gpus.yaml"
    block = "{architecture: x, cards: [x], plans: [fp16]}"
    gpus.write_text(f'sms: {{ "7.5": {block}, "8.6": {block}, "8.9": {block} }}')
    built(cache, spec(options=BuilderOptions(hardware_compatible=True)))
    cells = {c["sm"]: c["state"] for c in arcface.json("matrix", "--gpus", gpus, exit_code=1)}
    assert cells == {"7.5": "MISSING", "8.6": "cache", "8.9": "cache"}
    arcface.places[1], arcface.places[3] = str(tmp_path / "new"), cache.url
    assert [row["state"] for row in arcface.json("pull", "--sm", "8.9")] == ["pulled"]
    assert arcface("pull", "--sm", "7.5") == 3


def test_a_poisoned_manifest_in_the_store_costs_no_command_more_than_itself(
    arcface: Arcface, cache: PlanStore, store: PlanStore, tmp_path: Path
) -> None:
    manifest, poison = built(cache), store.objects.folder / ("0" * 64) / "manifest.json"
    assert arcface("push", "--all") == 0
    poison.parent.mkdir()
    poison.write_bytes(b"[" * 100_000)
    assert arcface("list") == 0
    assert "tiny-fp16-sm86.plan" in arcface.out and f"refused: {poison}" in arcface.err
    arcface.places[1] = str(tmp_path / "new")
    assert arcface("pull", "--sm", "8.6") == 0
    assert "pulled" in arcface.out and f"refused: {poison}" in arcface.err
    assert arcface("matrix", "--gpus", REPO / "config" / "gpus.yaml") == 1
    assert "tiny" in arcface.out and arcface.err == ""
    assert arcface("verify") == 1
    os.utime(poison, (1, 1))
    assert [row["plan"] for row in arcface.json("gc")] == [f"{'0' * 64}/manifest.json"]
    assert store.manifests() == [manifest]


def test_pull_goes_on_after_a_damaged_plan_and_ends_with_exit_code_1(
    arcface: Arcface, cache: PlanStore, store: PlanStore, tmp_path: Path
) -> None:
    bad, good = built(cache, spec(precision="fp32")), built(cache)
    arcface("push", "--all")
    store.local_path(bad).write_bytes(b"short")
    arcface.places[1] = str(tmp_path / "new")
    assert arcface("pull", "--sm", "8.6", "--json") == 1
    states = {row["key"]: row["state"] for row in json.loads(arcface.out)}
    assert states[good.key] == "pulled"
    assert states[bad.key].startswith("REFUSED: plan ") and "is truncated" in states[bad.key]


def test_replace_puts_a_signed_manifest_where_an_unsigned_one_was_and_an_older_one_is_noticed(
    arcface: Arcface, cache: PlanStore, store: PlanStore, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, sign_key = built(cache), ["--sign-key", keys["ours"] / "private.pem"]
    trusted = ["--public-key", keys["ours"] / "public.pem"]
    arcface("push", manifest.key)
    assert arcface("pull", manifest.key, *trusted) == 1
    assert arcface.json("push", manifest.key, "--replace", *sign_key)[0]["state"] == "pushed"
    assert arcface("pull", manifest.key, *trusted) == 0
    monkeypatch.setattr("arcface_clients.plans.signing.now_utc", lambda: "2020-01-01T00:00:00+00:00")
    arcface("push", manifest.key, "--replace", *sign_key)
    assert arcface("list", *trusted) == 0
    assert "an older one was put back" in arcface.err
    assert arcface("pull", manifest.key, *trusted) == 1
    assert "was signed 2020-01-01T00:00:00+00:00, but this host has seen" in arcface.err


def test_gc_removes_leftovers_and_other_versions_and_nothing_else(
    arcface: Arcface, cache: PlanStore, store: PlanStore
) -> None:
    kept, other = built(cache), built(cache, spec(tensorrt="10.4.0"))
    arcface("push", "--all")
    store.objects.create(f"{kept.key}/{'0' * 64}/lost.plan", b"the loser of a race")
    unfinished = cache.objects.path(f"{kept.key}/{kept.sha256}/.x.plan.abc")
    unfinished.write_bytes(b"half")
    for path in (unfinished, store.objects.path(f"{kept.key}/{'0' * 64}/lost.plan")):
        os.utime(path, (1, 1))
    assert len(arcface.json("gc", "--dry-run")) == 2
    assert unfinished.exists()
    assert [row["state"][:10] for row in arcface.json("gc")] == ["leftover, ", "unfinished"]
    assert arcface.json("gc") == []
    assert arcface("gc", "--keep-tensorrt", "10.3.0") == 0
    assert cache.manifests() == store.manifests() == [kept]
    assert [stored.name for stored in store.objects.stored()] == sorted([manifest_name(kept), plan_name(kept)])
    assert arcface("gc", "--keep-tensorrt", "ten") == 2
    assert other.key not in arcface.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [(["push"], 2, "WrongUse: say what to push"), (["push", "x", "--all"], 2, "WrongUse: say what to push"),
     (["pull"], 2, "WrongUse: say what to pull"), (["pull", "x", "--sm", "8.6"], 2, "WrongUse: say what to pull"),
     (["pull", "--sm", "ampere"], 2, "expected a compute capability"),
     (["pull", "absent"], 3, "PlanNotFound: no plan absent"),
     (["pull", "--sm", "8.9"], 3, "PlanNotFound: no plan for SM 8.9 in"), (["show"], 2, "Missing argument"),
     (["pull", "--sm", "auto"], 3, "Missing: no NVIDIA GPU on this host"),
     (["verify", "--public-key", "absent.pem", "x"], 1, "")],
)  # fmt: skip
def test_wrong_use_and_missing_things_have_their_exit_codes(
    arcface: Arcface, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    assert arcface(*arguments) == code
    assert message in arcface.err


def test_without_a_store_the_next_command_is_named(arcface: Arcface, cache: PlanStore) -> None:
    arcface.places = ["--cache", cache.url]
    assert arcface("push", "--all") == 2
    assert "no plan store is configured: add --store s3://bucket/prefix" in arcface.err


def test_the_configuration_file_names_the_store(
    arcface: Arcface, cache: PlanStore, s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1").create_bucket(Bucket="configured")
    (tmp_path / "embedding.yaml").write_text(
        f"storage: {{type: s3, bucket: configured, prefix: a/b, endpoint: '{s3_server}', cache: '{tmp_path / 'c'}'}}"
    )
    built(cache)
    arcface.places = ["--config", "embedding.yaml"]
    assert arcface("push", "--all", "--cache", cache.url) == 0
    assert arcface.json("list")["plans"][0]["where"] == ["store"]
    assert arcface.json("pull", "tiny-fp16-sm86.plan")[0]["path"].startswith(str(tmp_path / "c" / "plans"))
    text = f"storage: {{type: s3, bucket: absent, retries: 0, endpoint: '{s3_server}'}}"
    (tmp_path / "embedding.yaml").write_text(text)
    assert arcface("list", "--cache", cache.url) == 3
    assert arcface.err.startswith("StoreUnreachable: s3://absent/plans at http://127.0.0.1")


@pytest.mark.parametrize("gpu", [False, True], ids=["no GPU", "no TensorRT"])
def test_plan_build_where_nothing_can_be_built_is_one_sentence_and_exit_3(tmp_path: Path, gpu: bool) -> None:
    if gpu:
        smi = tmp_path / "nvidia-smi"
        smi.write_text("#!/bin/sh\necho '0, NVIDIA A10, 8.6, 550.54.15, 23028, 312'\n")
        smi.chmod(0o755)
    environment = {"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HOME": str(tmp_path)}
    command = [
        sys.executable,
        "-c",
        "from arcface_build.cli import main; main()",
        "plan",
        "build",
        "r50",
        "--precision",
        "fp16",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 3
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    expected = "Missing: TensorRT is not installed here" if gpu else "Missing: no NVIDIA GPU on this host"
    assert done.stderr.startswith(expected)
    assert "arcface plan pull" in done.stderr
