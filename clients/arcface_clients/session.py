"""Every exchange of an embedder with its server, as steps without I/O: generators that yield what to do next.

A step is a tuple (transport method, arguments…). `run` does the steps on a transport and `arun` on an asyncio one, so
that connecting, checking, retrying and their order are written once.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Generator
from typing import Any, TypeVar

import numpy as np

from arcface_clients.contract import FACE_SHAPE
from arcface_clients.errors import ArcFaceError, ContractMismatch, InferenceFailed, ModelNotReady, ServerUnreachable
from arcface_clients.served_model import ServedModel, next_step, served_model
from arcface_clients.transports import Transport

T = TypeVar("T")
Steps = Generator[tuple[Any, ...], Any, T]

MAX_ENSEMBLE_DEPTH = 8
RECHECK_AFTER_S = 1.0  # a server that was silent for longer may have been restarted with another model
UNIT_TOLERANCE = 1e-3  # on the squared norm: int8 and fp16 graphs normalise in float32 and stay well inside


def run(steps: Steps[T], transport: Transport) -> T:
    """Do the steps on a transport; what a step raises is raised inside the generator."""
    step = next(steps)
    while True:
        try:
            value = getattr(transport, step[0])(*step[1:])
        except ArcFaceError as exc:
            act, argument = steps.throw, exc
        else:
            act, argument = steps.send, value
        try:
            step = act(argument)
        except StopIteration as done:
            return done.value


def backoff_s(attempt: int, base_s: float = 0.1, cap_s: float = 2.0) -> float:
    """Wait before attempt `attempt` + 1: uniform in (0, min(cap, base · 2^attempt)).

    "Full jitter" (AWS Architecture Blog, Exponential Backoff And Jitter): clients that lost one server do not come
    back in step.
    """
    return random.uniform(0, min(cap_s, base_s * 2 ** min(attempt, 16)))


class Session:
    """What is known of one model on one server, and the exchanges with it."""

    def __init__(
        self, url: str, model: str, *, timeout_s: float, retry_for_s: float, expected_contract: str | None
    ) -> None:
        """Nothing is sent yet."""
        self.url = url
        self.model = model
        self.timeout_s = timeout_s
        self.retry_for_s = retry_for_s
        self.expected_contract = expected_contract
        self.served: ServedModel | None = None
        self.embedding_dim = 0
        self._last_answer_s = -float("inf")

    def connect(self) -> Steps[ServedModel]:
        """Read the model's configuration down its ensembles and check its contract (unchanged, when it was known).

        Raises:
            ServerUnreachable, ModelNotReady, DeadlineExceeded: it cannot answer.
            ConfigError: the model does not follow the tensor contract.
            ContractMismatch: its contract is not the expected one, or has changed since the first connection.
        """
        configs: list[dict[str, Any]] = []
        name: str | None = self.model
        while name and len(configs) < MAX_ENSEMBLE_DEPTH:
            configs.append((yield "model_config", name, min(self.timeout_s, 10.0)))
            name = next_step(configs[-1])
        served = served_model(self.model, configs)
        self._check_contract(served)
        if not self.embedding_dim:
            self.embedding_dim = served.embedding_dim or (yield from self._probe_width())
        self.served = served
        self._last_answer_s = time.monotonic()
        return served

    def embed(self, body: bytes, count: int) -> Steps[np.ndarray]:
        """Embeddings float32 (count,D) of a packed body. A lost server or model is tried again for `retry_for_s`.

        Embedding the same faces twice does no harm, so every lost request may be sent again; a missed deadline is not
        (the server is overloaded, and would be more so), neither is an answer that is an error.
        """
        give_up_s = time.monotonic() + self.retry_for_s
        check_again = time.monotonic() - self._last_answer_s > RECHECK_AFTER_S
        for attempt in itertools.count():
            try:
                if check_again:
                    yield from self.connect()
                rows = yield "infer", self.model, body, self.timeout_s
                self._last_answer_s = time.monotonic()
                return self._checked(rows, count)
            except (ServerUnreachable, ModelNotReady):
                wait_s = backoff_s(attempt)
                if time.monotonic() + wait_s > give_up_s:
                    raise
            yield "sleep", wait_s
            check_again = True

    def _probe_width(self) -> Steps[int]:
        """The width of a model whose configuration leaves it open: embed one black face and look."""
        body = yield "pack", self.model, [np.zeros((1, *FACE_SHAPE), np.uint8)]
        rows = yield "infer", self.model, body, self.timeout_s
        return rows.shape[-1]

    def _check_contract(self, served: ServedModel) -> None:
        for known, since in (
            (self.expected_contract, "expected_contract"),
            (self._contract_before(), "the first answer"),
        ):
            if known is not None and served.contract_id != known:
                raise ContractMismatch(
                    f"{self.model!r} at {self.url} serves contract {_short(served.contract_id)}, but {since} is "
                    f"{_short(known)}. Embeddings of two contracts cannot be compared: serve the model of "
                    f"{_short(known)}, or enrol every person again with the new one"
                )

    def _contract_before(self) -> str | None:
        return self.served.contract_id if self.served else None

    def _checked(self, rows: np.ndarray, count: int) -> np.ndarray:
        if rows.shape != (count, self.embedding_dim):
            raise InferenceFailed(
                f"{self.model!r} at {self.url} answered {rows.shape} for {count} faces; expected ({count}, "
                f"{self.embedding_dim}). Was another model loaded? Make a new client"
            )
        squared = np.einsum("nd,nd->n", rows, rows)
        bad = np.flatnonzero(~(np.abs(squared - 1) <= UNIT_TOLERANCE))  # NaN fails the comparison too
        if bad.size:
            raise InferenceFailed(
                f"{self.model!r} at {self.url} answered {bad.size} of {count} embeddings that are not of unit length "
                f"(row {bad[0]}: norm {np.sqrt(squared[bad[0]]):.4g}). Check the model: arcface parity"
            )
        return rows


def _short(contract: str | None) -> str:
    return "none (started without the import's overlay)" if contract is None else contract[:12]
