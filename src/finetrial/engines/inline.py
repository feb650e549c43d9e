"""The same process, one run at a time: for a debugger, and where processes cannot be started."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from finetrial.plugins import Exit
from finetrial.records import RunSpec


class Handle(NamedTuple):
    pid: int
    code: int


class Inline:
    """Does the run inside `start`; no time limit and no isolation."""

    def start(self, run_folder: Path, spec: RunSpec) -> Handle:
        from finetrial import worker
        from finetrial.store import RunFolder

        folder = RunFolder(run_folder)
        # Line by line: a failure quotes the log's last lines from the disk.
        with (
            folder.log_file.open("a", buffering=1) as log,
            contextlib.redirect_stderr(log),
            contextlib.redirect_stdout(log),
        ):
            code = worker.work(folder)
        return Handle(os.getpid(), code)

    def poll(self, handle: Handle) -> Exit | None:
        return Exit(handle.code)

    def stop(self, handle: Handle, grace_seconds: float) -> None:
        return None


PLUGIN = Inline()
