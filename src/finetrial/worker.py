"""`python -m finetrial.worker RUN_FOLDER`: one isolated process, of one run or of several that are stacked.

Reads the spec, does it, writes the result or the failure; knows nothing of searches, reports or runs of other
processes. Exit code 0 when a result was written, 1 when a failure was, 143 when it was told to end and left a
checkpoint (of several the highest), HELD_CODE when another process holds the run; anything else is a crash.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from finetrial import plugins
from finetrial.errors import (
    DoesNotFit,
    FinetrialError,
    ModelError,
    OutOfMemory,
    OverBudget,
    disk_fault,
    of_the_system,
)
from finetrial.lease import FileLock
from finetrial.processes import HELD_CODE
from finetrial.records import Failure, Outcome, Result, RunSpec
from finetrial.secrets_guard import hidden_output
from finetrial.store import RunFolder

PARENT_VARIABLE = "FINETRIAL_PARENT"
PR_SET_PDEATHSIG = 1
LOCK_SECONDS = 10.0  # that the process which had the run before may take to end
# What a plain RuntimeError says where memory does not suffice: the CPU's (c10/core/CPUAllocator.cpp), and a
# GPU's for a context or a library's workspace, which are not PyTorch's to allocate.
OUT_OF_MEMORY = ("DefaultCPUAllocator: ", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


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
    folders = [folder, *folder.stacked_with()]
    locks = {each.path: FileLock(each.lock_file) for each in folders}
    with contextlib.ExitStack() as held:
        for each in folders:
            try:
                holder = locks[each.path].acquire(wait_seconds=LOCK_SECONDS)
            except (OSError, FinetrialError) as error:  # the server of locks may be away
                return could_not_begin(folder, error)
            if holder is not None:
                sys.stderr.write(f"another process ({holder}) is still working in {each.path}\n")
                return HELD_CODE
            held.callback(locks[each.path].release)
        waiting = [each for each in folders if not each.result_file.exists()]
        if len(waiting) > 1:
            return _do_together(waiting, lambda each: locks[each.path].release())
        return _do(waiting[0]) if waiting else 0


def _do(folder: RunFolder) -> int:
    """One run."""
    try:
        spec = folder.spec()
    except OSError as error:
        return could_not_begin(folder, error)
    try:
        stages = prepare(spec)
        _say_begin(folder, spec)
        outcome: Result | BaseException = stages.run(spec, folder)
    except Exception as error:  # noqa: BLE001 - the one place: whatever happened becomes a typed failure
        outcome = error
    return _conclude(folder, spec, outcome)


def _do_together(folders: Sequence[RunFolder], let_go: Callable[[RunFolder], None]) -> int:
    """Several trainings at once; each is concluded, and let go of, when it ends. The highest exit code."""
    specs, codes = [folder.spec() for folder in folders], [0]

    def conclude(index: int, outcome: Result | BaseException) -> None:
        codes.append(_conclude(folders[index], specs[index], outcome, output=folders[0]))
        let_go(folders[index])

    for folder in folders[1:]:
        with folder.log_file.open("a", encoding="utf-8") as log:
            log.write(f"done together with {folders[0].path.name}, in one process: its log has the output\n")
    try:
        stages = prepare(specs[0])
        from finetrial import prepared, stacking
        from finetrial.notice import termination_notice
        from finetrial.process_memory import share_process

        share_process(len(folders))
        for folder, spec in zip(folders, specs, strict=True):
            _say_begin(folder, spec)
        trainings = [stages.training(spec, folder) for folder, spec in zip(folders, specs, strict=True)]
    except Exception as error:  # noqa: BLE001 - likewise
        for index in range(len(folders)):
            conclude(index, error)
    else:
        try:
            with prepared.shared(), termination_notice():  # of all, until the last has ended
                stacking.together(trainings, conclude)
        finally:
            share_process(1)
    return max(codes)


def import_all() -> ModuleType:
    """Import all that a run may ask for, which later might be of another version; the module of the stages."""
    from finetrial import language, linear_probe, low_rank, reading, represent, stages, updates  # noqa: F401 - later

    for kind in ("tasks", "methods", "probes"):
        for name in plugins.names(kind):
            plugins.load(kind, name)
    return stages


def prepare(spec: RunSpec) -> ModuleType:
    """Make this process what every run's is; the module that knows the stages."""
    plugins.make_importable(Path(spec.how.base))
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
    from finetrial import attention, dropout, process_memory

    process_memory.give_back()
    dropout.install()
    attention.install()
    return import_all()


