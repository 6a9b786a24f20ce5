"""An ONNX session in a process of its own, as a server would have it: with its allocator, and no more memory.

    python -m arcface_build.variants.session_process LIMIT      (started by `SessionProcess` alone)

So a model that takes all memory, or crashes its runtime, ends that process and not the command that tries it. Pickled
objects go both ways: (method of `_Opened`, its arguments) there; (True, result) or (False, exception) back.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from arcface_build.allocator import with_jemalloc
from arcface_build.child_process import end_with_parent, module_line, take_at_most
from arcface_build.host_memory import server_memory_limit, usable_memory
from arcface_clients.arrays import FaceArray
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT
from arcface_clients.engines.runtimes import OnnxSession, first_line, open_session
from arcface_clients.errors import InferenceFailed, OutOfMemory

if TYPE_CHECKING:
    import onnx

_LOOK_EVERY_S = 0.005
_ROOM = 0.9


class SessionProcess:
    """An ONNX session that is opened, run and timed in a child process; close it.

    Args:
        model: the ONNX, or what makes one (there): a picklable function.
        runtime: one of `arcface_clients.engines.runtimes.RUNTIMES`.
        label: name of the model in messages.
        limit: bytes of its own that the process may ask for; default: nine tenths of what a server's process may, which
            has more threads.

    Attributes:
        memory: the most bytes that the process had asked for by now, as far as was seen.

    Raises:
        OutOfMemory: it needs more than the limit, or than the kernel has.
        InferenceFailed: the process crashed.
        WrongUse, DependencyMissing: as `open_session`.
    """

    def __init__(
        self, model: Path | Callable[[], onnx.ModelProto], runtime: str, label: str, limit: int | None = None
    ) -> None:
        self._label = label
        self._limit = limit or int(_ROOM * server_memory_limit())
        self.memory = 0
        self._child = subprocess.Popen(
            module_line("arcface_build.variants.session_process", str(self._limit)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=with_jemalloc(os.environ),
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        try:
            self._ask("open", model, runtime, label)
        except BaseException:
            self.close()
            raise

    def embed(self, faces: FaceArray) -> np.ndarray:
        """Embeddings float32 (N,D) of faces uint8 (N,112,112,3).

        Raises:
            OutOfMemory, InferenceFailed: as when it was opened.
        """
        return cast(np.ndarray, self._ask("embed", faces))

    def rate(self, faces: FaceArray, at_least_s: float) -> float:
        """faces/s of whole calls with these faces, which take at least so many seconds together; timed over there.

        Raises:
            OutOfMemory, InferenceFailed: as when it was opened.
        """
        return float(self._ask("rate", faces, at_least_s))

    def close(self) -> None:
        """End the process at once."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            with contextlib.suppress(BrokenPipeError):  # it ended before it read what was asked last
                cast(IO[bytes], pipe).close()

    def _ask(self, method: str, *arguments: Any) -> Any:
        stdin, stdout = cast(IO[bytes], self._child.stdin), cast(IO[bytes], self._child.stdout)
        try:
            stdin.write(pickle.dumps((method, arguments)))
            stdin.flush()
            looks_s = None if method == "rate" else _LOOK_EVERY_S  # nothing disturbs what is timed
            while not select.select([stdout], [], [], looks_s)[0]:
                self._look()
            self._look()
            done, result = pickle.load(stdout)
        except (EOFError, BrokenPipeError):
            raise self._why_it_ended() from None
        if done:
            return result
        if isinstance(result, MemoryError) or self._is_short():
            raise self._out_of_memory(first_line(result))
        raise result

    def _look(self) -> None:
        """Note how much it has asked for: what RLIMIT_DATA counts."""
        try:
            status = Path(f"/proc/{self._child.pid}/status").read_text()
        except OSError:  # it has just ended
            return
        found = [int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData:")]
        self.memory = max([self.memory, *found])

    def _is_short(self) -> bool:
        """Whether a fault is likely one of memory: OpenVINO gives other reasons, and libraries abort."""
        return 2 * self.memory > self._limit

    def _out_of_memory(self, said: str) -> OutOfMemory:
        return OutOfMemory(
            f"{self._label} does not run in {self._limit / 2**30:.1f} GB, which is what a process of a server may take "
            f"here: {said}"
        )

    def _why_it_ended(self) -> Exception:
        status = self._child.wait()
        how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        if status == -signal.SIGKILL:
            return OutOfMemory(
                f"{self._label}: its process was killed, as the kernel does where the {usable_memory() / 2**30:.1f} GB "
                "of this host or container do not suffice for all that runs in it (dmesg)"
            )
        if self._is_short():
            return self._out_of_memory(f"its process ended by {how}")
        return InferenceFailed(f"{self._label} crashes its runtime ({how})")


class _Opened:
    """The child's side."""

    def __init__(self) -> None:
        self._session: OnnxSession

    def open(self, model: Path | Callable[[], onnx.ModelProto], runtime: str, label: str) -> None:
        self._session = open_session(model if isinstance(model, Path) else model(), runtime, label=label)

    def embed(self, faces: FaceArray) -> np.ndarray:
        return cast(np.ndarray, self._session.run([EMBEDDING_OUTPUT], {FACE_INPUT: faces})[0])

    def rate(self, faces: FaceArray, at_least_s: float) -> float:
        calls, started = 0, time.perf_counter()
        while True:
            self.embed(faces)
            calls += 1
            passed_s = time.perf_counter() - started
            if passed_s >= at_least_s:
                return calls * len(faces) / max(passed_s, 1e-9)


def main() -> None:
    """Answer requests on standard input until it ends."""
    end_with_parent()
    take_at_most(int(sys.argv[1]))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # should the kernel have to end one, then this
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print
    opened = _Opened()
    while True:
        try:
            method, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, getattr(opened, method)(*arguments)))
        except Exception as exc:
            answer = _portable(exc)
        answers.write(answer)
        answers.flush()


def _portable(exc: Exception) -> bytes:
    """An exception as bytes; one that cannot travel as a plain one that says the same."""
    try:
        told = pickle.dumps((False, exc))
        pickle.loads(told)
    except Exception:
        return pickle.dumps((False, RuntimeError(str(exc) or type(exc).__name__)))
    return told


if __name__ == "__main__":
    main()
