"""Watches a serving tritonserver: says within seconds that it ended or hangs, and when to stop starting it again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from functools import partial
from typing import NoReturn, Protocol

from arcface_build.errors import ServerFailed
from arcface_build.repository.integrity import PHOTO_MODEL
from arcface_build.serving.process import TritonProcess
from arcface_build.serving.reasons import reason_of_end
from arcface_build.serving.stubs import StubWatch
from arcface_clients import PhotoEmbedder, TritonEmbedder
from arcface_clients.arrays import Array
from arcface_clients.errors import ArcFaceError, BackendUnavailable, ModelNotReady

PROBE_EVERY_S = 1.0
PROBE_TIMEOUT_S = 2.5  # the python backend takes a second to say that its stub is dead
# A hang is noticed after PROBE_EVERY_S and one probe in vain, 3.5 s, where a full batch takes less than PATIENCE_S / 4.
PATIENCE_S = 3.0
BATCHES_OF_PATIENCE = 4.0  # with slower models: nothing was computed in the time of so many full batches
# A large photo is decoded in seconds; embedding a crowd takes what the network takes.
PHOTO_PATIENCE_S = 30.0
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


class Sign(Protocol):
    """Something by which a server that serves is told from one that does not."""

    def beats(self) -> bool:
        """Look; returns whether all is well.

        Raises:
            ServerFailed: it is not, and will not be again.
        """
        ...


class Pulse:
    """Whether a server computes: it is asked for something small, over the wire.

    A busy server may answer late. So one that answers nothing counts as hung only when nothing was finished since
    either.
    """

    def __init__(
        self,
        ask: Callable[[], object],
        finished: Callable[[], int],
        patience_s: float,
        wanted: str = "face",
    ) -> None:
        """Nothing is asked yet.

        Args:
            ask: raises one of our errors where it is not answered.
            finished: how many requests were finished so far; -1: it does not say.
            patience_s: how long nothing may be finished.
            wanted: what it is asked for, for messages.
        """
        self._ask, self._count, self._patience_s, self._wanted = ask, finished, patience_s, wanted
        self._finished = -1
        self._seen_s = time.monotonic()
        self._failures = 0

    def beats(self) -> bool:
        """Ask; returns whether it was answered.

        Raises:
            ServerFailed: the server answers with errors, or has stood still for longer than the patience.
        """
        try:
            self._ask()
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

    def _failed(self, exc: ArcFaceError) -> None:
        self._failures += 1
        if self._failures > 1:
            raise ServerFailed(f"the server answers no {self._wanted}: {exc}") from exc

    def _look_for_progress(self, why: ArcFaceError) -> None:
        finished = self._count()
        if finished > self._finished:
            self._finished, self._seen_s = finished, time.monotonic()
        still_s = time.monotonic() - self._seen_s
        if still_s >= self._patience_s:
            raise ServerFailed(f"the server hangs: nothing was computed for {still_s:.1f} s ({why})") from why


class Signs:
    """All signs of a server, looked at in turn up to the first that is not well, with the connections they need."""

    def __init__(self, server: TritonProcess, models: Collection[str], face: Array, faces_per_s: float) -> None:
        """To be made once the server is ready.

        Args:
            server: what is watched.
            models: those that answer clients; the reference that others are compared with may be lost.
            face: uint8 (1,112,112,3).
            faces_per_s: how fast the server embeds.

        Raises:
            ServerFailed: it does not tell how `photo_faces` is configured.
        """
        url = server.own_url
        under_way = faces_under_way(server) if PHOTO_MODEL in models else 0
        self._open = ExitStack()
        embedder = self._open.enter_context(
            TritonEmbedder(url, timeout_s=PROBE_TIMEOUT_S, retry_for_s=0, shared_memory=False)
        )
        encode = partial(embedder.encode, face)
        self._signs: list[Sign] = [
            StubWatch(server, models),
            Pulse(encode, partial(finished, server), patience_s(faces_per_s)),
        ]
        if PHOTO_MODEL in models:
            asked = self._open.enter_context(PhotoEmbedder(url, timeout_s=PROBE_TIMEOUT_S, retry_for_s=0))
            done = partial(finished, server, photos=True)
            patient_s = photo_patience_s(faces_per_s, under_way)
            self._signs.append(Pulse(asked.probe, done, patient_s, "photo"))

    def beats(self) -> bool:
        """Whether all is well; see `Sign`."""
        return all(sign.beats() for sign in self._signs)

    def close(self) -> None:
        """Give up the connections."""
        self._open.close()


def finished(server: TritonProcess, *, photos: bool = False) -> int:
    """How many requests the models that take faces have answered, or those that take photos; -1: it does not say."""
    with suppress(OSError, ValueError, KeyError):
        statistics = server.ask("/v2/models/stats", PROBE_TIMEOUT_S)["model_stats"]
        mine = [each for each in statistics if each["name"].startswith("photo_") == photos]
        return sum(int(each["inference_stats"]["success"]["count"]) for each in mine)
    return -1


def patience_s(faces_per_s: float, batch: int = 64) -> float:
    """How long a server that embeds so fast may finish nothing."""
    return max(PATIENCE_S, BATCHES_OF_PATIENCE * batch / faces_per_s if faces_per_s > 0 else 0.0)


def faces_under_way(server: TritonProcess) -> int:
    """How many faces all instances of `photo_faces` together may be at, by the configuration that is served.

    Raises:
        ServerFailed: the server does not tell it.
    """
    try:
        config = server.ask(f"/v2/models/{PHOTO_MODEL}/config", PROBE_TIMEOUT_S)
        groups, faces = config["instance_group"], config["parameters"]["max_faces"]["string_value"]
        return sum(int(group["count"]) * max(len(group.get("gpus", [])), 1) for group in groups) * int(faces)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ServerFailed(f"the server does not tell how {PHOTO_MODEL} is configured: {exc!r}") from exc


def photo_patience_s(faces_per_s: float, faces: int) -> float:
    """The same for photos, all of whose instances may be busy with a crowd: so many faces."""
    return PHOTO_PATIENCE_S + (faces / faces_per_s if faces_per_s > 0 else 0.0)


def watch(server: TritonProcess, signs: Sign, interrupt: Interrupted) -> NoReturn:
    """Watch the server until it ends by itself or hangs, which it should not, or until we are interrupted.

    Raises:
        KeyboardInterrupt: interrupted.
        ServerFailed: the server ended, hangs, or answers with errors.
    """
    answered = True
    while (status := server.wait(timeout_s=PROBE_EVERY_S if answered else 0.05)) is None:
        if interrupt.came:
            raise KeyboardInterrupt
        answered = signs.beats()
    raise ServerFailed(f"tritonserver ended by itself {reason_of_end(status, server.log_path)}")
