"""Serving from beginning to end: weights, backend choice, a real tritonserver, proof by a few faces, then serving.

What is said on the way goes to an audience; nothing here knows a terminal.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy.typing as npt

from arcface_build.errors import ServerFailed
from arcface_build.plans.gpu import gpu_sm
from arcface_build.repository.bring_in import bring_in
from arcface_build.repository.calibration import told_of
from arcface_build.repository.detector import photo_models
from arcface_build.repository.mend import faults, mend
from arcface_build.repository.versions import check_served, served_manifest, serves_demo, versions
from arcface_build.serving.binary import find_tritonserver
from arcface_build.serving.choose import BackendChoice, choose_backend, order_of_backends
from arcface_build.serving.exposure import Exposure, refuse_overrides
from arcface_build.serving.limits import few_open_files, need_shared_memory
from arcface_build.serving.ports import Ports
from arcface_build.serving.process import EXIT_TIMEOUT_S, LATENCY_QUANTILES, TritonProcess
from arcface_build.serving.served_plans import served_plans, tensorrt_of_server
from arcface_build.serving.server_runtimes import runtimes_of_server
from arcface_build.serving.variant import take_best_variant
from arcface_build.serving.watch import RESTARTS, RESTARTS_WITHIN_S, Restarts, Signs, watch
from arcface_build.variants.choose import Wanted
from arcface_clients.checks.parity import ParityReport, measure_parity
from arcface_clients.config.schema import EmbeddingConfig
from arcface_clients.errors import ArcFaceError, GateFailed, Missing
from arcface_clients.extras import require

LEAF_OF = {"tensorrt": "arcface_trt", "onnx": "arcface_onnx", "reference": "arcface_reference"}


@dataclass(frozen=True)
class ServeRequest:
    """What to serve and where; the options of `arcface serve`."""

    repository: Path
    models_dir: Path
    faces_bgr_u8: npt.NDArray[Any]  # uint8 (N,112,112,3), N ≥ 1: what a server is proved with
    backend: str = "auto"
    variant: str = "auto"  # auto: the fastest; installed: what is there; or a precision
    remeasure: bool = False
    exposure: Exposure = field(default_factory=Exposure)
    ports: Ports = field(default_factory=Ports)
    demo: bool = True
    reference: bool = True
    once: bool = False
    ready_timeout_s: float = 300.0
    exit_timeout_s: float = EXIT_TIMEOUT_S
    extra: Sequence[str] = ()  # further arguments for tritonserver


class Audience(Protocol):
    """Who is told what happens."""

    def notice(self, text: str) -> None:
        """Something that need not be known."""

    def warned(self, text: str) -> None:
        """Something that whoever serves has to know."""

    def chosen(self, line: str) -> None:
        """What will serve, and why; a line."""

    def proved(self, server: TritonProcess, choice: BackendChoice, report: ParityReport, with_reference: bool) -> None:
        """Every loaded backend beside the reference."""

    def failed(self, why: str, instead: str | None) -> None:
        """A backend did not load, or did not pass its gate; `instead` is tried next, None: nothing is left."""

    def serving(self, server: TritonProcess) -> None:
        """From now on it serves, until it is interrupted."""

    def importing(self) -> AbstractContextManager[Callable[[str, int, int], None]]:
        """Entered for an import; gives where its progress is told: (phase, done, total)."""


class Interrupt:
    """A signal handler that raises KeyboardInterrupt, and remembers it.

    Python drops what is raised while it runs a finaliser (`__del__`): one SIGTERM in some thousand would be lost.
    """

    def __init__(self) -> None:
        """No signal yet."""
        self.came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Called by Python between two instructions of the main thread."""
        self.came = True
        raise KeyboardInterrupt


