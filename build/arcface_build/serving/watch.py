"""Watches a serving tritonserver: says within seconds that it ended or hangs, and when to stop starting it again."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from typing import NoReturn, Protocol

from arcface_build.errors import ServerFailed
from arcface_build.serving.process import TritonProcess
from arcface_build.serving.reasons import reason_of_end
from arcface_clients import TritonEmbedder
from arcface_clients.arrays import Array
from arcface_clients.errors import ArcFaceError, BackendUnavailable, ModelNotReady

PROBE_EVERY_S = 1.0
PROBE_TIMEOUT_S = 2.5  # the python backend takes a second to say that its stub is dead
# A hang is noticed after PROBE_EVERY_S and one probe in vain, 3.5 s, where a full batch takes less than PATIENCE_S / 4.
PATIENCE_S = 3.0
BATCHES_OF_PATIENCE = 4.0  # with slower models: nothing was computed in the time of so many full batches
RESTARTS = 5
RESTARTS_WITHIN_S = 600.0


class Interrupted(Protocol):
    """Whether a signal came; see `arcface_build.serving.run.Interrupt`."""

    came: bool


class Restarts:
    """How often a server may be started again: five times in ten minutes, each time after twice the pause."""

    def __init__(self) -> None:
        """It has not served yet."""
        self.served = False
        self.contract_id: str | None = None  # of what it served last
        self._at_s: deque[float] = deque()

    def pause_s(self, now_s: float | None = None) -> float | None:
        """Seconds to wait before the next start: 1, 2, 4 …; None: it ended too often."""
        now_s = time.monotonic() if now_s is None else now_s
        while self._at_s and now_s - self._at_s[0] > RESTARTS_WITHIN_S:
            self._at_s.popleft()
        if len(self._at_s) == RESTARTS:
            return None
        self._at_s.append(now_s)
        return float(2 ** (len(self._at_s) - 1))


class Pulse:
    """Whether a server computes: one face is embedded through the model that clients call, over the wire.

    A busy server may answer late. So one that answers nothing counts as hung only when none of its models has finished
    anything since either.
    """

    def __init__(self, server: TritonProcess, face: Array, patience_s: float) -> None:
        """Face uint8 (1,112,112,3); patience_s: how long nothing may be finished."""
        self._server, self._face, self._patience_s = server, face, patience_s
        self._embedder = TritonEmbedder(server.own_url, timeout_s=PROBE_TIMEOUT_S, retry_for_s=0, shared_memory=False)
        self._finished = -1
        self._seen_s = time.monotonic()
        self._failures = 0

    def beats(self) -> bool:
        """Embed the face; returns whether it was answered.

        Raises:
            ServerFailed: the server answers with errors, or has stood still for longer than the patience.
        """
        try:
            self._embedder.encode(self._face)
        except BackendUnavailable as exc:
            if not isinstance(exc, ModelNotReady):  # silence, or a full queue: it may only be busy
                self._look_for_progress(exc)
                return False
            self._failed(exc)  # it is there, and says that the process behind its model is not
            return False
        except ArcFaceError as exc:
            self._failed(exc)
            return False
        self._seen_s, self._failures = time.monotonic(), 0
        return True

    def close(self) -> None:
        """Give up the connection."""
        self._embedder.close()

    def _failed(self, exc: ArcFaceError) -> None:
        self._failures += 1
        if self._failures > 1:
            raise ServerFailed(f"the server answers no face: {exc}") from exc

    def _look_for_progress(self, why: ArcFaceError) -> None:
        finished = -1
        with suppress(OSError, ValueError, KeyError):
            statistics = self._server.ask("/v2/models/stats", PROBE_TIMEOUT_S)["model_stats"]
            finished = sum(int(model["inference_stats"]["success"]["count"]) for model in statistics)
        if finished > self._finished:
            self._finished, self._seen_s = finished, time.monotonic()
        still_s = time.monotonic() - self._seen_s
        if still_s >= self._patience_s:
            raise ServerFailed(f"the server hangs: nothing was computed for {still_s:.1f} s ({why})") from why


def patience_s(faces_per_s: float, batch: int = 64) -> float:
    """How long a server that embeds so fast may finish nothing."""
    return max(PATIENCE_S, BATCHES_OF_PATIENCE * batch / faces_per_s if faces_per_s > 0 else 0.0)


def watch(server: TritonProcess, pulse: Pulse, interrupt: Interrupted) -> NoReturn:
    """Watch the server until it ends by itself or hangs, which it should not, or until we are interrupted.

    Raises:
        KeyboardInterrupt: interrupted.
        ServerFailed: the server ended, hangs, or answers with errors.
    """
    answered = True
    while (status := server.wait(timeout_s=PROBE_EVERY_S if answered else 0.05)) is None:
        if interrupt.came:
            raise KeyboardInterrupt
        answered = pulse.beats()
    raise ServerFailed(f"tritonserver ended by itself {reason_of_end(status, server.log_path)}")
