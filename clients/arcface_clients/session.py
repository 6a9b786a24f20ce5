"""Every exchange of an embedder with its server, as steps without I/O; faces in, checked embeddings out.

Connecting, checking, retrying, shared memory and their order are written once, for the plain and the asyncio client.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arcface_clients.address import Address
from arcface_clients.contract import FACE_SHAPE
from arcface_clients.errors import (
    ArcFaceError,
    ConfigError,
    ContractMismatch,
    InferenceFailed,
    ModelNotReady,
    ServerUnreachable,
    SharedMemoryLost,
)
from arcface_clients.served_model import ServedModel, next_step, served_model
from arcface_clients.shared_memory import PREFIX, Slot, SlotPool, is_local, left_behind, stale, unlink
from arcface_clients.steps import Steps, backoff_s

MAX_ENSEMBLE_DEPTH = 8
RECHECK_AFTER_S = 1.0  # a server that was not asked for longer may have been restarted with another model
CONTROL_TIMEOUT_S = 10.0  # for everything but inference
UNIT_TOLERANCE = 1e-3  # on the squared norm: int8 and fp16 graphs normalise in float32 and stay well inside
MAX_DOUBTFUL = 16  # regions that late answers may still be written to; beyond, the wire is kinder to /dev/shm


@dataclass(frozen=True)
class Way:
    """How faces reach the server, and why so."""

    shared_memory: bool
    reason: str

    def __str__(self) -> str:
        """For a log line."""
        return f"{'system shared memory' if self.shared_memory else 'the wire'}: {self.reason}"


@dataclass
class Job:
    """One request: faces in a slot of shared memory, or packed for the wire."""

    count: int
    body: Any = None
    slot: Slot | None = None


class Session:
    """What is known of one model on one server, and the exchanges with it.

    Args:
        address: the server.
        model: the model asked for.
        timeout_s: deadline of one request.
        retry_for_s: how long a lost server is tried again.
        expected_contract: contract id that the model must have, None for any.
        shared_memory: None: when the server is on this host; False: never; True: it must be possible.
    """

    def __init__(
        self,
        address: Address,
        model: str,
        *,
        timeout_s: float,
        retry_for_s: float,
        expected_contract: str | None,
        shared_memory: bool | None,
    ) -> None:
        """Nothing is sent yet."""
        self.address = address
        self.model = model
        self.timeout_s = timeout_s
        self.retry_for_s = retry_for_s
        self.expected_contract = expected_contract
        self.shared_memory = shared_memory
        self.served: ServedModel | None = None
        self.embedding_dim = 0
        self.way = Way(False, "not connected yet")
        self.pool = SlotPool()
        self._server_life = object()  # a new one when the server may have been restarted: it then knows no regions
        self._last_answer_s = -float("inf")
        self._lock = threading.Lock()

    def connect(self) -> Steps[ServedModel]:
        """Read the model's configuration down its ensembles and check its contract (unchanged, when it was known).

        Raises:
            ServerUnreachable, ModelNotReady, DeadlineExceeded: it cannot answer.
            ConfigError: the model does not follow the tensor contract, or shared memory is demanded and impossible.
            ContractMismatch: its contract is not the expected one, or has changed since the first connection.
        """
        configs: list[dict[str, Any]] = []
        name: str | None = self.model
        while name and len(configs) < MAX_ENSEMBLE_DEPTH:
            configs.append((yield "model_config", name, min(self.timeout_s, CONTROL_TIMEOUT_S)))
            name = next_step(configs[-1])
        served = served_model(self.model, configs)
        self._check_contract(served)
        if not self.embedding_dim:
            self.embedding_dim = served.embedding_dim or (yield from self._probe_width())
        if self.served is None:
            self.way = yield from self._choose_way(served)
        elif self.pool.doubtful:
            yield from self._forget_lost_regions()
        self.served = served
        self._last_answer_s = time.monotonic()
        return served

    def prepare(self, parts: Sequence[np.ndarray], pack: Callable[..., Any]) -> Job:
        """A request for these faces, which are copied: their memory may be changed afterwards. No I/O."""
        count = sum(len(part) for part in parts)
        slot = self._filled_slot(parts)
        return Job(count, slot=slot) if slot else Job(count, body=pack(self.model, parts))

    def drop(self, job: Job) -> None:
        """Take back a job that is done with, or was never begun; twice does no harm."""
        slot, job.slot = job.slot, None
        if slot:
            self.pool.give(slot)

    def embed(self, job: Job, retry_for_s: float | None = None) -> Steps[np.ndarray]:
        """Embeddings float32 (count,D) of a prepared job. A lost server or model is tried again for `retry_for_s`.

        Embedding the same faces twice does no harm, so every lost request may be sent again; a missed deadline is not
        (the server is overloaded, and would be more so), neither is an answer that is an error.
        """
        give_up_s = time.monotonic() + (self.retry_for_s if retry_for_s is None else retry_for_s)
        check_again = time.monotonic() - self._last_answer_s > RECHECK_AFTER_S
        try:
            for attempt in itertools.count():
                try:
                    if check_again:
                        yield from self.connect()
                    rows = yield from self._infer(job)
                    self._last_answer_s = time.monotonic()
                    return self._checked(rows, job.count)
                except (ServerUnreachable, ModelNotReady, SharedMemoryLost):
                    self._server_life = object()
                    wait_s = backoff_s(attempt)
                    if time.monotonic() + wait_s > give_up_s:
                        raise
                yield "sleep", wait_s
                yield from self._move(job)
                check_again = True
        finally:
            self.drop(job)

    def detach(self) -> Steps[None]:
        """Unregister and unlink all regions; a server that does not answer any more is left alone."""
        for name in self.pool.close():
            try:
                yield "unregister_shared", name, CONTROL_TIMEOUT_S
            except ArcFaceError:
                return  # the next client of that server removes them

    def _infer(self, job: Job) -> Steps[np.ndarray]:
        slot = job.slot
        if slot is None:
            return (yield "infer", self.model, job.body, self.timeout_s)
        life = self._server_life
        if slot.registered_with is not life:
            try:
                yield "register_shared", slot, CONTROL_TIMEOUT_S
            except InferenceFailed as exc:
                # it could before; whatever changed, the faces are still in the slot and go over the wire
                self.way = Way(False, f"the server cannot open our region any more: {exc}")
                body = yield "pack", self.model, [slot.faces(job.count)]
                return (yield "infer", self.model, body, self.timeout_s)
            slot.registered_with = life
        try:
            yield "infer_shared", self.model, slot, job.count, self.timeout_s
        except InferenceFailed:
            raise  # answered, if badly: the server is done with the slot
        except BaseException:
            self._doubt(slot)
            raise
        return slot.rows(job.count)

    def _filled_slot(self, parts: Sequence[np.ndarray]) -> Slot | None:
        """A slot with these faces in it; None when they have to go over the wire."""
        if not self.way.shared_memory or self.served is None:
            return None
        try:
            slot = self.pool.take(self.served.max_batch_size, self.embedding_dim)
        except OSError as exc:
            self.way = Way(False, f"no more room in shared memory ({exc.strerror or exc})")
            return None
        slot.put(parts)
        return slot

    def _move(self, job: Job) -> Steps[None]:
        """Take a job out of a slot that became doubtful, before it is sent again."""
        if job.slot is None or not job.slot.doubtful:
            return
        parts = [job.slot.faces(job.count)]
        job.slot = self._filled_slot(parts)
        if job.slot is None:
            job.body = yield "pack", self.model, parts

    def _doubt(self, slot: Slot) -> None:
        """The server may still be at work on this slot, late or twice: it must never hold another request."""
        with self._lock:
            slot.doubtful = True
            if self.pool.doubtful >= MAX_DOUBTFUL:
                self.way = Way(False, f"{MAX_DOUBTFUL} requests were lost, whose shared memory may still be written to")

    def _choose_way(self, served: ServedModel) -> Steps[Way]:
        """Shared memory when the server can open a region of ours, which proves that it is on this host."""
        if self.shared_memory is False:
            return Way(False, "shared memory is switched off")
        slot, why_not = self._first_slot(served)
        if slot:
            life = self._server_life
            try:
                yield "register_shared", slot, CONTROL_TIMEOUT_S
            except (InferenceFailed, ConfigError) as exc:
                why_not = f"the server cannot open a region of ours, it may be in another container: {exc}"
            else:
                slot.registered_with = life
            self.pool.give(slot)
        if why_not and self.shared_memory:
            raise ConfigError(f"shared memory was demanded and is not possible: {why_not}")
        if why_not:
            self.pool.close()
            return Way(False, why_not)
        yield from self._sweep()
        return Way(True, "the server is on this host and opened a region of ours")

    def _first_slot(self, served: ServedModel) -> tuple[Slot | None, str]:
        if not is_local(self.address.host):
            return None, f"{self.address.host} is not this host"
        try:
            return self.pool.take(served.max_batch_size, self.embedding_dim), ""
        except OSError as exc:
            return None, f"no shared memory on this host ({exc})"

    def _forget_lost_regions(self) -> Steps[None]:
        try:
            self.pool.forget((yield "shared_regions", CONTROL_TIMEOUT_S))
        except (InferenceFailed, ConfigError):
            return  # the next client of this server removes them

    def _sweep(self) -> Steps[None]:
        """Unregister and remove what clients that died have left behind."""
        here = set(left_behind())
        try:
            known = yield "shared_regions", CONTROL_TIMEOUT_S
            for name in here.union(name for name in known if name.startswith(PREFIX)):
                if stale(name):
                    yield "unregister_shared", name, CONTROL_TIMEOUT_S
                    unlink(name)
        except ArcFaceError:
            return  # tidying up is a courtesy

    def _probe_width(self) -> Steps[int]:
        """The width of a model whose configuration leaves it open: embed one black face and look."""
        body = yield "pack", self.model, [np.zeros((1, *FACE_SHAPE), np.uint8)]
        rows = yield "infer", self.model, body, self.timeout_s
        return rows.shape[-1]

    def _check_contract(self, served: ServedModel) -> None:
        before = self.served.contract_id if self.served else None
        for known, since in ((self.expected_contract, "expected_contract"), (before, "the first answer")):
            if known is not None and served.contract_id != known:
                raise ContractMismatch(
                    f"{self.model!r} at {self.address} serves contract {_short(served.contract_id)}, but {since} is "
                    f"{_short(known)}. Embeddings of two contracts cannot be compared: serve the model of "
                    f"{_short(known)}, or enrol every person again with the new one"
                )

    def _checked(self, rows: np.ndarray, count: int) -> np.ndarray:
        if rows.shape != (count, self.embedding_dim):
            raise InferenceFailed(
                f"{self.model!r} at {self.address} answered {rows.shape} for {count} faces; expected ({count}, "
                f"{self.embedding_dim}). Was another model loaded? Make a new client"
            )
        squared = np.einsum("nd,nd->n", rows, rows)
        good = np.abs(squared - 1) <= UNIT_TOLERANCE  # NaN is not good either
        if not good.all():
            bad = np.flatnonzero(~good)
            raise InferenceFailed(
                f"{self.model!r} at {self.address} answered {bad.size} of {count} embeddings that are not of unit "
                f"length (row {bad[0]}: norm {np.sqrt(squared[bad[0]]):.4g}). Check the model: arcface parity"
            )
        return rows


def _short(contract: str | None) -> str:
    return "none (started without the import's overlay)" if contract is None else contract[:12]
