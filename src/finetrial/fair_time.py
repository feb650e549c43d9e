"""Time that one of several trainings in a process is charged: its share of what passes. Child side.

Alone, these are the ordinary clocks.
"""

from __future__ import annotations

import time


class FairClock:
    """Wall and CPU seconds, each divided among so many."""

    def __init__(self) -> None:
        self.among = 1
        self._so_far = (0.0, 0.0)
        self._since = (time.perf_counter(), time.process_time())

    def now(self) -> tuple[float, float]:
        """(Wall, CPU) seconds that each has been charged since the process began."""
        wall, cpu = time.perf_counter() - self._since[0], time.process_time() - self._since[1]
        return self._so_far[0] + wall / self.among, self._so_far[1] + cpu / self.among

    def share(self, among: int) -> None:
        """From now on so many are at it."""
        self._so_far = self.now()
        self._since = (time.perf_counter(), time.process_time())
        self.among = max(1, among)


FAIR = FairClock()
