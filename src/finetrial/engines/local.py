"""A process of its own for every run, forked from one that has done the imports, where that is safe.

As isolated as `spawn` (session, memory, signals, log; it ends with its parent, and with all that it started),
without the imports of every run. Forking is safe from a process with one thread and no device opened
(see `nursery.py`), so it is done on Linux where there is no GPU driver; elsewhere, and where the nursery
cannot be had, this is a fresh Python. docs/decisions/0006 has the reasons.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetrial import processes
from finetrial.plugins import Exit
from finetrial.records import RunSpec

GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri/renderD128", "/dev/dxg")
READY_SECONDS = 120.0
POLL_SECONDS = 0.02


@dataclass
class Forked:
    """A worker that a nursery forked; once ended, a zombie until it is let go: its id is nobody else's."""

    pid: int
    nursery: Nursery
    code: int | None = None  # once it has ended
    let_go: bool = False


class Nursery:
    """This side of one nursery process: asks it for workers, and hears of their ends."""

    def __init__(self, threads: int):
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "finetrial.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a worker says the same in its log
            env=processes.child_environment(threads),
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._answers = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._requests, False)
        self._pending = b""
        self._count = 0
        self._answered: dict[int, Forked | None] = {}  # request -> its worker, not yet given out
        self._running: dict[int, Forked] = {}  # process id -> worker
        self.ready = False  # until it has imported everything
        self.gone = False

    def usable(self) -> bool:
        """Wait until it is ready; False if it cannot be had."""
        deadline = time.monotonic() + READY_SECONDS
        while not self.ready and not self.gone and time.monotonic() < deadline:
            self.listen(0.5)
        return self.ready and not self.gone

    def start(self, run_folder: Path, threads: int) -> Forked | None:
        """A new worker; None if there is none to be had from here."""
        self._count += 1
        number, deadline = self._count, time.monotonic() + READY_SECONDS
        request = {
            "start": number, "folder": str(run_folder), "log": str(run_folder / "log.txt"),
            "cwd": str(Path.cwd()), "environment": processes.child_environment(threads),
        }  # fmt: skip
        try:
            self._send(request)
            while number not in self._answered and not self.gone:
                self.listen(0.5)
                if number not in self._answered and time.monotonic() > deadline:  # stopped, or stuck
                    self.end()
        except BaseException:  # a worker that nobody knows of must not run
            self.end()
            raise
        return self._answered.pop(number, None)

    def let_go(self, worker: Forked) -> None:
        """The id of an ended worker may be given to another process now."""
        worker.let_go = True
        self._send({"let_go": worker.pid})

    def listen(self, seconds: float) -> None:
        """Take in what the nursery has said."""
        while not self.gone and select.select([self._answers], [], [], seconds)[0]:
            data = os.read(self._answers, 65536)
            if not data:
                self.gone = True
                self.process.kill()
                self.process.wait()
            self._pending += data
            *lines, self._pending = self._pending.split(b"\n")
            for line in lines:
                self._take(json.loads(line))
            seconds = 0

    def _take(self, answer: dict[str, Any]) -> None:
        if "ready" in answer:
            self.ready = True
        elif "started" in answer:
            worker = Forked(answer["pid"], self)
            self._answered[answer["started"]] = self._running[worker.pid] = worker
        elif "failed" in answer:
            self._answered[answer["failed"]] = None
        else:
            self._running.pop(answer["ended"]).code = answer["code"]

    def _send(self, request: dict[str, Any]) -> None:
        data = json.dumps(request).encode() + b"\n"
        try:
            while data:  # an environment may be longer than a pipe takes at once
                if not select.select([], [self._requests], [], READY_SECONDS)[1]:  # stopped, or stuck
                    self.end()
                    return
                data = data[os.write(self._requests, data) :]
        except BrokenPipeError:
            self.listen(0)

    def end(self) -> None:
        """End it, and with it every worker that still runs."""
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()
        self.gone = True


class Local:
    """Workers forked from a nursery, which is started with the first run; else fresh Pythons."""

    def __init__(self) -> None:
        self.fresh = processes.FreshPython()
        self.nursery: Nursery | None = None
        self._key: Any = None
        self.forking = sys.platform.startswith("linux") and not any(map(os.path.exists, GPU_DRIVERS))

    def start(self, run_folder: Path, spec: RunSpec) -> Forked | processes.Handle:
        for _ in range(2 if self.forking else 0):  # twice: the nursery may have been killed since the last run
            nursery = self._nursery(spec.how.threads)
            if not nursery.usable():
                nursery.end()
                self.forking = False
                break
            worker = nursery.start(run_folder, spec.how.threads)
            if worker is not None:
                processes.go_first_when_memory_runs_out(worker.pid)
                return worker
        return self.fresh.start(run_folder, spec)

    def _nursery(self, threads: int) -> Nursery:
        """The nursery, made anew where there is none or what a Python fixes at its start has changed."""
        # The thread, too: the nursery ends with the one that started it.
        key = (threading.get_ident(), sys.executable, processes.child_environment(threads))
        if self.nursery is None or self.nursery.gone or self._key != key:
            self.nursery, self._key = Nursery(threads), key
        return self.nursery

    def poll(self, handle: Forked | processes.Handle) -> Exit | None:
        if isinstance(handle, processes.Handle):
            return self.fresh.poll(handle)
        handle.nursery.listen(0)
        if handle.code is not None:
            if not handle.let_go:
                processes.end_group(handle.pid, signal.SIGKILL)  # whatever the worker left behind
                handle.nursery.let_go(handle)
            return processes.exit_of(handle.code)
        if handle.nursery.gone:
            processes.end_group(handle.pid, signal.SIGKILL)
            return Exit(None, reason="the process that it was forked from was killed, and it with that")
        return None

    def ask(self, handle: Forked | processes.Handle) -> None:
        if isinstance(handle, processes.Handle):
            self.fresh.ask(handle)
        else:
            self._signal(handle, signal.SIGTERM)

    def stop(self, handle: Forked | processes.Handle, grace_seconds: float) -> None:
        if isinstance(handle, processes.Handle):
            self.fresh.stop(handle, grace_seconds)
            return
        if self.poll(handle) is not None:
            return
        started = processes.descendants(handle.pid)
        self._signal(handle, signal.SIGTERM)
        if not self._ends_within(grace_seconds, handle):
            self._signal(handle, signal.SIGKILL)
        processes.kill_each(started)  # those that left the group
        if not self._ends_within(processes.KILL_SECONDS, handle) and processes.has_ended(handle.pid):
            handle.nursery.end()  # it does not tell

    @staticmethod
    def _signal(handle: Forked, number: signal.Signals) -> None:
        """To the worker and its group; it may not have its own yet."""
        processes.end_group(handle.pid, number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(handle.pid, number)

    def _ends_within(self, seconds: float, handle: Forked) -> bool:
        deadline = time.monotonic() + seconds
        while self.poll(handle) is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True


PLUGIN = Local()
