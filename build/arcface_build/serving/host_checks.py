"""The configuration in; checks of what the build side needs out: tritonserver, weights, plans and their store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from arcface_clients.checks.diagnostics import fact_and_fix, gpus_here, guarded
from arcface_clients.checks.report import Check
from arcface_clients.errors import ArcFaceError, GateFailed, Missing, PlanRefused

if TYPE_CHECKING:
    from arcface_clients.config.schema import EmbeddingConfig


def build_checks(settings: EmbeddingConfig) -> list[Check]:
    """What can be served and built from here, and whether the plan store answers."""
    looks = {
        "tritonserver": check_tritonserver,
        "weights": lambda: check_weights(settings),
        "processes": lambda: check_processes(settings),
        "plans": lambda: check_plans(settings),
        "store": lambda: check_store(settings),
    }
    return [guarded(name, look) for name, look in looks.items()]


def check_tritonserver() -> Check:
    """A tritonserver that `arcface serve` could start."""
    from arcface_build.serving.binary import find_tritonserver

    try:
        return Check("tritonserver", "ok", find_tritonserver().origin)
    except Missing as exc:
        return Check("tritonserver", "absent", *fact_and_fix(exc))


def check_processes(settings: EmbeddingConfig) -> Check:
    """The tritonserver of this host that listens at triton.url, and since when the processes behind its models run."""
    from arcface_build.serving.listener import pid_listening_on
    from arcface_build.serving.stubs import stubs_of
    from arcface_clients.triton.memory.system import is_local

    address = settings.triton.address
    pid = pid_listening_on(address.port) if is_local(address.host) else None
    if pid is None:
        return Check("processes", "absent", f"no process of this host that we may see listens at {address}")
    stubs = sorted(stubs_of(pid), key=lambda stub: -stub.age_s)
    lost = [f"{stub.pid}, which {trouble}, of {stub.model}" for stub in stubs if (trouble := stub.trouble)]
    if lost:
        fix = "start the server again; arcface serve does that by itself"
        return Check("processes", "problem", f"tritonserver {pid} lost a process: {', '.join(lost)}", fix)
    newest = {stub.model: stub.age_s for stub in stubs}
    models = ", ".join(f"{name} for {_lasted(age_s)}" for name, age_s in sorted(newest.items()))
    return Check("processes", "ok", f"process {pid} listens at {address}; Python backends: {models or 'none'}")


def _lasted(seconds: float) -> str:
    """A time in its largest unit that fills one: 90 → "1 min"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def check_weights(settings: EmbeddingConfig) -> Check:
    """Versions with weights in the model repository."""
    from arcface_build.repository.find import find_repository
    from arcface_build.repository.integrity import PHOTO_MODEL
    from arcface_build.repository.mend import faults
    from arcface_build.repository.versions import check, served_version, versions

    given = settings.local.model_repository
    try:
        repository = find_repository(given if given.exists() else None)
    except Missing as exc:
        return Check(
            "weights", "absent", fact_and_fix(exc)[0], "make one: arcface serve; or set local.model_repository"
        )
    models = ("arcface_trt", "arcface_onnx", "arcface_reference", PHOTO_MODEL)
    have = {name: versions(repository / name) for name in models}
    for name, number in ((name, number) for name, numbers in have.items() for number in numbers):
        version = repository / name / str(number)
        try:
            check(version)
        except (GateFailed, Missing) as exc:
            fact, fix = fact_and_fix(exc)
            if number != served_version(repository, name):
                fix = f"it is not served, and arcface rollback refuses it; to forget it: rm {version / 'manifest.json'}"
            return Check("weights", "problem", fact, fix)
    damage = faults(repository)
    if damage:
        return Check("weights", "problem", "; ".join(damage), "arcface serve mends it")
    serves = {name: served_version(repository, name) for name in models}
    found = ", ".join(f"{name} {'none' if v is None else f'version {v}'}" for name, v in serves.items())
    if not any(numbers for name, numbers in have.items() if name != PHOTO_MODEL):
        return Check(
            "weights", "absent", f"no weights in {repository}", "arcface import SOURCE, or: arcface import demo"
        )
    return Check("weights", "ok", found)


def check_plans(settings: EmbeddingConfig) -> Check:
    """The plans in the repository are what they should be, and this GPU has one there or in the cache."""
    from arcface_build.serving.served_plans import served_plans, tensorrt_of_server
    from arcface_clients.plans.find import find_plan

    key, tensorrt = settings.storage.public_key, tensorrt_of_server()
    served = served_plans(settings.local.model_repository, key, tensorrt)
    if served.refused:
        fix = "arcface assemble NAME --plan FILE with a plan that is right, or go back: arcface rollback"
        return Check("plans", "problem", " ".join(served.refused.values()), fix)
    gpus, _ = gpus_here()
    wanted = settings.backend == "tensorrt"
    if not gpus:
        status = "problem" if wanted else "absent"
        return Check("plans", status, "no GPU here, so no plan is of use", "set backend: onnx" if wanted else "")
    try:
        plan = find_plan(
            gpus[0].sm,
            settings.precision,
            model_repository=settings.local.model_repository,
            cache=settings.storage.plan_folder,
            model=settings.local.model,
            tensorrt=tensorrt,
            public_key=key,
        )
    except PlanRefused as exc:
        return Check("plans", "problem", *fact_and_fix(exc))
    except Missing as exc:
        return Check("plans", "problem" if wanted else "absent", *fact_and_fix(exc))
    return Check("plans", "ok", f"{plan.path} for SM {gpus[0].sm}")


def check_store(settings: EmbeddingConfig) -> Check:
    """The plan store answers, when one is configured; the cache folder may be written."""
    storage = settings.storage
    cache = storage.cache.expanduser()
    if not _may_write(cache):
        return Check(
            "store", "problem", f"the plan cache {cache} may not be written", "set storage.cache to another folder"
        )
    if storage.type == "local":
        return Check("store", "ok", f"local only, cache {cache}")
    from arcface_build.store import open_store

    url = f"s3://{storage.bucket}/{storage.prefix}"
    options = {
        "endpoint_url": storage.endpoint,
        "region": storage.region,
        "path_style": storage.path_style,
        "max_attempts": 1,  # a doctor answers soon
        "read_timeout_s": min(storage.timeout_s, 5.0),
    }
    try:
        plans = open_store(url, **options).stored()
    except ArcFaceError as exc:
        fact, fix = fact_and_fix(exc)
        return Check("store", "problem", fact, fix or "check storage.* and the AWS variables")
    return Check("store", "ok", f"{url} answers, {len(plans)} objects, cache {cache}")


def _may_write(folder: Path) -> bool:
    """Whether the folder, or the nearest one above that exists, may be written by this user."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK)
