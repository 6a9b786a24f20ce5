"""Before a server starts: weights where there are none, then the backend, its variant, and the models for photos."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec

from arcface_build.plans.gpu import gpu_sm
from arcface_build.repository.bring_in import bring_in
from arcface_build.repository.calibration import told_of
from arcface_build.repository.detector import photo_models
from arcface_build.repository.mend import faults, mend
from arcface_build.repository.versions import check_served, served_manifest, versions
from arcface_build.serving.binary import TritonBinary, find_tritonserver
from arcface_build.serving.choose import (
    LEAF_OF,
    BackendChoice,
    choose_backend,
    order_of_backends,
    refuse_unheeded_precision,
)
from arcface_build.serving.limits import few_open_files, little_memory, need_shared_memory
from arcface_build.serving.request import Audience, ServeRequest
from arcface_build.serving.served_plans import served_plans, tensorrt_of_server
from arcface_build.serving.server_runtimes import ServerRuntimes, runtimes_of_server
from arcface_build.serving.variant import check_installed, take_best_variant
from arcface_build.variants.choose import Wanted
from arcface_clients.config.schema import EmbeddingConfig
from arcface_clients.errors import GateFailed, Missing
from arcface_clients.extras import require


@dataclass(frozen=True)
class Prepared:
    """What a server is started from.

    Attributes:
        binary: the tritonserver.
        choice: the backend, and why.
        backends: what is tried in turn, the choice first.
        with_reference: whether InsightFace is loaded beside it, to be compared with.
        photos: the models for photos.
        limits: largest drift by precision.
        runtimes: those of the server on this CPU; asked once.
    """

    binary: TritonBinary
    choice: BackendChoice
    backends: tuple[str, ...]
    with_reference: bool
    photos: tuple[str, ...]
    limits: Mapping[str, float]
    runtimes: Callable[[], ServerRuntimes]


def prepare(asked: ServeRequest, config: EmbeddingConfig, audience: Audience) -> Prepared:
    """Choose what is served, and install what that needs.

    Raises:
        Missing: weights, or a program, are not there.
        PlanRefused: the plan that was asked for may not be used.
        WrongUse: a precision that what is served cannot heed.
        GateFailed: one that was asked for by name, and may not be served here.
    """
    repository, limits = asked.repository, config.comparison.max_drift.model_dump()
    binary = find_tritonserver()  # before any work
    runtimes = cache(partial(runtimes_of_server, binary, audience.warned))
    _mend(asked, audience)
    _import_demo(asked, config, limits, audience)
    choice, has_reference = _choose(asked, config)
    with_reference = has_reference and _is_compared(asked, config, choice, audience)
    if binary.backend_directory is not None or with_reference or choice.backend == "reference":
        need_shared_memory()
    for lacking in filter(None, (few_open_files(), little_memory())):
        audience.warned(lacking)
    audience.chosen(f"tritonserver {binary.origin}")
    audience.chosen(f"backend {choice.backend}: {choice.reason}")
    # Tuned for the installed weights: another variant would take the tuned settings away.
    if choice.backend == "onnx" and asked.variant != "installed" and asked.backend != "tuned" and gpu_sm() is None:
        precision = None if asked.variant == "auto" else asked.variant
        wanted = Wanted(config.goal, precision, asked.remeasure)
        try:
            taken = take_best_variant(
                repository, asked.models_dir, config.versions_kept, limits, runtimes, wanted, audience.notice
            )
            audience.chosen(f"variant {taken}")
        except GateFailed as exc:
            if precision is not None:
                raise
            audience.warned(f"variant as installed: {exc}")  # it is judged when it has started, and may be replaced
    photos, told = photo_models(repository)
    audience.chosen(told)
    if photos:
        contract_id = (served_manifest(repository, LEAF_OF[choice.backend]) or {}).get("contract_id")
        audience.chosen(told_of(repository, contract_id))
    there = {"onnx": bool(versions(repository / "arcface_onnx")), "reference": with_reference}
    backends = order_of_backends(
        choice.backend, config.fallback, {name for name, is_there in there.items() if is_there}
    )
    return Prepared(
        binary=binary,
        choice=choice,
        backends=(choice.backend,) if asked.once else tuple(backends),
        with_reference=with_reference,
        photos=tuple(photos),
        limits=limits,
        runtimes=runtimes,
    )


def check_weights_of(asked: ServeRequest, ready: Prepared, backend: str) -> None:
    """Refuse a backend whose weights are not what was installed, or may not run here.

    Raises:
        GateFailed: they were changed since, or refused by a later look.
        Missing: their manifest cannot be read, or the variant passed its gate in no runtime of this host.
    """
    check_served(asked.repository, LEAF_OF[backend])
    if backend == "onnx":
        check_installed(served_manifest(asked.repository) or {}, ready.runtimes, ready.limits, asked.models_dir)


def _mend(asked: ServeRequest, audience: Audience) -> None:
    """Put right what a killed command left, or say what it left."""
    if os.access(asked.repository, os.W_OK):
        for fault in mend(asked.repository):
            audience.warned(f"mended: {fault}")
    else:
        for fault in faults(asked.repository):
            audience.warned(f"{fault}; mend it where it may be written: arcface serve --once")


def _import_demo(asked: ServeRequest, config: EmbeddingConfig, limits: Mapping[str, float], audience: Audience) -> None:
    """Weights for trying, where there are none and they are wanted."""
    repository = asked.repository
    if not asked.demo or versions(repository / "arcface_onnx") or versions(repository / "arcface_trt"):
        return
    require("onnx", "onnxruntime", purpose="importing the demo network")
    audience.notice("no weights in model_repository/: importing the demo network (NOT for recognition)")
    with audience.importing() as progress:
        options = {"cache": config.storage.cache, "say": audience.notice, "progress": progress}
        bring_in("demo", asked.models_dir, repository, config.versions_kept, limits, **options)


def _choose(asked: ServeRequest, config: EmbeddingConfig) -> tuple[BackendChoice, bool]:
    """The backend, and whether InsightFace can be served."""
    repository, backend = asked.repository, asked.backend
    has_reference = bool(versions(repository / "arcface_reference")) and find_spec("insightface") is not None
    if backend == "tuned":
        if not (repository / "arcface_onnx" / "configs" / "tuned.pbtxt").is_file():
            raise Missing("arcface_onnx has no configs/tuned.pbtxt for the weights that it serves. Next: arcface tune")
        backend = "onnx"
    plans, sm = served_plans(repository, config.storage.public_key, tensorrt_of_server()), gpu_sm()
    choice = choose_backend(backend, sm, plans, bool(versions(repository / "arcface_onnx")), has_reference)
    refuse_unheeded_precision(asked.variant, asked.backend, choice, sm)
    return choice, has_reference


def _is_compared(asked: ServeRequest, config: EmbeddingConfig, choice: BackendChoice, audience: Audience) -> bool:
    """Whether the choice is compared with InsightFace, which can be served: it is wanted, and is what was installed."""
    if not asked.reference or not config.validation.run_on_startup or choice.backend == "reference":
        return False
    try:
        check_served(asked.repository, LEAF_OF["reference"])
    except (GateFailed, Missing) as exc:  # what it would be compared with is not needed to serve
        audience.failed(str(exc), f"{choice.backend} without the reference")
        return False
    return True
