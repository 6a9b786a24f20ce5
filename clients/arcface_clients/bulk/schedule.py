"""Which unit is handed out next: new ones, lost ones, and at the end second copies of the slowest. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from arcface_clients.bulk.units import Unit
from arcface_clients.ray_cluster import TRIES

COPIES = 2  # of a unit under way at a time


@dataclass
class _UnderWay:
    unit: Unit
    copies: int
    deaths: int


class Schedule:
    """The units of a job between its list and its workers; holds those under way, never the whole list."""

    def __init__(self, pending: Iterator[tuple[int, Unit]]) -> None:
        """`pending`: number and unit of what is to do."""
        self._pending = pending
        self._exhausted = False
        self._again: deque[int] = deque()  # lost, to be handed out once more
        self._under_way: dict[int, _UnderWay] = {}  # in the order in which they were handed out first

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to hand out, and nothing is under way."""
        return self._exhausted and not self._under_way

    def take(self, is_idle: bool = True) -> tuple[int, Unit] | None:
        """What a worker does next; None: nothing, now. Only one that `is_idle`, with no unit at all, gets a copy."""
        while self._again:
            number = self._again.popleft()
            if number in self._under_way:
                return self._hand_out(number)
        if not self._exhausted:
            entry = next(self._pending, None)
            if entry is not None:
                number, unit = entry
                self._under_way[number] = _UnderWay(unit, 1, 0)
                return number, unit
            self._exhausted = True
        slow = (n for n, each in self._under_way.items() if each.copies < COPIES) if is_idle else iter(())
        number_of_slow = next(slow, None)
        return None if number_of_slow is None else self._hand_out(number_of_slow)

    def is_wanted(self, number: int) -> bool:
        """Whether a unit is still to be done; False for the second copy that is finished."""
        return number in self._under_way

    def finished(self, number: int) -> None:
        """A unit's part is written."""
        self._under_way.pop(number, None)

    def lost(self, number: int, killed: bool) -> Unit | None:
        """A copy will give nothing. The unit, if it is given up now: it killed as many workers as it may.

        `killed`: its worker died over it, and not over another one.
        """
        each = self._under_way.get(number)
        if each is None:
            return None
        each.copies -= 1
        each.deaths += killed
        if each.deaths >= TRIES:
            del self._under_way[number]
            return each.unit
        if each.copies == 0:
            self._again.append(number)
        return None

    def _hand_out(self, number: int) -> tuple[int, Unit]:
        each = self._under_way[number]
        each.copies += 1
        return number, each.unit
