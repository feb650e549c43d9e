"""The notice to end: SIGTERM, of a platform that takes the machine back or of the coordinator, or SIGHUP.

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


NOTICES = (signal.SIGTERM, signal.SIGHUP)


class _Notice:
    """The handler; one for all runs of a process."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: object) -> None:
        self.asked = True


@contextmanager
def termination_notice() -> Iterator[Callable[[], bool]]:
    """Hold these signals back; the function given says whether one has come. Within another, it is the same.

    Nothing is held back where somebody else handles the signal (the inline engine's coordinator), where it is
    ignored (`nohup`), or where Python allows no handlers (outside the main thread).
    """
    before = {number: signal.getsignal(number) for number in NOTICES}
    notice = next((each for each in before.values() if isinstance(each, _Notice)), _Notice())
    main = threading.current_thread() is threading.main_thread()
    mine = [number for number, handler in before.items() if main and handler is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, notice)
    try:
        yield lambda: notice.asked
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
