"""Every way to a plan refuses what is not what it should be: one table, doors by faults.

TensorRT is tests/fake_tensorrt.py, in processes of its own; Polygraphy, engine and store are the real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import pytest

from arcface_build.plans.get_or_build import get_or_build
from arcface_build.plans.store import PlanStore, manifest_name
from arcface_build.repository.assemble import assemble_plans
from arcface_build.serving.choose import choose_backend
from arcface_build.serving.host_checks import check_plans
from arcface_build.serving.ports import free_ports
from arcface_build.serving.served_plans import served_plans
from arcface_build.store import open_store
from arcface_clients.config.schema import EmbeddingConfig, LocalModel, Storage
from arcface_clients.errors import ArcFaceError, PlanRefused
from arcface_clients.plans.find import find_plan
from arcface_clients.plans.manifest import manifest_path, parse_manifest, write_manifest
from arcface_clients.plans.read import Plan, read_plan
from arcface_clients.plans.signing import sign
from conftest import copy_repository
from plan_samples import SPEC, in_cache
from tiny_model import write_model


@dataclass
class Host:
    """A host with an imported model, a model repository, a plan cache, and the public key of those who sign plans."""

    folder: Path
    keys: dict[str, Path]

    @property
    def public_key(self) -> Path:
        return self.keys["ours"] / "public.pem"

    def built(self, cache: str = "cache") -> Plan:
        """A plan of the imported model, signed by our key, in a cache."""
        model = self.folder / "models" / "tiny"
        if not model.exists():
            write_model(model)
        contract = json.loads((model / "manifest.json").read_text())["contract_id"]
        facts = {"contract_id": contract, "drift": {"max_drift": 1e-4, "faces": 64}}
        return in_cache(self.folder / cache, sign_key=self.keys["ours"] / "private.pem", **facts)

    def assembled(self) -> Path:
        """The plan in arcface_trt, the cache empty."""
        repository = copy_repository(self.folder)
        plan = self.built("elsewhere")
        assemble_plans(self.folder / "models" / "tiny", [plan.path], repository, public_key=self.public_key)
        return repository / "arcface_trt" / "1" / "sm86.plan"

    def settings(self) -> EmbeddingConfig:
        return EmbeddingConfig(
            backend="tensorrt",
            precision="fp16",
            local=LocalModel(model_repository=self.folder / "model_repository"),
            storage=Storage(cache=self.folder / "cache", public_key=self.public_key),
        )


@pytest.fixture
def host(tmp_path: Path, keys: dict[str, Path]) -> Host:
    return Host(tmp_path, keys)


# --- faults, done to a plan file and its manifest ---


def unsigned(plan: Path, keys: dict[str, Path]) -> None:
    write_manifest(plan, replace(read_plan(plan).manifest, signature=None))


def signed_by_another(plan: Path, keys: dict[str, Path]) -> None:
    write_manifest(plan, sign(read_plan(plan).manifest, keys["theirs"] / "private.pem"))


def edited(plan: Path, keys: dict[str, Path]) -> None:
    write_manifest(plan, replace(read_plan(plan).manifest, drift={"max_drift": 0.0, "faces": 64}))


def without_a_manifest(plan: Path, keys: dict[str, Path]) -> None:
    manifest_path(plan).unlink()


def changed(plan: Path, keys: dict[str, Path]) -> None:
    content = bytearray(plan.read_bytes())
    content[1000] ^= 1
    plan.write_bytes(content)


def truncated(plan: Path, keys: dict[str, Path]) -> None:
    plan.write_bytes(plan.read_bytes()[:-1])


FAULTS = (unsigned, signed_by_another, edited, without_a_manifest, changed, truncated)
Fault = Callable[[Path, dict[str, Path]], None]


# --- doors: what each is asked, and where its plan lies ---


def engine_door(host: Host, plan: Path | None, cache: str = "cache") -> None:
    """As the engine finds its plan; that it loads nothing else is shown below, with Polygraphy."""
    if plan is not None:
        read_plan(plan, host.public_key)
    else:
        find_plan(
            "8.6",
            "fp16",
            model_repository=host.folder / "model_repository",
            cache=host.folder / cache,
            public_key=host.public_key,
        )


def by_path(host: Host, fault: Fault | None) -> None:
    plan = PlanStore(open_store(str(host.folder / "cache")))
    path = plan.pull(host.built().manifest, host.folder / "pulled")
    if fault:
        fault(path, host.keys)
    engine_door(host, path)


def in_the_repository(host: Host, fault: Fault | None) -> None:
    path = host.assembled()
    if fault:
        fault(path, host.keys)
    engine_door(host, None)


def in_the_cache(host: Host, fault: Fault | None) -> None:
    path = host.built().path
    if fault:
        fault(path, host.keys)
    engine_door(host, None)


def assemble(host: Host, fault: Fault | None) -> None:
    repository, path = copy_repository(host.folder), host.built().path
    if fault:
        fault(path, host.keys)
    assemble_plans(host.folder / "models" / "tiny", [path], repository, public_key=host.public_key)


def pull(host: Host, fault: Fault | None) -> None:
    path = host.built().path  # the cache of another host is our store
    if fault:
        fault(path, host.keys)
    store = PlanStore(open_store(str(host.folder / "cache")), host.public_key)
    store.pull(store.resolve(SPEC.key), host.folder / "pulled")


def get_from_the_store(host: Host, fault: Fault | None) -> None:
    path = host.built("store").path
    if fault:
        fault(path, host.keys)
    store = PlanStore(open_store(str(host.folder / "store")), host.public_key)
    assert get_or_build(SPEC, PlanStore(open_store(str(host.folder / "new")), host.public_key), store).source == "store"


def get_from_the_cache(host: Host, fault: Fault | None) -> None:
    path = host.built().path
    if fault:
        fault(path, host.keys)
    get_or_build(SPEC, PlanStore(open_store(str(host.folder / "cache")), host.public_key))


def serve(host: Host, fault: Fault | None) -> None:
    path = host.assembled()
    if fault:
        fault(path, host.keys)
    plans = served_plans(host.folder / "model_repository", host.public_key, "10.3.0")
    assert choose_backend("auto", "8.6", plans, onnx=True, reference=True).backend == ("onnx" if fault else "tensorrt")
    choose_backend("tensorrt", "8.6", plans, onnx=True, reference=True)


def doctor(host: Host, fault: Fault | None) -> None:
    path = host.assembled()
    if fault:
        fault(path, host.keys)
    check = check_plans(host.settings())
    if "sm86.plan" in check.found and check.status == "problem":
        raise PlanRefused(check.found)


DOORS = (
    by_path, in_the_repository, in_the_cache, assemble, pull, get_from_the_store, get_from_the_cache, serve, doctor,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_plan_that_is_not_what_it_should_be_is_refused_at_every_door(
    host: Host, door: Callable[[Host, Fault | None], None], fault: Fault
) -> None:
    words = {
        unsigned: "is unsigned",
        signed_by_another: "is signed by key",
        edited: "was changed after it was signed",
        without_a_manifest: "has no manifest|no plan",  # in a store it does not exist
        changed: "is corrupted",
        truncated: "is truncated",
    }
    with pytest.raises(ArcFaceError, match=words[fault]):
        door(host, fault)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_door_is_open_to_a_plan_that_our_key_signed(
    host: Host, door: Callable[[Host, Fault | None], None]
) -> None:
    door(host, None)


COMMANDS = {
    "assemble": ["assemble", "tiny", "--plan", "PULLED"],
    "serve": ["serve", "--backend", "tensorrt", "--once", "PORTS"],
    "doctor": ["doctor"],
    "pull": ["plan", "pull", SPEC.key, "--store", "cache", "--cache", "new"],
    "push": ["plan", "push", "PULLED", "--store", "store"],
    "show": ["plan", "show", "PULLED"],
    "verify": ["plan", "verify", "PULLED"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_knows_the_configured_public_key(
    host: Host, fake_host: Callable[..., None], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    fake_host()  # for its nvidia-smi
    served, built = host.assembled(), host.built()
    pulled = PlanStore(open_store(str(host.folder / "cache"))).pull(built.manifest, host.folder / "pulled")
    for plan in (served, built.path, pulled):
        unsigned(plan, host.keys)
    monkeypatch.setenv("ARCFACE_STORAGE__PUBLIC_KEY", str(host.public_key))
    names = ("--http-port", "--grpc-port", "--metrics-port")
    places = {
        "PULLED": [str(pulled)],
        "PORTS": [f"{name}={port}" for name, port in zip(names, astuple(free_ports()), strict=True)],
    }
    arguments = [word for asked in COMMANDS[command] for word in places.get(asked, [asked])]
    code = "import sys; from arcface_build.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=host.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == (3 if command == "doctor" else 1), said
    assert "is unsigned" in said


# --- the doors that hand a plan to TensorRT, with TensorRT ---


def run(code: str, folder: Path, *arguments: object) -> str:
    """What a Python of its own prints, with our TensorRT on its path."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "POLYGRAPHY_AUTOINSTALL_DEPS": "0"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ENGINE = """
