"""A fallback chain: uses the first engine that is available, and says which one answered and why."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from arcface_clients.arrays import FloatArray
from arcface_clients.closing import Closing
from arcface_clients.engines.protocol import EmbeddingEngine, takes_gpu_faces
from arcface_clients.errors import (
    BackendUnavailable,
    ConfigError,
    ContractMismatch,
    DeadlineExceeded,
    GateFailed,
    Overloaded,
)
from arcface_clients.faces.check import FacesLike, check_faces, check_in_place
from arcface_clients.triton.embedder import TritonEmbedder, named_contract

Result = TypeVar("Result")
Link = EmbeddingEngine | tuple[str, Callable[[], EmbeddingEngine]]
_log = logging.getLogger(__name__)


@dataclass
class _State:
    """One engine of the chain with its circuit breaker; guarded by the chain's lock."""

    name: str
    make: Callable[[], EmbeddingEngine]
    engine: EmbeddingEngine | None = None
    accepted: bool = False  # loaded, contract checked, validated
    failures: int = 0  # in a row
    left_alone_until: float = 0.0  # clock time; not tried before then while another engine is available
    probing: bool = False  # a thread is retrying it after a failure
    why: str = ""
    unknown_said: bool = False
    refused: GateFailed | None = None  # its weights or its validation: not tried again


