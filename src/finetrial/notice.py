"""The notice before the end: SIGTERM, from a platform that takes the machine back or from the coordinator.

A worker that trains finishes its step, writes a checkpoint and leaves; elsewhere there is nothing to save, and
the signal does what it always does. Child side.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# What a shell gives for a process that SIGTERM ended.
EXIT_CODE = 128 + signal.SIGTERM


class _Notice:
    """The handler; one for all runs of a process."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: object) -> None:
        self.asked = True


@contextmanager
def termination_notice() -> Iterator[Callable[[], bool]]:
    """Hold SIGTERM back; the function given says whether one has come. Within another, it is the same notice.

    Nothing is held back where somebody else handles the signal (the inline engine's coordinator) or where
    Python allows no handlers (outside the main thread).
    """
    before = signal.getsignal(signal.SIGTERM)
    notice = before if isinstance(before, _Notice) else _Notice()
    mine = threading.current_thread() is threading.main_thread() and before is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, notice)
    try:
        yield lambda: notice.asked
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
