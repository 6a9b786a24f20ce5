"""Serving from beginning to end: a real tritonserver, proof by a few faces, then serving, and again after a crash."""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from arcface_build.errors import ServerFailed
from arcface_build.repository.versions import served_manifest, serves_demo
from arcface_build.serving.choose import LEAF_OF, BackendChoice
from arcface_build.serving.exposure import Exposure, refuse_overrides
from arcface_build.serving.prepare import Prepared, check_weights_of, prepare
from arcface_build.serving.process import LATENCY_QUANTILES, TritonProcess
from arcface_build.serving.reasons import KILLED, reason_of_end
from arcface_build.serving.request import Audience, ServeRequest
from arcface_build.serving.variant import short_of_memory
from arcface_build.serving.watch import RESTARTS, RESTARTS_WITHIN_S, Restarts, Signs, watch
from arcface_clients.checks.parity import ParityReport, measure_parity
from arcface_clients.config.schema import EmbeddingConfig
from arcface_clients.errors import ArcFaceError, BackendUnavailable, GateFailed, Missing, ModelNotReady


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
    ends or hangs, while it serves or while it is proved again, is started again: whatever is in the repository by then
    is proved anew, and no variant is chosen anew.

    Raises:
        Missing: weights, a program or a port is not there, or the server ended by itself too often.
        GateFailed: no backend passed.
        WrongUse: options that contradict each other.
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
                    asked = replace(asked, exposure=_renewed(asked.exposure), variant="installed")
                return _life(asked, config, audience, interrupt, restarts)
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


class _Declined(Exception):
    """A backend that is not served; caused by the error, or by its gate alone."""


def _life(
    asked: ServeRequest, config: EmbeddingConfig, audience: Audience, interrupt: Interrupt, restarts: Restarts
) -> bool:
    """One life of the server, from the choice of its backend to its end."""
    ready = prepare(asked, config, audience)
    backends = deque(ready.backends)
    while backends:
        backend = backends.popleft()
        try:
            return _serve_as(backend, asked, ready, audience, interrupt, restarts)
        except _Declined as exc:
            cause = exc.__cause__
            lesser = _without_what_failed(ready, backend, str(exc)) if isinstance(cause, ServerFailed) else None
            if lesser:
                ready, told = lesser
                backends.appendleft(backend)
                audience.failed(str(exc), f"{backend} {told}")
            elif cause is not None and not backends:
                raise cause from None
            else:
                audience.failed(str(exc), backends[0] if backends else None)
    raise GateFailed(
        "no backend passed its gate, nothing is served. See which faces: arcface compare; go back: arcface rollback"
    )


def _without_what_failed(ready: Prepared, backend: str, why: str) -> tuple[Prepared, str] | None:
    """What to serve without models that did not load and that embeddings do not depend on; None if they do."""
    if ready.photos and "photo_" in why:
        return replace(ready, photos=()), "without photos"
    if ready.with_reference and backend != "reference" and ("arcface_reference: " in why or KILLED in why):
        return replace(ready, with_reference=False), "without the reference"
    return None