def serve(asked: ServeRequest, config: EmbeddingConfig, audience: Audience, interrupt: Interrupt) -> bool:
    """Serve until interrupted (with `once` until proved); returns whether the gates were passed.

    A backend that does not load or fails its gate is stopped, and the next of `fallback.chain` is served. A server that
    ends or hangs is started again, as if for the first time: whatever is in the repository by then is proved anew.

    Raises:
        Missing: weights, a program or a port is not there, or the server ended by itself too often.
        GateFailed: no backend passed.
    """
    refuse_overrides(asked.extra)
    asked.ports.check_free(asked.exposure.hosts())  # before any work
    for concern in asked.exposure.concerns():
        audience.warned(concern)
    restarts = Restarts()
    try:
        while True:
            try:
                if restarts.served:
                    asked = replace(asked, exposure=_renewed(asked.exposure))
                return _serve(asked, config, audience, interrupt, restarts)
            except ServerFailed as exc:
                if not restarts.served:
                    raise
                pause_s = restarts.pause_s()
                if pause_s is None:
                    raise ServerFailed(f"given up after {RESTARTS} restarts in {RESTARTS_WITHIN_S:g} s: {exc}") from exc
                audience.warned(f"RESTART in {pause_s:g} s: {exc}")
                time.sleep(pause_s)
    except KeyboardInterrupt:
        if restarts.served:  # it is how one ends it
            return True
        raise


def _renewed(exposure: Exposure) -> Exposure:
    """With the certificates that are there now; between the files of a renewal it is worth another try.

    Raises:
        ServerFailed: they cannot be used.
    """
    try:
        return exposure.renewed()
    except ArcFaceError as exc:
        raise ServerFailed(f"it cannot be encrypted: {exc}") from exc


def _serve(
    asked: ServeRequest, config: EmbeddingConfig, audience: Audience, interrupt: Interrupt, restarts: Restarts
) -> bool:
    """One life of the server, from the choice of its backend to its end."""
    limits = config.comparison.max_drift.model_dump()
    binary = find_tritonserver()  # before any work
    choice, with_reference = _prepare(asked, config, limits, audience)
    if binary.backend_directory is not None or with_reference or choice.backend == "reference":
        need_shared_memory()
    if few := few_open_files():
        audience.warned(few)
    audience.chosen(f"tritonserver {binary.origin}")
    audience.chosen(f"backend {choice.backend}: {choice.reason}")
    # Tuned for the installed weights: another variant would take the tuned settings away.
    if choice.backend == "onnx" and asked.variant != "installed" and asked.backend != "tuned" and gpu_sm() is None:
        taken = take_best_variant(
            asked.repository,
            asked.models_dir,
            config.versions_kept,
            limits,
            lambda: runtimes_of_server(binary),
            Wanted(
                config.goal,
                None if asked.variant == "auto" else asked.variant,
                asked.remeasure and not restarts.served,
            ),
            audience.notice,
        )
        audience.chosen(f"variant {taken}")
    photos, told = photo_models(asked.repository)
    audience.chosen(told)
    if photos:
        contract_id = (served_manifest(asked.repository, LEAF_OF[choice.backend]) or {}).get("contract_id")
        audience.chosen(told_of(asked.repository, contract_id))
    instead_of_it = {"onnx": bool(versions(asked.repository / "arcface_onnx")), "reference": with_reference}
    backends = order_of_backends(choice.backend, config.fallback, {k for k, there in instead_of_it.items() if there})
    if asked.once:
        backends = [choice.backend]
    for position, name in enumerate(backends):
        server = TritonProcess(
            binary,
            asked.repository,
            ["arcface", *["arcface_parity"] * (with_reference and name != "reference"), *photos],
            config_name="tuned" if asked.backend == "tuned" and name == "onnx" else name,
            ports=asked.ports,
            exposure=asked.exposure,
            log_path=log_path(asked.repository, asked.ports.http),
            extra=(LATENCY_QUANTILES, *asked.extra),
            exit_timeout_s=asked.exit_timeout_s,
        )
        instead = next(iter(backends[position + 1 :]), None)
        try:
            check_served(asked.repository, LEAF_OF[name])
        except GateFailed as exc:
            if instead is None:
                raise
            audience.failed(str(exc), instead)
            continue
        with server:
            try:
                server.wait_ready(asked.ready_timeout_s)
            except ServerFailed as exc:
                if photos and "photo_" in str(exc):  # faces do not depend on photos
                    photos = []
                    backends.insert(position + 1, name)
                    audience.failed(str(exc), f"{name} without photos")
                    continue
                if instead is None:
                    raise
                audience.failed(str(exc), instead)
                continue
            report = measure_parity(server.own_url, asked.faces_bgr_u8, limits=limits)
            audience.proved(server, BackendChoice(name, choice.reason), report, with_reference)
            if serves_demo(asked.repository, LEAF_OF[name]):
                audience.warned("DEMO WEIGHTS: random numbers that recognise nobody. Next: arcface import YOUR.onnx")
            if asked.once:
                return report.passed
            if report.passed or name == "reference":
                contract_id = (served_manifest(asked.repository, LEAF_OF[name]) or {}).get("contract_id")
                if restarts.served and contract_id != restarts.contract_id:
                    audience.warned(
                        f"OTHER WEIGHTS than before: contract {contract_id}, it was {restarts.contract_id}. "
                        "Connected clients end with ContractMismatch. Next: arcface rollback, or new galleries"
                    )
                restarts.served, restarts.contract_id = True, contract_id
                audience.serving(server)
                served = next(row for row in report.rows if row.model == "arcface")
                models = [LEAF_OF[name], *photos]
                with closing(Signs(server, models, asked.faces_bgr_u8[:1], served.faces_per_s)) as signs:
                    try:
                        watch(server, signs, interrupt)
                    except ServerFailed:
                        server.kill()  # one that hangs would not finish its requests either
                        raise
            failed = "; ".join(f"{row.model} {row.gate}" for row in report.rows if not row.passed)
            audience.failed(f"VALIDATION FAILED: {failed}", instead)
    raise GateFailed(
        "no backend passed its gate, nothing is served. See which faces: arcface compare; go back: arcface rollback"
    )


