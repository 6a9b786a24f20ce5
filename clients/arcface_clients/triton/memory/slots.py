"""The regions of a session: requests take a slot and give it back, and a doubtful one is never handed out again."""

from __future__ import annotations

import threading
from collections.abc import Collection

from arcface_clients.triton.memory.cuda import CudaSlot
from arcface_clients.triton.memory.system import Slot
from arcface_clients.triton.transports.refusals import closed


class SlotPool:
    """All slots of a session, and which of them are not in use; safe to use from many threads."""

    def __init__(self) -> None:
        """No region yet; each take beyond what is free makes one."""
        self._lock = threading.Lock()
        self._free: list[Slot] = []
        self._all: set[Slot] = set()
        self.is_closed = False

    @property
    def doubtful(self) -> int:
        """How many slots may never be used again."""
        return len(self.doubtful_memory())

    def doubtful_memory(self) -> list[str]:
        """The kind of memory of each slot that may never be used again."""
        with self._lock:
            return [slot.memory for slot in self._all if slot.doubtful]

    def take(self, max_faces: int, embedding_dim: int, device: int | None = None) -> Slot:
        """A slot of this size on this GPU (None: in system memory), the one used last first (its pages are warm).

        Raises:
            OSError: none is free and no more can be made.
            ClientUnusable: the pool is closed.
        """
        with self._lock:
            if self.is_closed:
                raise closed()
            for slot in [slot for slot in reversed(self._free) if slot.device == device]:
                self._free.remove(slot)
                if (slot.max_faces, slot.embedding_dim) == (max_faces, embedding_dim):
                    return slot
                self._all.discard(slot)
                slot.close()
        slot = Slot(max_faces, embedding_dim) if device is None else CudaSlot(max_faces, embedding_dim, device)
        with self._lock:
            if not self.is_closed:
                self._all.add(slot)
                return slot
        slot.close()
        raise closed()

    def give(self, slot: Slot) -> None:
        """Take a slot back; a doubtful one is never handed out again."""
        if not slot.doubtful:
            with self._lock:
                self._free.append(slot)

    def discard(self, slot: Slot) -> None:
        """Close a slot that was taken, and is of no use."""
        with self._lock:
            self._all.discard(slot)
        slot.close()

    def forget(self, known: Collection[str]) -> None:
        """Unlink the doubtful slots that the server does not know: the one that did is gone, and its requests too."""
        with self._lock:
            gone = {slot for slot in self._all if slot.doubtful and slot.name not in known}
            self._all -= gone
        for slot in gone:
            slot.doubtful, slot.registered_with = False, None
            slot.close()

    def close(self) -> list[Slot]:
        """Close every slot; returns those to be unregistered: not those in use, and no doubtful ones."""
        with self._lock:
            self.is_closed = True
            slots, self._all, free, self._free = self._all, set(), set(self._free), []
        for slot in slots:
            slot.doubtful |= slot not in free
            slot.close()
        return [slot for slot in slots if slot.registered_with is not None and not slot.doubtful]
