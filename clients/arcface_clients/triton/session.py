"""Every exchange of a client with its server: connecting, embedding, trying again, leaving; as steps without I/O."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt

from arcface_clients.arrays import Array
from arcface_clients.contract import (
    CONTRACT_OUTPUT,
    EMBEDDING_OUTPUT,
    FACE_SHAPE,
    NORM_OUTPUT,
    contract_prefix,
    contract_words,
)
from arcface_clients.errors import (
    BackendUnavailable,
    ContractMismatch,
    DeadlineExceeded,
    SharedMemoryLost,
    WrongUse,
)
from arcface_clients.faces.check import Faces
from arcface_clients.faces.gpu_arrays import GpuFaces
from arcface_clients.triton.answer import Answer, Tensors, checked_contract, checked_rows, other_contract
from arcface_clients.triton.memory.regions import Regions
from arcface_clients.triton.memory.system import Slot
from arcface_clients.triton.options import ClientOptions
from arcface_clients.triton.sansio import CONTROL_TIMEOUT_S, Steps, T, backoff_s, within
from arcface_clients.triton.served import ServedModel, next_step, served_model
from arcface_clients.triton.transports import refusals

MAX_ENSEMBLE_DEPTH = 8
RECHECK_AFTER_S = 1.0  # a server that was not asked for longer may have been restarted with another model
_log = logging.getLogger(__name__)


@dataclass
class InferRequest:
    """Faces in a slot of shared memory, or packed for the wire."""

    count: int
    outputs: tuple[str, ...]
    body: Any = None
    slot: Slot | None = None


class Exchanges:
    """What all exchanges with one model on one server have in common: its name in messages, and when they must end."""

    def __init__(self, options: ClientOptions) -> None:
        """Nothing is sent yet."""
        self.options = options
        self.address = options.address

    @property
    def who(self) -> str:
        """The model and its server, for messages."""
        return f"{self.options.model!r} at {self.address}"

    def deadline_s(self) -> float:
        """When a call that begins now has to be done, by the monotonic clock."""
        total_s = self.options.total_timeout_s
        return inf if total_s is None else time.monotonic() + total_s

    def in_time(self, steps: Steps[T], deadline_s: float) -> Steps[T]:
        """An exchange of this session that ends by then, with DeadlineExceeded if need be."""
        return within(steps, deadline_s, self._too_late) if deadline_s < inf else steps

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"{self.who} did not give all answers within total_timeout_s = {self.options.total_timeout_s:g} s. "
            "Raise it, or send fewer faces at once"
        )


class Session(Exchanges):
    """What is known of one model on one server, and the exchanges with it."""

    def __init__(self, options: ClientOptions) -> None:
        """Nothing is sent yet."""
        super().__init__(options)
        self.served: ServedModel | None = None
        self.embedding_dim = 0
        self.regions = Regions(options)
        self._last_answer_s = -inf
        self._contract_lock = threading.Lock()
        self._contract_row: npt.NDArray[np.int32] | None = None  # what each row has to name itself
        self._told = False  # the caller knows the contract: from its id, or from embeddings

    def connect(self) -> Steps[ServedModel]:
        """Read the model's configuration down its ensembles and check its contract (unchanged, when it was known).

        Raises:
            ServerUnreachable, ModelNotReady, DeadlineExceeded, InvalidAnswer: it cannot answer.
            ConfigError: the model does not follow the tensor contract, or shared memory is demanded and impossible.
            ContractMismatch: its contract is not the expected one, or has changed since the first connection.
        """
        configs: list[dict[str, Any]] = []
        name: str | None = self.options.model
        while name and len(configs) < MAX_ENSEMBLE_DEPTH:
            configs.append((yield "model_config", name, min(self.options.timeout_s, CONTROL_TIMEOUT_S)))
            with refusals.damage_is_no_answer(self.address, name):
                name = next_step(configs[-1])
        with refusals.damage_is_no_answer(self.address, self.options.model):
            served = served_model(self.options.model, configs)
        self._accept(served)
        if not self.embedding_dim:
            self.embedding_dim = served.embedding_dim or (yield from self._probe_width())
        self.regions.resize(served, self.embedding_dim)
        if self.served is None:
            yield from self.regions.choose()
            self._say(served)
        else:
            yield from self.regions.reconnected()
        self.served = served
        self._last_answer_s = time.monotonic()
        return served

    def tell(self, served: ServedModel) -> ServedModel:
        """`served`, which the caller sees from now on: rows of another contract will be an error."""
        self._told = True
        return served

    @property
    def contract_prefix(self) -> str | None:
        """The first 32 digits of the contract id that rows have to name themselves; None where they cannot."""
        return None if self._contract_row is None else contract_prefix(self._contract_row)

    def welcome(self, parts: Sequence[Faces]) -> Steps[None]:
        """To be done before these faces are prepared: the first ones on a GPU decide how all of them go."""
        first = parts[0]
        if isinstance(first, GpuFaces) and self.regions.chosen_for_gpu is None:
            served = self.served or (yield from self.connect())
            yield from self.regions.choose_for_gpu(served, first.device)

    def prepare(
        self, parts: Sequence[Faces], pack: Callable[[str, Sequence[Array], Sequence[str]], Any], norms: bool = False
    ) -> InferRequest:
        """A request for these faces, which are copied: their memory may be changed afterwards. No I/O.

        Args:
            parts: faces, all in host memory or all on one GPU.
            pack: the transport's.
            norms: ask for the lengths before normalisation as well.

        Raises:
            WrongUse: the model does not give them.
        """
        count, outputs = sum(len(part) for part in parts), self._outputs(norms)
        first = parts[0]
        slot = self.regions.slot_on_gpu(parts, first.device) if isinstance(first, GpuFaces) else None
        if slot is None:
            on_host = [part.to_host() if isinstance(part, GpuFaces) else part for part in parts]
            slot = self.regions.slot_for(on_host)
            if slot is None:
                return InferRequest(count, outputs, body=pack(self.options.model, on_host, outputs))
        return InferRequest(count, outputs, slot=slot)

    def drop(self, request: InferRequest) -> None:
        """Take back a request that is done with, or was never sent; twice does no harm."""
        slot, request.slot = request.slot, None
        if slot:
            self.regions.pool.give(slot)

    def embed(self, request: InferRequest, retry_for_s: float | None = None) -> Steps[Answer]:
        """The answer to a request. A server or model that is not there is asked again for `retry_for_s`.

        Embedding the same faces twice does no harm, so every lost request may be sent again; a missed deadline is not
        (the server is overloaded, and would be more so), neither is an answer that is an error.
        """
        give_up_s = time.monotonic() + (self.options.retry_for_s if retry_for_s is None else retry_for_s)
        check_again = time.monotonic() - self._last_answer_s > RECHECK_AFTER_S
        attempt, may_learn = 0, True
        try:
            while True:
                try:
                    if check_again:
                        yield from self.connect()
                    tensors = yield from self._infer(request)
                    self._last_answer_s = time.monotonic()
                    if self._is_ours(tensors, request, may_learn):
                        return checked_rows(tensors, (request.count, self.embedding_dim), self.who)
                    check_again, may_learn = True, False
                    continue
                except DeadlineExceeded:
                    raise
                except (BackendUnavailable, SharedMemoryLost):
                    self.regions.server_lost()
                    wait_s = backoff_s(attempt)
                    if time.monotonic() + wait_s > give_up_s:
                        raise
                yield "sleep", wait_s
                yield from self._move(request)
                check_again, attempt = True, attempt + 1
        finally:
            self.drop(request)

    def _infer(self, request: InferRequest) -> Steps[Tensors]:
        if request.slot is not None:
            return (yield from self.regions.infer(request.slot, request.count, request.outputs))
        tensors: Tensors = yield "infer", self.options.model, request.body, self.options.timeout_s
        return tensors

    def _outputs(self, norms: bool) -> tuple[str, ...]:
        """What a request asks for: the contract always, where the model names it."""
        has = self.served.outputs if self.served else ()
        if norms and NORM_OUTPUT not in has:
            raise WrongUse(
                f"{self.who} has no output `norm`: expected a model imported since it exists. Import it again: "
                "arcface import SOURCE"
            )
        return (EMBEDDING_OUTPUT, *[NORM_OUTPUT] * norms, *[CONTRACT_OUTPUT] * (CONTRACT_OUTPUT in has))

    def _is_ours(self, tensors: Tensors, request: InferRequest, may_learn: bool) -> bool:
        """Whether the rows are of this session's contract; False when it may still learn another one.

        Raises:
            ContractMismatch: they are not, and the caller knows of the former contract.
        """
        if CONTRACT_OUTPUT not in request.outputs:
            self._told = True
            return True
        row = checked_contract(tensors, request.count, self.who)
        with self._contract_lock:
            if self._contract_row is None:
                self._contract_row = row
            if np.array_equal(row, self._contract_row):
                self._told = True
                return True
            if self._told or self.options.expected_contract or not may_learn:
                raise other_contract(row, self._contract_row, self.who)
        return False

    def _move(self, request: InferRequest) -> Steps[None]:
        """Take a request out of a slot that became doubtful, before it is sent again."""
        if request.slot is None or not request.slot.doubtful:
            return
        parts = [request.slot.faces(request.count)]
        request.slot = self.regions.slot_for(parts)
        if request.slot is None:
            request.body = yield "pack", self.options.model, parts, request.outputs

    def _probe_width(self) -> Steps[int]:
        """The width of a model whose configuration leaves it open: embed one black face and look."""
        body = yield "pack", self.options.model, [np.zeros((1, *FACE_SHAPE), np.uint8)], (EMBEDDING_OUTPUT,)
        tensors: Tensors = yield "infer", self.options.model, body, self.options.timeout_s
        return int(tensors[EMBEDDING_OUTPUT].shape[1])

    def _accept(self, served: ServedModel) -> None:
        """Take over the contract of a model, or refuse the model.

        Raises:
            ContractMismatch: see `connect`.
        """
        with self._contract_lock:
            before = self.served if self._told else None
            expected = [(self.options.expected_contract, "expected_contract")]
            if before:
                expected.append((before.contract_id, "the first answer"))
            for known, since in expected:
                if known is not None and served.contract_id != known:
                    raise ContractMismatch(
                        f"{self.who} serves contract {_short(served.contract_id)}, but {since} is {_short(known)}. "
                        "Embeddings of two contracts cannot be compared: serve the model of "
                        f"{_short(known)}, or enrol every person again with the new one"
                    )
            if self.served and served.embedding_dim not in (None, self.embedding_dim):
                raise ContractMismatch(
                    f"{self.who} makes embeddings of width {served.embedding_dim} now; expected {self.embedding_dim}, "
                    "that of its first answer. Make a new client"
                )
            if before and CONTRACT_OUTPUT in before.outputs and CONTRACT_OUTPUT not in served.outputs:
                raise ContractMismatch(
                    f"{self.who} does not name its contract in its answers any more; expected "
                    f"{_short(before.contract_id)}. Serve the former model, or make a new client"
                )
            if not before and CONTRACT_OUTPUT in served.outputs:
                self._contract_row = _row(served.contract_id)

    def _say(self, served: ServedModel) -> None:
        """What the log should hold of the model, once a connection."""
        if CONTRACT_OUTPUT not in served.outputs:
            _log.info("%s does not name its contract in its answers: import it again to have each checked", self.who)
        if served.demo:
            _log.warning("%s runs DEMO weights: its embeddings recognise nobody. arcface import YOUR.onnx", self.who)


def _row(contract_id: str | None) -> npt.NDArray[np.int32] | None:
    """What rows of this contract name themselves; None where the first answer has to tell."""
    try:
        return contract_words(contract_id) if contract_id else None
    except ValueError:  # an id of someone else's making
        return None


def _short(contract: str | None) -> str:
    return "none (started without the import's overlay)" if contract is None else contract[:12]
