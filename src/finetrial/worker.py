"""`python -m finetrial.worker RUN_FOLDER`: one isolated process per run.

Reads the spec, does it, writes the result or the failure; knows nothing of searches, reports or other runs.
Exit code 0 when a result was written, 1 when a failure was; anything else is a crash.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import sys
import traceback
from pathlib import Path

from finetrial import plugins
from finetrial.errors import DoesNotFit, FinetrialError, OutOfMemory, disk_fault
from finetrial.lease import FileLock
from finetrial.records import Failure, Outcome
from finetrial.secrets_guard import hidden_output
from finetrial.store import RunFolder

PARENT_VARIABLE = "FINETRIAL_PARENT"
PR_SET_PDEATHSIG = 1
# PyTorch raises a plain RuntimeError when the CPU's memory does not suffice (c10/core/CPUAllocator.cpp).
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: "


def main(argument: str) -> int:
    """Do the run in a folder; the process's exit code."""
    follow_parent()
    return work(RunFolder(Path(argument).resolve()))


def follow_parent() -> None:
    """End when the coordinator does: no orphan may go on writing into a run that is started again."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(1)


def work(folder: RunFolder) -> int:
    """Do the run under its lock. Also called by the inline engine, in the coordinator's own process."""
    with hidden_output(sys.stdout, sys.stderr):
        return _work(folder)


def _work(folder: RunFolder) -> int:
    lock = FileLock(folder.lock_file)
    holder = lock.acquire(wait_seconds=10.0)
    if holder is not None:
        sys.stderr.write(f"another process ({holder}) is still working in {folder.path}\n")
        return 1
    try:
        return _do(folder)
    finally:
        lock.release()


def _do(folder: RunFolder) -> int:
    spec = folder.spec()
    if folder.result_file.exists():
        return 0
    attempt = max((a.number for a in folder.attempt_records()), default=1)
    plugins.make_importable(Path(spec.how.base))
    try:
        import numpy
        import torch

        torch.set_num_threads(spec.how.threads)
        # Nothing here draws from these; a plug-in may, and then the same in every process that does this run.
        random.seed(spec.seeds.data_order)
        numpy.random.seed(spec.seeds.data_order % 2**32)  # noqa: NPY002 - the global stream is the point
        # Warned of, not refused: an operation without a deterministic form costs bit-equality, not the run.
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Nor is memory filled that is written before it is read, which that would have.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore[missing-attribute]
        from finetrial import dropout, stages

        dropout.install()

        sys.stderr.write(f"attempt {attempt}: {stages.describe(spec, folder.path)}\n")
        folder.event(
            "begins", attempt=attempt, pid=os.getpid(), host=socket.gethostname(), settings=spec.settings
        )
        result = stages.run(spec, folder)
        folder.write_result(result)
    except Exception as error:  # noqa: BLE001 - the one place: whatever happened becomes a typed failure
        kind, reason = classify(error)
        if kind in ("bug", "out_of_memory"):
            traceback.print_exc()
        else:
            sys.stderr.write(f"{kind}: {reason}\n")
        failure = Failure(
            run_id=spec.run_id, kind=kind, reason=reason, log_tail=folder.log_tail(), attempt=attempt,
            final=isinstance(error, DoesNotFit),
        )  # fmt: skip
        folder.write_failure(failure)
        _say_end(folder, kind, reason)
        return 1
    _say_end(folder, result.outcome, result.reason)
    left = None if spec.may_go_on else folder.drop_checkpoint()
    if left is not None:
        sys.stderr.write(f"{left}\n")
    return 0


def _say_end(folder: RunFolder, outcome: Outcome, reason: str | None) -> None:
    """Into the structured log; the record is written by now, so a full disk changes nothing."""
    try:
        folder.event("ends", outcome=outcome, reason=reason)
    except OSError as error:
        sys.stderr.write(f"{folder.events_file}: {error}\n")


def classify(error: Exception) -> tuple[Outcome, str]:
    """Which outcome an exception is, and one line of reason."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    told = isinstance(error, OutOfMemory | MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if told or (isinstance(error, RuntimeError) and CPU_OUT_OF_MEMORY in line):
        return "out_of_memory", f"out of memory: {line}"
    if isinstance(error, FinetrialError):
        return "refused", str(error)
    fault = disk_fault(error) if isinstance(error, OSError) else None
    if fault is not None:
        return "refused", f"{fault}; mend that and run the same command again"
    return "bug", f"{type(error).__name__}: {line}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
