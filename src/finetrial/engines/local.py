"""A process of its own for every run, on this machine, in its own session and process group.

The child ends with its parent (see `worker.follow_parent`), is killed before its parent when memory runs
out, and is ended together with everything it started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import psutil

from finetrial.plugins import Exit
from finetrial.records import RunSpec

# A child that the kernel should end before anything else when memory runs out (-1000 .. 1000).
OUT_OF_MEMORY_SCORE = "900"


class Handle(NamedTuple):
    pid: int
    process: subprocess.Popen[bytes]


class Local:
    """`python -m finetrial.worker` in a new session, output to the run's log."""

    def start(self, run_folder: Path, spec: RunSpec) -> Handle:
        environment = {
            **os.environ,
            "FINETRIAL_PARENT": str(os.getpid()),
            "OMP_NUM_THREADS": str(spec.how.threads),
            "MKL_NUM_THREADS": str(spec.how.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic cuBLAS
            "PYTHONUNBUFFERED": "1",
            "PYTHONHASHSEED": "0",  # a plug-in that goes through a set does so in the same order every time
        }
        with (run_folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                # -P: a file in the working folder (random.py, datasets.py) must not stand in for a module.
                [sys.executable, "-P", "-m", "finetrial.worker", str(run_folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        with contextlib.suppress(OSError):  # not everywhere, and only a preference
            Path(f"/proc/{process.pid}/oom_score_adj").write_text(OUT_OF_MEMORY_SCORE)
        return Handle(process.pid, process)

    def poll(self, handle: Handle) -> Exit | None:
        code = handle.process.poll()
        if code is None:
            return None
        self._end_group(handle.pid, signal.SIGKILL)  # whatever the child left behind
        if code < 0:
            return Exit(code, reason=f"killed by {_signal_name(-code)}")
        return Exit(code, reason=f"exit code {code}" if code else None)

    def stop(self, handle: Handle, grace_seconds: float) -> None:
        started = _descendants(handle.pid)
        self._end_group(handle.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            handle.process.wait(timeout=grace_seconds)
        self._end_group(handle.pid, signal.SIGKILL)
        for process in started:  # those that left the group
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        handle.process.wait()

    @staticmethod
    def _end_group(pid: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have no name
        return f"signal {number}"


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


PLUGIN = Local()