def _serve_as(
    backend: str,
    asked: ServeRequest,
    ready: Prepared,
    audience: Audience,
    interrupt: Interrupt,
    restarts: Restarts,
) -> bool:
    """Start, prove and serve one backend; returns only with `once`: whether it passed its gate.

    Raises:
        _Declined: it may not be served, did not load, or did not pass its gate.
        ServerFailed: its server could not be started, ended or hung.
    """
    try:
        check_weights_of(asked, ready, backend)
    except (GateFailed, Missing) as exc:
        raise _Declined(str(exc)) from exc
    with _server(backend, asked, ready) as server:
        try:
            server.wait_ready(asked.ready_timeout_s)
        except ServerFailed as exc:
            short = short_of_memory(served_manifest(asked.repository) or {}) if "arcface_onnx: " in str(exc) else ""
            told = ServerFailed("; ".join(filter(None, (str(exc), short))))
            raise _Declined(str(told)) from told
        report = _prove(server, asked, ready)
        audience.proved(server, BackendChoice(backend, ready.choice.reason), report, ready.with_reference)
        if serves_demo(asked.repository, LEAF_OF[backend]):
            audience.warned("DEMO WEIGHTS: random numbers that recognise nobody. Next: arcface import YOUR.onnx")
        if asked.once:
            return report.passed
        if report.passed or backend == "reference":
            served = next(row for row in report.rows if row.model == "arcface")
            models = [LEAF_OF[backend], *ready.photos]
            # Before it is said that it serves: what is lost from then on is noticed.
            with closing(Signs(server, models, asked.faces_bgr_u8[:1], served.faces_per_s)) as signs:
                _note_contract(asked.repository, backend, audience, restarts)
                audience.serving(server)
                _watch(server, signs, interrupt)
    failed = "; ".join(f"{row.model} {row.gate}" for row in report.rows if not row.passed)
    raise _Declined(f"VALIDATION FAILED: {failed}")


def _server(backend: str, asked: ServeRequest, ready: Prepared) -> TritonProcess:
    """The server of a backend, not started yet."""
    compared = ready.with_reference and backend != "reference"
    return TritonProcess(
        ready.binary,
        asked.repository,
        ["arcface", *["arcface_parity"] * compared, *ready.photos],
        config_name="tuned" if asked.backend == "tuned" and backend == "onnx" else backend,
        ports=asked.ports,
        exposure=asked.exposure,
        log_path=log_path(asked.repository, asked.ports.http),
        extra=(LATENCY_QUANTILES, *asked.extra),
        exit_timeout_s=asked.exit_timeout_s,
    )


def _prove(server: TritonProcess, asked: ServeRequest, ready: Prepared) -> ParityReport:
    """Every loaded backend beside the reference.

    Raises:
        ServerFailed: the server ended or hangs meanwhile, as under a request that kills it and is sent again.
    """
    try:
        report = measure_parity(server.own_url, asked.faces_bgr_u8, limits=ready.limits)
        if "arcface" in report.skipped:
            raise ModelNotReady(report.skipped["arcface"])
    except BackendUnavailable as exc:
        status = server.wait(timeout_s=1.0)
        server.kill()
        ended = str(exc) if status is None else f"tritonserver ended by itself {reason_of_end(status, server.log_path)}"
        raise ServerFailed(f"it was not proved: {ended}") from exc
    return report


def _note_contract(repository: Path, backend: str, audience: Audience, restarts: Restarts) -> None:
    """It serves; after a restart say whether the weights are others."""
    contract_id = (served_manifest(repository, LEAF_OF[backend]) or {}).get("contract_id")
    if restarts.served and contract_id != restarts.contract_id:
        audience.warned(
            f"OTHER WEIGHTS than before: contract {contract_id}, it was {restarts.contract_id}. "
            "Connected clients end with ContractMismatch. Next: arcface rollback, or new galleries"
        )
    restarts.served, restarts.contract_id = True, contract_id


def _watch(server: TritonProcess, signs: Signs, interrupt: Interrupt) -> NoReturn:
    """Watch a server that serves, to its end.

    Raises:
        KeyboardInterrupt: interrupted.
        ServerFailed: it ended or hangs.
    """
    try:
        watch(server, signs, interrupt)
    except ServerFailed:
        server.kill()  # one that hangs would not finish its requests either
        raise


def log_path(repository: Path, http_port: int) -> Path:
    """Where tritonserver's output goes; each port its own, so that two servers of one repository keep theirs."""
    folder = repository.parent / ".cache"
    name = f"tritonserver-{http_port}.log"
    if os.access(folder if folder.is_dir() else repository.parent, os.W_OK):
        return folder / name
    return Path(tempfile.gettempdir()) / f"arcface-{os.getuid()}" / name