def _conclude(
    folder: RunFolder, spec: RunSpec, outcome: Result | BaseException, *, output: RunFolder | None = None
) -> int:
    """Write what came out, or why nothing did; the exit code. `output`: whose log has the output."""
    if isinstance(outcome, SystemExit):  # told to end: a checkpoint is there
        return outcome.code if isinstance(outcome.code, int) else 1
    try:
        if isinstance(outcome, BaseException):
            raise outcome
        folder.write_result(outcome)
    except Exception as error:  # noqa: BLE001 - likewise
        kind, reason = classify(error)
        if kind in ("bug", "out_of_memory"):
            traceback.print_exc()
        else:
            sys.stderr.write(f"{kind}: {reason}\n")
        failure = Failure(
            run_id=spec.run_id, kind=kind, reason=reason, log_tail=(output or folder).log_tail(),
            # What does not fit beside others may fit alone.
            attempt=_attempt(folder), final=isinstance(error, DoesNotFit) and spec.how.stacked == 1,
            own_budget=isinstance(error, OverBudget) or (kind == "out_of_memory" and _is_own_limit(folder)),
            less_helps=not isinstance(error, ModelError),
        )  # fmt: skip
        folder.write_failure(failure)
        _say_end(folder, kind, reason)
        return 1
    _say_end(folder, outcome.outcome, outcome.reason)
    left = None if spec.may_go_on else folder.drop_checkpoint()
    if left is not None:
        sys.stderr.write(f"{left}\n")
    return 0


def could_not_begin(folder: RunFolder, error: Exception) -> int:
    """Write why a run could not even begin; the exit code."""
    kind, reason = classify(error)
    sys.stderr.write(f"{kind}: {reason}\n")
    failure = Failure(run_id=folder.path.name, kind=kind, reason=reason, attempt=_attempt(folder))
    folder.write_failure(failure)
    return 1


def _is_own_limit(folder: RunFolder) -> bool:
    from finetrial import process_memory

    return process_memory.is_own_limit(folder.fit())


def _attempt(folder: RunFolder) -> int:
    return max((a.number for a in folder.attempt_records()), default=1)


def _say_begin(folder: RunFolder, spec: RunSpec) -> None:
    from finetrial import stages

    attempt = _attempt(folder)
    sys.stderr.write(f"attempt {attempt}: {stages.describe(spec, folder.path)}\n")
    folder.event("begins", attempt=attempt, pid=os.getpid(), host=socket.gethostname(), settings=spec.settings)


def _say_end(folder: RunFolder, outcome: Outcome, reason: str | None) -> None:
    """Into the structured log; the record is written by now, so a full disk changes nothing."""
    try:
        folder.event("ends", outcome=outcome, reason=reason)
    except OSError as error:
        sys.stderr.write(f"{folder.events_file}: {error}\n")


def classify(error: Exception) -> tuple[Outcome, str]:
    """Which outcome an exception is, and one line of reason."""
    for found in (error, error.__cause__):  # which may have ended a model's loading
        if found is not None and _is_of_memory(found):
            return "out_of_memory", _line(found)
    if isinstance(error, FinetrialError):
        return "refused", str(error)
    fault = disk_fault(error if isinstance(error, OSError) else of_the_system(error))
    if fault is not None:
        return "refused", f"{fault}; mend that and run the same command again"
    return "bug", f"{type(error).__name__}: {_line(error)}"


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, OutOfMemory | MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in _line(error) for text in OUT_OF_MEMORY)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
