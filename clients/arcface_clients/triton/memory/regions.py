"""Shared memory as one client uses it: chosen by trying it, filled with faces, and given up when it does harm.

Every exchange with the server is steps without I/O, see `sansio`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_SHAPE
from arcface_clients.errors import ArcFaceError, ConfigError, CudaFailed, InferenceFailed
from arcface_clients.faces.check import Faces
from arcface_clients.triton.answer import Tensors, checked_rows
from arcface_clients.triton.memory.choice import Kind, SharedMemory
from arcface_clients.triton.memory.reclaim import forget_lost, sweep
from arcface_clients.triton.memory.slots import SlotPool
from arcface_clients.triton.memory.system import Slot, is_local
from arcface_clients.triton.options import ClientOptions
from arcface_clients.triton.sansio import CONTROL_TIMEOUT_S, Steps
from arcface_clients.triton.served import ServedModel
from arcface_clients.triton.transports.refusals import closed

MAX_DOUBTFUL = 16  # regions that late answers may still be written to; beyond, the wire is kinder to /dev/shm
_log = logging.getLogger(__name__)


class Regions:
    """The shared memory between one client and its server.

    Attributes:
        chosen: what faces in host memory go through, and why.
        chosen_for_gpu: the same for faces on a GPU; None before the first ones came.
        pool: the slots.
    """

    def __init__(self, options: ClientOptions) -> None:
        """Nothing is reserved yet."""
        self.chosen = SharedMemory(None, "not connected yet")
        self.chosen_for_gpu: SharedMemory | None = None
        self.pool = SlotPool()
        self._asked, self._model, self._timeout_s = options.shared_memory, options.model, options.timeout_s
        self._address = options.address
        self._max_faces = self._embedding_dim = self._gpu = 0
        self._server_life = object()  # a new one when the server may have been restarted: it then knows no regions
        self._lock = threading.Lock()

    def resize(self, served: ServedModel, embedding_dim: int) -> None:
        """From now on, slots have room for a request of this model, which may have been loaded anew."""
        self._max_faces, self._embedding_dim, self._gpu = served.max_batch_size, embedding_dim, served.gpu or 0

    def choose(self) -> Steps[None]:
        """Shared memory when the server can open a region of ours, which proves that it is on this host.

        Raises:
            ConfigError: it was demanded, and is not possible.
        """
        if self._asked is False:
            self.chosen = SharedMemory(None, "shared memory is switched off")
            return
        no_cuda = ""
        if self._asked == "cuda":
            why_not = yield from self._try(self._gpu)
            if not why_not:
                self.chosen = SharedMemory("cuda", _opened_on(self._gpu))
                return
            no_cuda = f"; CUDA shared memory was asked for and is not possible: {why_not}"
        why_not = yield from self._try(None)
        if why_not and self._asked is True:
            raise ConfigError(f"shared memory was demanded and is not possible: {why_not}")
        if why_not:
            self.chosen = SharedMemory(None, why_not + no_cuda)
        else:
            self.chosen = SharedMemory("system", f"the server is on this host and opened a region of ours{no_cuda}")
        if no_cuda:
            _log.warning("%s: %s", self._address, self.chosen)

    def choose_for_gpu(self, served: ServedModel, device: int) -> Steps[None]:
        """Regions on the GPU where the first faces on one are, if that can be; else faces are copied to the host."""
        if self.chosen.kind == "cuda":
            self.chosen_for_gpu = self.chosen
            return
        if self._asked in (False, "system"):
            why_not = f"shared_memory is {self._asked!r}"
        elif served.gpu is None:
            why_not = f"{served.leaf!r} runs on the server's CPU"
        else:
            why_not = yield from self._try(device)
        if why_not:
            self.chosen_for_gpu = self._to_host_first(why_not)
        else:
            self.chosen_for_gpu = SharedMemory("cuda", _opened_on(device))

    def slot_on_gpu(self, parts: Sequence[Faces], device: int) -> Slot | None:
        """A slot with these faces, which are on this GPU, in it; None when they have to be copied to the host."""
        if self.chosen_for_gpu is None or self.chosen_for_gpu.kind != "cuda":
            return None
        return self._filled(parts, device)

    def slot_for(self, parts: Sequence[Array]) -> Slot | None:
        """A slot with these faces, which are in host memory, in it; None when they have to go over the wire."""
        if self.chosen.kind is None:
            return None
        return self._filled(parts, self._gpu if self.chosen.kind == "cuda" else None)

    def infer(self, slot: Slot, count: int, outputs: Sequence[str]) -> Steps[Tensors]:
        """These outputs for the `count` faces in a slot, which is made known to the server if need be.

        The embeddings are written into the slot, the rest comes in the answer.
        """
        life = self._server_life
        if slot.registered_with is not life:
            try:
                yield "register_shared", slot, CONTROL_TIMEOUT_S
            except (InferenceFailed, ConfigError) as exc:
                # it could before; whatever changed (its key, say), the faces are still in the slot: over the wire
                self._give_up(slot.memory, f"the server cannot open our region any more: {exc}")
                body = yield "pack", self._model, [slot.faces(count)], outputs
                tensors: Tensors = yield "infer", self._model, body, self._timeout_s
                return tensors
            slot.registered_with = life
        try:
            rest: Tensors = yield "infer_shared", self._model, slot, count, outputs, self._timeout_s
        except InferenceFailed:
            raise  # answered, if badly: the server is done with the slot
        except BaseException:
            self._doubt(slot)
            raise
        return {**rest, EMBEDDING_OUTPUT: slot.rows(count)}

    def server_lost(self) -> None:
        """The server may have been restarted: every region is registered again before its next use."""
        self._server_life = object()

    def reconnected(self) -> Steps[None]:
        """Give back the doubtful slots that the server, restarted, does not know any more."""
        if self.pool.doubtful:
            yield from forget_lost(self.pool)

    def detach(self) -> Steps[None]:
        """Unregister and unlink all regions; a server that does not answer any more is left alone."""
        for slot in self.pool.close():
            try:
                yield "unregister_shared", slot.name, CONTROL_TIMEOUT_S
            except ArcFaceError:
                return  # the next client of that server removes them; GPU memory goes with this process
            slot.registered_with = None
            slot.close()

    def _filled(self, parts: Sequence[Faces], device: int | None) -> Slot | None:
        """A slot on this GPU (None: in system memory) with these faces in it; None when they have to take the wire.

        That is when no more can be made, and when the model takes fewer at once than when these were put together.
        """
        max_faces = self._max_faces
        if sum(map(len, parts)) > max_faces:
            return None
        try:
            slot = self.pool.take(max_faces, self._embedding_dim, device)
        except OSError as exc:
            where = "shared memory" if device is None else f"memory on GPU {device}"
            self._give_up("system" if device is None else "cuda", f"no more room in {where} ({exc.strerror or exc})")
            return None
        try:
            slot.put(parts)
        except OSError as exc:  # the GPU is lost to this process, or somebody closes us
            self.pool.discard(slot)
            if self.pool.is_closed:
                raise closed() from exc
            raise
        return slot

    def _doubt(self, slot: Slot) -> None:
        """The server may still be at work on this slot, late or twice: it must never hold another request."""
        with self._lock:
            slot.doubtful = True
            if self.pool.doubtful >= MAX_DOUBTFUL:
                why = f"{MAX_DOUBTFUL} requests were lost, whose shared memory may still be written to"
                self._give_up("system", why)
                self._give_up("cuda", why)

    def _give_up(self, kind: Kind, reason: str) -> None:
        """Go over the wire from now on, where it was this kind of shared memory."""
        if self.chosen.kind == kind:
            self.chosen = SharedMemory(None, reason)
        if self.chosen_for_gpu and self.chosen_for_gpu.kind == kind == "cuda":
            self.chosen_for_gpu = self._to_host_first(reason)

    def _to_host_first(self, reason: str) -> SharedMemory:
        return SharedMemory(self.chosen.kind, f"faces on the GPU are copied to the host first: {reason}")

    def _try(self, device: int | None) -> Steps[str]:
        """Have the server open a region on this GPU (None: in system memory); why it cannot, "" when it did."""
        if not is_local(self._address.host):
            return f"{self._address.host} is not this host"
        try:
            slot = self.pool.take(self._max_faces, self._embedding_dim, device)
        except OSError as exc:
            return f"no shared memory on this host ({exc})" if device is None else str(exc)
        life, why_not = self._server_life, ""
        try:
            yield "register_shared", slot, CONTROL_TIMEOUT_S
        except BaseException as exc:
            self.pool.discard(slot)
            if not isinstance(exc, (InferenceFailed, ConfigError)):
                raise
            if device is None:
                return f"the server cannot open a region of ours, it may be in another container: {exc}"
            return (
                f"the server cannot open a region of ours on GPU {device}: {exc}. It needs that GPU under the same "
                "number, and in another container --pid=host"
            )
        slot.registered_with = life
        try:
            if device is not None:
                why_not = yield from self._try_a_face(slot)
        finally:
            self.pool.give(slot)
        yield from sweep(slot.memory)
        return why_not

    def _try_a_face(self, slot: Slot) -> Steps[str]:
        """Embed one black face in a region on a GPU: that the server opened it does not say that its backend can."""
        try:
            slot.put([np.zeros((1, *FACE_SHAPE), np.uint8)])
            tensors = yield from self.infer(slot, 1, (EMBEDDING_OUTPUT,))
            checked_rows(tensors, (1, self._embedding_dim), f"{self._model!r} at {self._address}")
        except (InferenceFailed, CudaFailed) as exc:
            return f"one face through GPU {slot.device} did not come back: {exc}"
        return ""


def _opened_on(device: int) -> str:
    return f"the server opened a region of ours on GPU {device}, and embedded a face in it"
