"""Every exchange of an embedder with its server, as steps without I/O; faces in, checked embeddings out.

Connecting, checking, retrying, shared memory and their order are written once, for the plain and the asyncio client.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.contract import FACE_SHAPE, UNIT_TOLERANCE
from arcface_clients.errors import (
    ArcFaceError,
    ConfigError,
    ContractMismatch,
    CudaFailed,
    InferenceFailed,
    ModelNotReady,
    ServerUnreachable,
    SharedMemoryLost,
)
from arcface_clients.faces.check import Faces
from arcface_clients.faces.gpu_arrays import GpuFaces
from arcface_clients.triton.address import Address
from arcface_clients.triton.memory.reclaim import forget_lost, sweep
from arcface_clients.triton.memory.slots import SlotPool
from arcface_clients.triton.memory.system import Slot, is_local
from arcface_clients.triton.route import CONTROL_TIMEOUT_S, SharedMemory, Way
from arcface_clients.triton.sansio import Steps, backoff_s
from arcface_clients.triton.served import ServedModel, next_step, served_model

MAX_ENSEMBLE_DEPTH = 8
RECHECK_AFTER_S = 1.0  # a server that was not asked for longer may have been restarted with another model
MAX_DOUBTFUL = 16  # regions that late answers may still be written to; beyond, the wire is kinder to /dev/shm


_log = logging.getLogger(__name__)


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
        shared_memory: see `TritonEmbedder`.
    """

    def __init__(
        self,
        address: Address,
        model: str,
        *,
        timeout_s: float,
        retry_for_s: float,
        expected_contract: str | None,
        shared_memory: SharedMemory,
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
        self.way = Way(None, "not connected yet")
        self.gpu_way: Way | None = None  # for faces on a GPU, chosen when the first ones come
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
            yield from forget_lost(self.pool)
        self.served = served
        self._last_answer_s = time.monotonic()
        return served

    def undecided(self, parts: Sequence[Faces]) -> bool:
        """Whether `choose_gpu_way` has to be done before these faces are prepared."""
        return self.gpu_way is None and isinstance(parts[0], GpuFaces)

    def choose_gpu_way(self, device: int) -> Steps[None]:
        """How faces on a GPU go from now on: through regions on their GPU if it can be, else copied to the host first.

        Args:
            device: where the first of them are.
        """
        served = self.served or (yield from self.connect())
        if self.way.memory == "cuda":
            self.gpu_way = self.way
            return
        if self.shared_memory in (False, "system"):
            why_not = f"shared_memory is {self.shared_memory!r}"
        elif served.gpu is None:
            why_not = f"{served.leaf!r} runs on the server's CPU"
        else:
            why_not = yield from self._try_regions(served, device)
        if why_not:
            self.gpu_way = Way(self.way.memory, f"faces on the GPU are copied to the host first: {why_not}")
        else:
            self.gpu_way = Way("cuda", _opened_on(device))

    def prepare(self, parts: Sequence[Faces], pack: Callable[..., Any]) -> Job:
        """A request for these faces, which are copied: their memory may be changed afterwards. No I/O.

        All parts are in host memory, or all on one GPU.
        """
        count = sum(len(part) for part in parts)
        device = parts[0].device if isinstance(parts[0], GpuFaces) else None
        slot = None
        if device is not None and self.gpu_way and self.gpu_way.memory == "cuda":
            slot = self._filled_slot(parts, device)
        if slot is None:
            parts = [part.to_host() if isinstance(part, GpuFaces) else part for part in parts]
            slot = self._slot_of_way(parts)
        return Job(count, slot=slot) if slot else Job(count, body=pack(self.model, parts))

    def drop(self, job: Job) -> None:
        """Take back a job that is done with, or was never begun; twice does no harm."""
        slot, job.slot = job.slot, None
        if slot:
            self.pool.give(slot)

    def embed(self, job: Job, retry_for_s: float | None = None) -> Steps[Array]:
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
        for slot in self.pool.close():
            try:
                yield "unregister_shared", slot.name, CONTROL_TIMEOUT_S
            except ArcFaceError:
                return  # the next client of that server removes them; GPU memory goes with this process
            slot.registered_with = None
            slot.close()

    def _infer(self, job: Job) -> Steps[Array]:
        slot = job.slot
        if slot is None:
            return (yield "infer", self.model, job.body, self.timeout_s)
        life = self._server_life
        if slot.registered_with is not life:
            try:
                yield "register_shared", slot, CONTROL_TIMEOUT_S
            except InferenceFailed as exc:
                # it could before; whatever changed, the faces are still in the slot and go over the wire
                self._lose(slot.memory, f"the server cannot open our region any more: {exc}")
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

    def _slot_of_way(self, parts: Sequence[Array]) -> Slot | None:
        """A slot with these faces, which are in host memory, in it; None when they have to go over the wire."""
        if self.way.memory is None or self.served is None:
            return None
        return self._filled_slot(parts, (self.served.gpu or 0) if self.way.memory == "cuda" else None)

    def _filled_slot(self, parts: Sequence[Faces], device: int | None) -> Slot | None:
        """A slot on this GPU (None: in system memory) with these faces in it; None when no more can be made."""
        try:
            slot = self.pool.take(self.served.max_batch_size, self.embedding_dim, device)
        except OSError as exc:
            where = "shared memory" if device is None else f"memory on GPU {device}"
            self._lose("system" if device is None else "cuda", f"no more room in {where} ({exc.strerror or exc})")
            return None
        try:
            slot.put(parts)
        except OSError:  # the GPU is lost to this process
            self.pool.discard(slot)
            raise
        return slot

    def _move(self, job: Job) -> Steps[None]:
        """Take a job out of a slot that became doubtful, before it is sent again."""
        if job.slot is None or not job.slot.doubtful:
            return
        parts = [job.slot.faces(job.count)]
        job.slot = self._slot_of_way(parts)
        if job.slot is None:
            job.body = yield "pack", self.model, parts

    def _doubt(self, slot: Slot) -> None:
        """The server may still be at work on this slot, late or twice: it must never hold another request."""
        with self._lock:
            slot.doubtful = True
            if self.pool.doubtful >= MAX_DOUBTFUL:
                why = f"{MAX_DOUBTFUL} requests were lost, whose shared memory may still be written to"
                self._lose("system", why)
                self._lose("cuda", why)

    def _lose(self, memory: str, reason: str) -> None:
        """Go over the wire from now on, where it was this kind of shared memory."""
        if self.way.memory == memory:
            self.way = Way(None, reason)
        if self.gpu_way and self.gpu_way.memory == memory == "cuda":
            self.gpu_way = Way(self.way.memory, f"faces on the GPU are copied to the host first: {reason}")

    def _choose_way(self, served: ServedModel) -> Steps[Way]:
        """Shared memory when the server can open a region of ours, which proves that it is on this host."""
        if self.shared_memory is False:
            return Way(None, "shared memory is switched off")
        no_cuda = ""
        if self.shared_memory == "cuda":
            device = served.gpu or 0
            why_not = yield from self._try_regions(served, device)
            if not why_not:
                return Way("cuda", _opened_on(device))
            no_cuda = f"; CUDA shared memory was asked for and is not possible: {why_not}"
        why_not = yield from self._try_regions(served, None)
        if why_not and self.shared_memory is True:
            raise ConfigError(f"shared memory was demanded and is not possible: {why_not}")
        if why_not:
            way = Way(None, why_not + no_cuda)
        else:
            way = Way("system", f"the server is on this host and opened a region of ours{no_cuda}")
        if no_cuda:
            _log.warning("%s: %s", self.address, way)
        return way

    def _try_regions(self, served: ServedModel, device: int | None) -> Steps[str]:
        """Have the server open a region on this GPU (None: in system memory); why it cannot, "" when it did."""
        if not is_local(self.address.host):
            return f"{self.address.host} is not this host"
        try:
            slot = self.pool.take(served.max_batch_size, self.embedding_dim, device)
        except OSError as exc:
            return f"no shared memory on this host ({exc})" if device is None else str(exc)
        life, why_not = self._server_life, ""
        try:
            yield "register_shared", slot, CONTROL_TIMEOUT_S
        except (InferenceFailed, ConfigError) as exc:
            self.pool.discard(slot)
            if device is None:
                return f"the server cannot open a region of ours, it may be in another container: {exc}"
            return (
                f"the server cannot open a region of ours on GPU {device}: {exc}. It needs that GPU under the same "
                "number, and in another container --pid=host"
            )
        slot.registered_with = life
        if device is not None:
            why_not = yield from self._try_a_face(slot)
        self.pool.give(slot)
        yield from sweep(slot.memory)
        return why_not

    def _try_a_face(self, slot: Slot) -> Steps[str]:
        """Embed one black face in a region on a GPU: that the server opened it does not say that its backend can."""
        try:
            slot.put([np.zeros((1, *FACE_SHAPE), np.uint8)])
            self._checked((yield from self._infer(Job(1, slot=slot))), 1)
        except (InferenceFailed, CudaFailed) as exc:
            return f"one face through GPU {slot.device} did not come back: {exc}"
        return ""

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

    def _checked(self, rows: Array, count: int) -> Array:
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


def _opened_on(device: int) -> str:
    return f"the server opened a region of ours on GPU {device}, and embedded a face in it"


def _short(contract: str | None) -> str:
    return "none (started without the import's overlay)" if contract is None else contract[:12]