class FallbackEmbedder(Closing):
    """An engine that tries the engines of `chain` in order and uses the first available one.

    Only `BackendUnavailable` falls back, and an engine whose weights are refused when it is loaded. The caller's
    mistakes (`InvalidFaces`, `ConfigError`) and a failure on this input (`InferenceFailed`) propagate unchanged. An
    unavailable engine is skipped for `retry_after_s`, doubled after each failure up to `retry_after_max_s`; the next
    call after that retries it with the caller's own faces, one thread at a time, and returns to it once it answers. If
    every engine is being skipped, all are tried anyway, since the call would fail otherwise.

    Attributes:
        last_engine: name of the engine that answered most recently; None before the first answer.
        reason: why that engine answered, in words.
        validations: the results of `validate`, by engine name.
    """

    name = "fallback"

    def __init__(
        self,
        chain: Sequence[Link],
        *,
        retry_after_s: float = 5.0,
        retry_after_max_s: float = 300.0,
        validate: Callable[[str, EmbeddingEngine], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set up a chain; nothing is loaded or connected yet.

        Args:
            chain: engines, or pairs (name, function that creates the engine), in order of preference.
            retry_after_s: how long an unavailable engine is skipped at first.
            retry_after_max_s: the longest time it is skipped.
            validate: called with name and engine after loading; `GateFailed` removes that engine from the chain.
            clock: seconds, monotonic; for tests.

        Raises:
            ConfigError: the chain is empty, or two of its engines have the same name.
        """
        if not chain:
            raise ConfigError("a fallback chain needs at least one engine, got none: check fallback.chain.")
        self._states = [_state(link) for link in chain]
        names = [state.name for state in self._states]
        if len(set(names)) < len(names):
            raise ConfigError(f"a fallback chain needs a different name for each engine, got {', '.join(names)}.")
        self._retry_after_s, self._retry_after_max_s = retry_after_s, retry_after_max_s
        self._validate, self._clock = validate, clock
        self.validations: dict[str, Any] = {}
        self._lock = threading.RLock()
        self._contract_lock = threading.Lock()
        self._loading = {name: threading.Lock() for name in names}
        self._contract: tuple[str, str] | None = None  # (contract id, engine it came from)
        self._dim: tuple[int, str] | None = None
        self.last_engine: str | None = None
        self.reason = "no engine has been asked yet"

    @property
    def engine(self) -> EmbeddingEngine:
        """The engine that would answer now; loads it if necessary.

        Raises:
            BackendUnavailable: no engine is available; the message gives the reason for each.
        """
        return self._ask(lambda engine: engine)

    @property
    def embedding_dim(self) -> int:
        """Width D; the same for every engine of the chain."""
        return self._ask(lambda engine: engine.embedding_dim)

    @property
    def contract_id(self) -> str | None:
        """Contract id; the same for every engine of the chain that knows its own."""
        return self._ask(lambda engine: engine.contract_id)

    def ensure_ready(self) -> None:
        """Load or connect the first available engine.

        Raises:
            BackendUnavailable: none is available.
            GateFailed: every available engine failed its validation.
            ContractMismatch: two engines of the chain produce embeddings that must not be compared.
        """
        self._ask(lambda engine: engine.ensure_ready())

    def encode(self, faces: FacesLike) -> FloatArray:
        """Embeddings from the first available engine: (N,112,112,3) → float32 (N,D), see `EmbeddingEngine`.

        Raises:
            InvalidFaces: never falls back.
            BackendUnavailable: no engine is available.
            GateFailed, ContractMismatch: see `ensure_ready`.
        """
        checked = check_in_place(faces)

        def encode(engine: EmbeddingEngine) -> FloatArray:
            return engine.encode(checked) if takes_gpu_faces(engine) else engine.encode(check_faces(checked))

        return self._ask(encode)

    def close(self) -> None:
        """Close every engine that the chain has created."""
        for state in self._states:
            if state.engine is not None:
                state.engine.close()

    def _ask(self, question: Callable[[EmbeddingEngine], Result]) -> Result:
        skipped: dict[str, str] = {}
        for last_resort in (False, True):
            for state in self._states:
                if state.name in skipped or not self._may_ask(state, last_resort):
                    continue
                failures = state.failures
                try:
                    answer = question(self._accepted(state))
                except BackendUnavailable as exc:
                    self._failed(state, exc, failures)
                    skipped[state.name] = f"{state.name}: {exc}"
                except GateFailed as exc:
                    if state.refused is None:
                        raise
                    skipped[state.name] = f"{state.name} was refused: {exc}"
                else:
                    self._answered(state)
                    return answer
                finally:
                    state.probing = False
        refused = [state.refused for state in self._states if state.refused]
        if len(refused) == len(self._states):
            raise GateFailed("every engine of the chain failed its validation.\n" + "\n".join(skipped.values()))
        raise BackendUnavailable("no engine of the chain is available.\n" + "\n".join(skipped.values()))

    def _may_ask(self, state: _State, last_resort: bool) -> bool:
        """Whether to try this engine; one thread probes an engine that failed, the others use the next one."""
        with self._lock:
            if not last_resort and state.failures and (state.probing or self._clock() < state.left_alone_until):
                return False
            state.probing = state.failures > 0
            return True

    def _accepted(self, state: _State) -> EmbeddingEngine:
        """The engine: created, checked against the others and validated, on first use and when it comes back."""
        failures = state.failures
        with self._loading[state.name]:
            if state.refused is not None:
                raise state.refused
            if state.failures > failures:  # another thread failed to load it while this one waited
                raise BackendUnavailable(state.why)
            if state.engine is None:
                state.engine = state.make()
            if not state.accepted:
                try:
                    state.engine.ensure_ready()
                    self._compare_contracts(state, state.engine)
                except BackendUnavailable as exc:
                    self._failed(state, exc, failures)
                    raise
                except GateFailed as exc:
                    self._refuse(state, exc)
                    raise
                self._validated(state, state.engine)
                state.accepted = True
            return state.engine

    def _validated(self, state: _State, engine: EmbeddingEngine) -> None:
        if self._validate is None:
            return
        try:
            self.validations[state.name] = self._validate(state.name, engine)
        except GateFailed as exc:
            self._refuse(state, exc)
            raise

    def _refuse(self, state: _State, why: GateFailed) -> None:
        state.refused = why
        _log.error("%s failed its validation and is not used: %s", state.name, why)

    def _compare_contracts(self, state: _State, engine: EmbeddingEngine) -> None:
        """Reject a chain whose embeddings must not be mixed; all engines are checked now rather than in an outage."""
        with self._contract_lock:
            contract = engine.contract_id
            if contract is None and isinstance(engine, TritonEmbedder):
                contract = named_contract(engine)
            self._agree(state.name, contract, engine.embedding_dim)
            if contract is None and len(self._states) > 1 and not state.unknown_said:
                state.unknown_said = True
                _log.warning(
                    "%s does not state its contract: only its width is compared with the rest of the chain", state.name
                )
            for other in self._states:
                if other is state or other.failures:
                    continue
                with suppress(BackendUnavailable):
                    other.engine = other.engine or other.make()
                    self._agree(other.name, other.engine.contract_id, None)

    def _agree(self, name: str, contract: str | None, dim: int | None) -> None:
        if contract is not None:
            known = self._contract[0] if self._contract else contract  # of either only the beginning may be known
            if self._contract and not (known.startswith(contract) or contract.startswith(known)):
                raise ContractMismatch(
                    f"engine {name} produces embeddings of contract {contract[:12]}…, engine {self._contract[1]} of "
                    f"{self._contract[0][:12]}…: a chain must not mix them. Point both at the same model (local.model, "
                    "triton.model), or re-enrol with the new one."
                )
            self._contract = self._contract or (contract, name)
        if dim is not None:
            if self._dim and self._dim[0] != dim:
                raise ContractMismatch(
                    f"engine {name} produces embeddings of width {dim}, engine {self._dim[1]} of {self._dim[0]}: "
                    "a chain must not mix them. Point both at the same model (local.model, triton.model)."
                )
            self._dim = self._dim or (dim, name)

    def _failed(self, state: _State, error: BackendUnavailable, failures_before: int) -> None:
        with self._lock:
            if state.failures != failures_before:
                return  # concurrent failures count as one
            state.failures += 1
            pause_s = min(self._retry_after_s * 2 ** min(state.failures - 1, 30), self._retry_after_max_s)
            state.left_alone_until = self._clock() + pause_s
            state.why = f"{type(error).__name__}: {error}"
            # After a slow answer it is still the same engine; after a lost connection it may not be.
            state.accepted = state.accepted and isinstance(error, DeadlineExceeded | Overloaded)
            if state.failures == 1:
                _log.warning("%s is unavailable, will retry in %g s: %s", state.name, pause_s, state.why)

    def _answered(self, state: _State) -> None:
        with self._lock:
            state.failures, state.left_alone_until, state.why = 0, 0.0, ""
            before = self._states[: self._states.index(state)]
            self.reason = "; ".join(f"{s.name}: {s.refused or s.why}" for s in before if s.refused or s.why) or (
                "first of the chain"
            )
            if self.last_engine != state.name:
                _log.log(logging.WARNING if before else logging.INFO, "%s answers (%s)", state.name, self.reason)
            self.last_engine = state.name


def _state(link: Link) -> _State:
    if isinstance(link, tuple):
        return _State(name=link[0], make=link[1])
    return _State(name=getattr(link, "name", type(link).__name__), make=lambda: link, engine=link)
