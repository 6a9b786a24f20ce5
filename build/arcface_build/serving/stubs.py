"""Finds the processes behind a tritonserver's Python models, and says when one of them died or stands still.

Triton 2.51 starts no process of a Python model again. A model with several goes on with those that are left, so that
requests alone would show it late, and only now and then.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from arcface_build.errors import ServerFailed
from arcface_build.serving.process import TritonProcess

GRACE_S = 1.0  # a model that is unloaded ends its processes too, but they are not left behind for so long
_NAME = "triton_python_b"  # of triton_python_backend_stub, as far as the kernel keeps it
_TROUBLE = {"Z": "died", "X": "died", "T": "stands still"}  # by the state letter
_PROC = Path("/proc")


class Stub(NamedTuple):
    """A process of a Python model."""

    pid: int
    model: str

    @property
    def trouble(self) -> str:
        """Whether it died or stands still, as two words; empty where it is well."""
        stat = _stat(self.pid)
        return _TROUBLE.get(stat.state, "") if stat and stat.name == _NAME else "died"

    @property
    def age_s(self) -> float:
        """How long it has run; 0 where it is gone."""
        stat = _stat(self.pid)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - stat.started_s if stat else 0.0


class StubWatch:
    """Looks at the processes of some Python models, without a request; a server without any is always well."""

    def __init__(self, server: TritonProcess, models: Collection[str]) -> None:
        """To be made once all models are loaded; `models`: those without which nobody is served."""
        self._server, self._models = server, models
        self._stubs = self._well()
        self._leaving: set[Stub] = set()  # of models that were unloaded: on a busy host some end after the next load
        self._away: set[str] = set()  # models that were unloaded, until they are served again
        self._since_s: float | None = None  # when something was first found amiss

    def beats(self) -> bool:
        """Whether all are well.

        Raises:
            ServerFailed: one of them has been dead or stopped for longer than the grace.
        """
        amiss = self._amiss()
        if amiss is None:
            self._since_s = None
            self._welcome_back()
            return True
        now_s = time.monotonic()
        self._since_s = now_s if self._since_s is None else self._since_s
        if now_s - self._since_s >= GRACE_S:
            raise ServerFailed(f"the server lost a process: {amiss}")
        return False

    def _amiss(self) -> str | None:
        for stub in self._stubs:
            if trouble := stub.trouble:
                if self._was_unloaded(stub):
                    return None
                return f"{stub.pid}, which {trouble}, of {stub.model}"
        return None

    def _was_unloaded(self, gone: Stub) -> bool:
        """Whether a process was ended by Triton, with its model unloaded, being unloaded, or loaded anew."""
        mine = {stub for stub in self._well() if stub.model == gone.model}
        if mine <= self._stubs and self._server.serves(gone.model):
            return False
        self._leaving |= {stub for stub in self._stubs if stub.model == gone.model}
        self._stubs = {stub for stub in self._stubs if stub.model != gone.model}
        self._away.add(gone.model)
        return True

    def _welcome_back(self) -> None:
        """Look from now on at the processes of models that are served again."""
        for model in self._away & {stub.model for stub in self._well() - self._leaving}:
            if self._server.serves(model):
                self._stubs |= {stub for stub in self._well() if stub.model == model} - self._leaving
                self._away.discard(model)

    def _well(self) -> set[Stub]:
        return {stub for stub in stubs_of(self._server.pid) if stub.model in self._models and not stub.trouble}


def stubs_of(server_pid: int | None) -> Iterable[Stub]:
    """The processes of the Python models of a tritonserver."""
    for entry in _PROC.glob("[0-9]*"):
        pid = int(entry.name)
        if (stat := _stat(pid)) and stat.name == _NAME and stat.parent == server_pid:
            yield Stub(pid, _model(pid))


def _model(pid: int) -> str:
    """Its first argument is …/MODEL/VERSION/model.py."""
    try:
        file = Path((_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")[1])
    except (OSError, IndexError):
        return "a Python model"
    return file.parent.parent.name


class _Stat(NamedTuple):
    """What proc(5) says of a process."""

    name: str
    state: str
    parent: int
    started_s: float  # since the machine was started


def _stat(pid: int) -> _Stat | None:
    try:
        head, _, rest = (_PROC / str(pid) / "stat").read_text().rpartition(")")
    except OSError:
        return None
    fields = rest.split()
    return _Stat(head.partition("(")[2], fields[0], int(fields[1]), int(fields[19]) / os.sysconf("SC_CLK_TCK"))