def log_path(repository: Path, http_port: int) -> Path:
    """Where tritonserver's output goes; each port its own, so that two servers of one repository keep theirs."""
    folder = repository.parent / ".cache"
    name = f"tritonserver-{http_port}.log"
    if os.access(folder if folder.is_dir() else repository.parent, os.W_OK):
        return folder / name
    return Path(tempfile.gettempdir()) / f"arcface-{os.getuid()}" / name


def _prepare(
    asked: ServeRequest, config: EmbeddingConfig, limits: Mapping[str, float], audience: Audience
) -> tuple[BackendChoice, bool]:
    """Weights where there are none, then the backend choice and whether InsightFace is loaded beside it."""
    repository, backend = asked.repository, asked.backend
    if os.access(repository, os.W_OK):
        for fault in mend(repository):
            audience.warned(f"mended: {fault}")
    else:
        for fault in faults(repository):
            audience.warned(f"{fault}; mend it where it may be written: arcface serve --once")
    if asked.demo and not versions(repository / "arcface_onnx") and not versions(repository / "arcface_trt"):
        require("onnx", "onnxruntime", purpose="importing the demo network")
        audience.notice("no weights in model_repository/: importing the demo network (NOT for recognition)")
        with audience.importing() as progress:
            options = {"cache": config.storage.cache, "say": audience.notice, "progress": progress}
            bring_in("demo", asked.models_dir, repository, config.versions_kept, limits, **options)
    has_reference = bool(versions(repository / "arcface_reference")) and find_spec("insightface") is not None
    if backend == "tuned":
        if not (repository / "arcface_onnx" / "configs" / "tuned.pbtxt").is_file():
            raise Missing("arcface_onnx has no configs/tuned.pbtxt for the weights that it serves. Next: arcface tune")
        backend = "onnx"
    plans = served_plans(repository, config.storage.public_key, tensorrt_of_server())
    choice = choose_backend(backend, gpu_sm(), plans, bool(versions(repository / "arcface_onnx")), has_reference)
    wanted = asked.reference and config.validation.run_on_startup and has_reference and choice.backend != "reference"
    try:
        if wanted:
            check_served(repository, LEAF_OF["reference"])
    except (GateFailed, Missing) as exc:  # what it would be compared with is not needed to serve
        audience.failed(str(exc), f"{choice.backend} without the reference")
        wanted = False
    return choice, wanted
