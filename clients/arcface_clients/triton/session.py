"""Every exchange of a client with its server: connecting, embedding, trying again, leaving; as steps without I/O."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arcface_clients.arrays import Array, FloatArray
from arcface_clients.contract import FACE_SHAPE
from arcface_clients.errors import ContractMismatch, ModelNotReady, ServerUnreachable, SharedMemoryLost
from arcface_clients.faces.check import Faces
from arcface_clients.faces.gpu_arrays import GpuFaces
from arcface_clients.triton.memory.regions import Regions
from arcface_clients.triton.memory.system import Slot
from arcface_clients.triton.options import ClientOptions
from arcface_clients.triton.sansio import CONTROL_TIMEOUT_S, Steps, backoff_s
from arcface_clients.triton.served import ServedModel, checked_rows, next_step, served_model

MAX_ENSEMBLE_DEPTH = 8
RECHECK_AFTER_S = 1.0  # a server that was not asked for longer may have been restarted with another model


@dataclass
class InferRequest:
    """Faces in a slot of shared memory, or packed for the wire."""

    count: int
    body: Any = None
    slot: Slot | None = None


class Session:
    """What is known of one model on one server, and the exchanges with it."""

    def __init__(self, options: ClientOptions) -> None:
        """Nothing is sent yet."""
        self.options = options
        self.address = options.address
        self.served: ServedModel | None = None
        self.embedding_dim = 0
        self.regions = Regions(options)
        self._last_answer_s = -float("inf")

    def connect(self) -> Steps[ServedModel]:
        """Read the model's configuration down its ensembles and check its contract (unchanged, when it was known).

        Raises:
            ServerUnreachable, ModelNotReady, DeadlineExceeded: it cannot answer.
            ConfigError: the model does not follow the tensor contract, or shared memory is demanded and impossible.
            ContractMismatch: its contract is not the expected one, or has changed since the first connection.
        """
        configs: list[dict[str, Any]] = []
        name: str | None = self.options.model
        while name and len(configs) < MAX_ENSEMBLE_DEPTH:
            configs.append((yield "model_config", name, min(self.options.timeout_s, CONTROL_TIMEOUT_S)))
            name = next_step(configs[-1])
        served = served_model(self.options.model, configs)
        self._check_contract(served)
        if not self.embedding_dim:
            self.embedding_dim = served.embedding_dim or (yield from self._probe_width())
        self.regions.resize(served, self.embedding_dim)
        if self.served is None:
            yield from self.regions.choose()
        else:
            yield from self.regions.reconnected()
        self.served = served
        self._last_answer_s = time.monotonic()
        return served

    def welcome(self, parts: Sequence[Faces]) -> Steps[None]:
        """To be done before these faces are prepared: the first ones on a GPU decide how all of them go."""
        first = parts[0]
        if isinstance(first, GpuFaces) and self.regions.chosen_for_gpu is None:
            served = self.served or (yield from self.connect())
            yield from self.regions.choose_for_gpu(served, first.device)

    def prepare(self, parts: Sequence[Faces], pack: Callable[[str, Sequence[Array]], Any]) -> InferRequest:
        """A request for these faces, which are copied: their memory may be changed afterwards. No I/O.

        All parts are in host memory, or all on one GPU.
        """
        count = sum(len(part) for part in parts)
        first = parts[0]
        slot = self.regions.slot_on_gpu(parts, first.device) if isinstance(first, GpuFaces) else None
        if slot is None:
            on_host = [part.to_host() if isinstance(part, GpuFaces) else part for part in parts]
            slot = self.regions.slot_for(on_host)
            if slot is None:
                return InferRequest(count, body=pack(self.options.model, on_host))
        return InferRequest(count, slot=slot)

    def drop(self, request: InferRequest) -> None:
        """Take back a request that is done with, or was never sent; twice does no harm."""
        slot, request.slot = request.slot, None
        if slot:
            self.regions.pool.give(slot)

    def embed(self, request: InferRequest, retry_for_s: float | None = None) -> Steps[FloatArray]:
        """Embeddings float32 (count,D) of a request. A lost server or model is tried again for `retry_for_s`.

        Embedding the same faces twice does no harm, so every lost request may be sent again; a missed deadline is not
        (the server is overloaded, and would be more so), neither is an answer that is an error.
        """
        give_up_s = time.monotonic() + (self.options.retry_for_s if retry_for_s is None else retry_for_s)
        check_again = time.monotonic() - self._last_answer_s > RECHECK_AFTER_S
        attempt = 0
        try:
            while True:
                try:
                    if check_again:
                        yield from self.connect()
                    rows = yield from self._infer(request)
                    self._last_answer_s = time.monotonic()
                    return checked_rows(rows, (request.count, self.embedding_dim), self._who)
                except (ServerUnreachable, ModelNotReady, SharedMemoryLost):
                    self.regions.server_lost()
                    wait_s = backoff_s(attempt)
                    if time.monotonic() + wait_s > give_up_s:
                        raise
                yield "sleep", wait_s
                yield from self._move(request)
                check_again, attempt = True, attempt + 1
        finally:
            self.drop(request)

    def _infer(self, request: InferRequest) -> Steps[Array]:
        if request.slot is not None:
            return (yield from self.regions.infer(request.slot, request.count))
        rows: Array = yield "infer", self.options.model, request.body, self.options.timeout_s
        return rows

    def _move(self, request: InferRequest) -> Steps[None]:
        """Take a request out of a slot that became doubtful, before it is sent again."""
        if request.slot is None or not request.slot.doubtful:
            return
        parts = [request.slot.faces(request.count)]
        request.slot = self.regions.slot_for(parts)
        if request.slot is None:
            request.body = yield "pack", self.options.model, parts

    def _probe_width(self) -> Steps[int]:
        """The width of a model whose configuration leaves it open: embed one black face and look."""
        body = yield "pack", self.options.model, [np.zeros((1, *FACE_SHAPE), np.uint8)]
        rows: Array = yield "infer", self.options.model, body, self.options.timeout_s
        return rows.shape[-1]

    @property
    def _who(self) -> str:
        return f"{self.options.model!r} at {self.address}"

    def _check_contract(self, served: ServedModel) -> None:
        before = self.served.contract_id if self.served else None
        for known, since in ((self.options.expected_contract, "expected_contract"), (before, "the first answer")):
            if known is not None and served.contract_id != known:
                raise ContractMismatch(
                    f"{self._who} serves contract {_short(served.contract_id)}, but {since} is {_short(known)}. "
                    "Embeddings of two contracts cannot be compared: serve the model of "
                    f"{_short(known)}, or enrol every person again with the new one"
                )


def _short(contract: str | None) -> str:
    return "none (started without the import's overlay)" if contract is None else contract[:12]