import json, logging, sys
from arcface_clients.engines import EngineRegistry
from arcface_clients.errors import ArcFaceError
from arcface_build.compare.runs import plan_runner
from pathlib import Path

class Said(logging.Handler):
    def emit(self, record):
        said.append(record.levelname)

logging.getLogger("arcface_clients").addHandler(Said())
public_key, *plans = sys.argv[1:]
for plan in plans:
    for door in ("engine", "compare"):
        said = []
        try:
            if door == "engine":
                with EngineRegistry.get("tensorrt", plan=plan, public_key=public_key) as engine:
                    engine.ensure_ready()
            else:
                plan_runner(Path(plan), Path(public_key))
            print("loaded", said)
        except ArcFaceError as exc:
            print(type(exc).__name__, said, exc)
        except Exception as exc:
            print("HANDED TO TENSORRT", type(exc).__name__)
"""


def test_engine_and_compare_give_tensorrt_no_byte_of_a_refused_plan(
    host: Host, fake_host: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake TensorRT unpickles what it is given, and our samples are no pickles: it would not go unseen."""
    fake_host()
    monkeypatch.setenv("ARCFACE_STORAGE__PUBLIC_KEY", str(host.public_key))
    plans, cache = [], PlanStore(open_store(str(host.folder / "cache")))
    for fault in FAULTS:
        plans.append(cache.pull(host.built().manifest, host.folder / fault.__name__))
        fault(plans[-1], host.keys)
    told = run(ENGINE, host.folder, host.public_key, *plans).splitlines()
    assert len(told) == 2 * len(FAULTS)
    assert all(line.startswith("ModelMissing ['ERROR'] ") for line in told[::2])
    assert all(line.startswith("PlanRefused [] ") for line in told[1::2])


