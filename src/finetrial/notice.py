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


@contextmanager
def termination_notice() -> Iterator[Callable[[], bool]]:
    """Hold SIGTERM back; the function given says whether one has come.

    Nothing is held back where somebody else handles the signal (the inline engine's coordinator) or where
    Python allows no handlers (outside the main thread).
    """
    asked = False

    def note(number: int, frame: object) -> None:
        nonlocal asked
        asked = True

    in_main = threading.current_thread() is threading.main_thread()
    mine = in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: asked
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
