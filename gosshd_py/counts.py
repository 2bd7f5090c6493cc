"""What is counted: connections, sessions, penalties; by one process, or by several that share them.

Shared counts are approximate: names are hashed to cells, and two that fall into one are counted
together. What one process writes the others only read, so nothing waits and nothing is locked.
"""

from __future__ import annotations

import mmap
import time
from collections import Counter
from dataclasses import dataclass, field

CELLS = 1 << 20
"""Cells for names that are counted at a time; there are some thousands of these at most."""

TIMES = 1 << 20
"""Cells for penalties, of which an attack can cause many: few innocent sources may share one."""


class Counts:
    """How often each name was added, less how often it was removed."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, name: str) -> None:
        """Count one more."""
        self._counts[name] += 1

    def remove(self, name: str) -> None:
        """Count one less."""
        self._counts[name] -= 1
        if not self._counts[name]:
            del self._counts[name]

    def of(self, name: str) -> int:
        """How many there are of this name."""
        return self._counts[name]

    def total(self) -> int:
        """How many there are in all."""
        return self._counts.total()


class SharedCounts(Counts):
    """The same for several processes: made before they are forked, then each calls `mine`."""

    def __init__(self, processes: int) -> None:
        super().__init__()
        # The last cell of each row is its total. Only what is touched takes memory.
        self._maps = [mmap.mmap(-1, 4 * (CELLS + 1)) for _ in range(processes)]
        self._rows = [memoryview(cells).cast("i") for cells in self._maps]
        self._row = self._rows[0]

    def mine(self, process: int) -> None:
        """Count in this process's row, from nothing: what was there is of one that has died."""
        self._row = self._rows[process]
        self._maps[process].madvise(mmap.MADV_REMOVE)

    def add(self, name: str) -> None:
        """Count one more."""
        self._row[hash(name) % CELLS] += 1
        self._row[CELLS] += 1

    def remove(self, name: str) -> None:
        """Count one less."""
        self._row[hash(name) % CELLS] -= 1
        self._row[CELLS] -= 1

    def of(self, name: str) -> int:
        """How many there are of this name, and of those that share its cell."""
        cell = hash(name) % CELLS
        return sum(row[cell] for row in self._rows)

    def total(self) -> int:
        """How many there are in all."""
        return sum(row[CELLS] for row in self._rows)


class Times:
    """Until when something holds for each name (monotonic clock), and whether it is in force.

    Bounded: the one that was set first makes room.
    """

    def __init__(self, most: int = 65536) -> None:
        self._most = most
        self._times: dict[str, tuple[float, bool]] = {}

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._times)

    def get(self, name: str) -> tuple[float, bool]:
        """Until when, and whether; now and not where nothing was set, or its time has passed."""
        now = time.monotonic()
        until, active = self._times.get(name, (now, False))
        if until > now:
            return until, active
        self._times.pop(name, None)
        return now, False

    def set(self, name: str, until: float, active: bool) -> None:
        """Let it hold until then."""
        self._times.pop(name, None)  # to its place among the latest
        if len(self._times) >= self._most:
            del self._times[next(iter(self._times))]
        self._times[name] = (until, active)


class SharedTimes(Times):
    """The same for several processes. The clock is the machine's, so all mean the same by a time."""

    def __init__(self, processes: int) -> None:
        super().__init__()
        self._rows = [memoryview(mmap.mmap(-1, 16 * TIMES)).cast("d") for _ in range(processes)]
        self._row = self._rows[0]

    def mine(self, process: int) -> None:
        """Write in this process's row. What is there still holds: it was deserved."""
        self._row = self._rows[process]

    def get(self, name: str) -> tuple[float, bool]:
        """Until when, and whether, by the process that says the latest."""
        now, cell = time.monotonic(), 2 * (hash(name) % TIMES)
        until = max(row[cell] for row in self._rows)
        if until <= now:
            return now, False
        return until, any(row[cell + 1] > now for row in self._rows)

    def set(self, name: str, until: float, active: bool) -> None:
        """Let it hold until then."""
        cell = 2 * (hash(name) % TIMES)
        self._row[cell] = until
        self._row[cell + 1] = until if active else 0.0


@dataclass
class Counted:
    """What is counted on a server, by one process or by all of them together."""

    open: Counts = field(default_factory=Counts)
    """Connections, by source."""
    waiting: Counts = field(default_factory=Counts)
    """Those that have not logged in, by source."""
    sessions: Counts = field(default_factory=Counts)
    """By account."""
    penalties: Times = field(default_factory=Times)
    """By source."""