def test_a_chain_goes_on_without_a_refused_plan_and_says_it_at_level_error(
    host: Host, fake_host: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_host()
    path = host.assembled()
    changed(path, host.keys)
    code = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
import numpy as np
from arcface_clients import get_embedding_backend
keys = {"backend": "tensorrt", "precision": "fp16", "fallback.chain": ["onnx"], "validation.run_on_startup": False,
        "storage.cache": "cache"}
with get_embedding_backend(tensorrt_config=keys) as backend:
    backend.encode(np.zeros((1, 112, 112, 3), np.uint8))
    print("answered by", backend.last_engine)
"""
    told = run(code, host.folder)
    assert "ERROR" in told and "is corrupted: expected sha256" in told
    assert told.splitlines()[-1] == "answered by onnx"


def test_a_refused_plan_of_the_repository_gives_way_to_a_good_one_of_the_cache(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    changed(host.assembled(), host.keys)
    good = host.built()
    found = find_plan(
        "8.6",
        "fp16",
        model_repository=host.folder / "model_repository",
        cache=host.folder / "cache",
        public_key=host.public_key,
    )
    assert found.path == good.path
    assert [(record.levelname, "is corrupted" in record.message) for record in caplog.records] == [("ERROR", True)]


def test_a_plan_that_changes_after_it_was_checked_is_not_loaded(host: Host) -> None:
    plan = read_plan(host.built().path, host.public_key)
    changed(plan.path, host.keys)
    with pytest.raises(PlanRefused, match="is corrupted"):
        plan.content()


def test_serve_and_doctor_name_a_plan_of_another_tensorrt(host: Host) -> None:
    host.assembled()
    plans = served_plans(host.folder / "model_repository", host.public_key, "10.9.0.34")
    with pytest.raises(PlanRefused, match=r"sm86\.plan is built with TensorRT 10\.3\.0, this host has 10\.9\.0\.34"):
        choose_backend("tensorrt", "8.6", plans, onnx=True, reference=True)
    assert served_plans(host.folder / "model_repository", host.public_key, "10.3.0.26+cuda12").good == {"8.6"}


def test_a_manifest_in_the_cache_is_also_bound_to_its_key(host: Host) -> None:
    plan = host.built()
    other = plan.path.parent.parent.with_name("0" * 64)
    plan.path.parent.parent.rename(other)
    with pytest.raises(PlanRefused, match=f"is the manifest of another key, {SPEC.key}"):
        read_plan(other / plan.path.parent.name / plan.path.name)
    assert parse_manifest((other / "manifest.json").read_bytes(), "here") == plan.manifest
    assert manifest_name(plan.manifest) == f"{SPEC.key}/manifest.json"
