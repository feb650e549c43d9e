"""Processes of runs on this machine: started in their own session, watched, ended with all that they started.

Serves the engines `spawn` and `local`. A child ends with its parent (see `worker.follow_parent`) and is killed
before its parent when memory runs out.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from finetrial.plugins import Exit
from finetrial.records import RunSpec

# A child that the kernel should end before anything else when memory runs out (-1000 .. 1000).
OUT_OF_MEMORY_SCORE = "900"
# What a worker ends with that has not begun, because another process still works in its folder (EX_TEMPFAIL).
HELD_CODE = 75
MEMORY_EVENTS = ("memory.events", "memory.oom_control")  # of both versions of control groups
KILL_SECONDS = 20.0  # from SIGKILL to the end, at most: a process may be stuck in a disk's or a GPU's driver


class Handle(NamedTuple):
    pid: int
    process: subprocess.Popen[bytes]


class FreshPython:
    """`python -m finetrial.worker` in a new session, output to the run's log."""

    def start(self, run_folder: Path, spec: RunSpec) -> Handle:
        with (run_folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                # -P: a file in the working folder (random.py, datasets.py) must not stand in for a module.
                [sys.executable, "-P", "-m", "finetrial.worker", str(run_folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment(spec.how.threads, spec.how.gpu),
                start_new_session=True,
            )
        go_first_when_memory_runs_out(process.pid)
        return Handle(process.pid, process)

    def poll(self, handle: Handle) -> Exit | None:
        code = handle.process.poll()
        if code is None:
            return None
        end_group(handle.pid, signal.SIGKILL)  # whatever the child left behind
        return exit_of(code)

    def ask(self, handle: Handle) -> None:
        end_group(handle.pid, signal.SIGTERM)

    def stop(self, handle: Handle, grace_seconds: float) -> None:
        started = descendants(handle.pid)
        end_group(handle.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            handle.process.wait(timeout=grace_seconds)
        end_group(handle.pid, signal.SIGKILL)
        kill_each(started)  # those that left the group
        with contextlib.suppress(subprocess.TimeoutExpired):  # else it is left: nobody can end it
            handle.process.wait(timeout=KILL_SECONDS)


def has_ended(pid: int) -> bool:
    """Whether a process is no more, but for what its parent has not taken note of yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def gpus(devices: Path = Path("/dev")) -> tuple[str, ...]:
    """This machine's NVIDIA GPUs, as CUDA_VISIBLE_DEVICES names them; none unless there are several to use."""
    found = [str(number) for number, _ in enumerate(devices.glob("nvidia[0-9]*"))]
    if found and "CUDA_VISIBLE_DEVICES" in os.environ:
        found = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return tuple(found) if len(found) > 1 else ()


def control_groups(controller: str, root: Path = Path("/")) -> list[Path]:
    """The folders of this process's control group (a container, a service, a job) and of all those around it.

    The innermost first; of both versions of control groups, whichever has the controller (`memory`, `cpu`).
    `root`: where /proc and /sys are.
    """
    lines: list[str] = []
    with contextlib.suppress(OSError):  # not Linux
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    inside = {"": Path(), controller: Path()}  # by controller; version 2 has one hierarchy for all
    for number, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        for name in controllers.split(","):
            if name == controller or (not name and number == "0"):
                inside[name] = Path(*[part for part in path.split("/") if part and part != ".."])
    mount = root / "sys/fs/cgroup"
    # Seen from within a container, a group may be named as it is outside, where it is not to be found.
    return [mount / name / group for name, path in inside.items() for group in (path, *path.parents)]


def cores(root: Path = Path("/")) -> int:
    """Processor cores that this process may use: those it may run on, or fewer by its container's quota."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in control_groups("cpu", root):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # of both versions
            with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                quota, period = map(int, " ".join((group / file).read_text() for file in files).split())
                if quota > 0 and period > 0:
                    found = min(found, math.ceil(quota / period))
    return found


def memory_limits(root: Path = Path("/")) -> Iterator[int]:
    """Bytes that this process's control group, and each around it, may take; none where there is no limit."""
    for group in control_groups("memory", root):
        for file in ("memory.max", "memory.limit_in_bytes"):  # of both versions
            with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                yield int((group / file).read_text())


def child_environment(threads: int, gpu: str | None = None) -> dict[str, str]:
    """This process's environment, with what every run's process is given."""
    # NumPy's own threads, which it would start at import: a process that has them cannot be forked from. On
    # other machines torch may compute with OpenBLAS, too, and keeps its threads.
    numpy_threads = {"OPENBLAS_NUM_THREADS": "1"} if platform.machine() in ("x86_64", "AMD64") else {}
    return {
        **os.environ,
        **numpy_threads,
        **({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}),
        "FINETRIAL_PARENT": str(os.getpid()),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic cuBLAS
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "0",  # a plug-in that goes through a set does so in the same order every time
    }


def go_first_when_memory_runs_out(pid: int) -> None:
    """Have the kernel end this process before its coordinator; not everywhere, and only a preference."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text(OUT_OF_MEMORY_SCORE)


def memory_kills(root: Path = Path("/")) -> int:
    """Processes that were killed for want of memory: of this control group, or, if it does not say, of all.

    0 where the system does not say either.
    """
    groups = [group / file for file in MEMORY_EVENTS for group in control_groups("memory", root)]
    for file in (*groups, root / "proc/vmstat"):
        with contextlib.suppress(OSError, StopIteration, ValueError):
            lines = file.read_text().splitlines()
            return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
    return 0


def exit_of(code: int) -> Exit:
    """A return code in words; negative means ended by that signal."""
    if code < 0:
        return Exit(code, reason=f"killed by {_signal_name(-code)}")
    if code == 128 + signal.SIGTERM:
        return Exit(code, reason="asked to end; it left a checkpoint")
    if code == HELD_CODE:
        return Exit(code, reason="another process still works in its folder")
    return Exit(code, reason=f"exit code {code}" if code else None)


def end_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have no name
        return f"signal {number}"


def descendants(pid: int) -> list[psutil.Process]:
    """Everything that a process has started and that still runs, whatever group it is in."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_each(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
