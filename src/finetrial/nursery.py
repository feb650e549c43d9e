"""`python -m finetrial.nursery`: a process that has imported everything a worker needs, and forks workers.

Child side, for `engines/local.py`. A fork of it is a worker in milliseconds, and as much a process of its own
as a fresh one: its own session, memory, signals, environment and log, nothing open that is not its own. This
process does nothing but import, fork and tell of ends. It has one thread, which is what makes forking safe;
if the imports fail or leave more than one, it ends instead of getting ready.

Requests come as JSON lines on standard input, answers go out on standard output:

| request                                                | answer                                             |
|--------------------------------------------------------|----------------------------------------------------|
| (once the imports are done)                            | `{"ready": true}`                                  |
| `{"start": n, "folder", "log", "cwd", "environment"}`  | `{"started": n, "pid"}` or `{"failed": n, "why"}`  |
| (a worker ended; it stays a zombie until it is let go) | `{"ended": pid, "code"}`                           |
| `{"let_go": pid}`                                      |                                                    |
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from finetrial import worker
from finetrial.store import RunFolder

# What ends all of a service or a job at once. The workers end by it in their own time, with a checkpoint; with
# this process they would be killed. It is the coordinator's to end.
OUTLIVED = (signal.SIGTERM, signal.SIGHUP)
MOST_DESCRIPTORS = 65536  # closed one by one where the system does not list those that are open


def main() -> int:
    """Serve until standard input closes; 1 if forking would not be safe. In a fork: do its run."""
    worker.follow_parent()
    handled = {number: signal.signal(number, signal.SIG_IGN) for number in OUTLIVED}
    requests, answers = 0, os.dup(1)
    os.dup2(2, 1)  # whatever an import prints
    worker.import_all()
    if _threads() != 1:
        return 1
    gc.collect()
    gc.freeze()  # what is here by now stays: a worker's collections need not touch (and so copy) its pages
    _answer(answers, {"ready": True})
    return _serve(requests, answers, handled)


def _threads() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()


def _serve(requests: int, answers: int, handled: dict[signal.Signals, Any]) -> int:
    """Until standard input closes: 0. In a fork: what the worker's exit code is to be.

    `handled`: how a worker takes the signals that this process outlives.
    """
    wake_reader, wake_writer = os.pipe()
    os.set_blocking(wake_writer, False)
    os.set_blocking(wake_reader, False)
    signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # wakes the loop
    running: set[int] = set()
    pending = b""
    while True:
        ready, _, _ = select.select([requests, wake_reader], [], [])
        if wake_reader in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake_reader, 4096)
            _tell_ends(running, answers)
        if requests not in ready:
            continue
        data = os.read(requests, 65536)
        if not data:
            return 0  # the coordinator is gone; so are, by their own rule, its workers
        pending += data
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            request = json.loads(line)
            if "let_go" in request:
                os.waitpid(request["let_go"], os.WNOHANG)
            elif _fork(request["start"], running, answers, handled):
                return _be_a_worker(request)


def _fork(number: int, running: set[int], answers: int, handled: dict[signal.Signals, Any]) -> bool:
    """Make a worker and tell of it; True in the worker itself."""
    nursery = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, OUTLIVED)  # one that comes meanwhile waits for its handler
    try:
        pid = os.fork()
        if pid == 0:
            for each, handler in handled.items():
                signal.signal(each, handler)
            os.environ[worker.PARENT_VARIABLE] = str(nursery)
            return True
    except OSError:  # no room for another process: it is begun in a fresh Python
        _answer(answers, {"failed": number})
        return False
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, OUTLIVED)
    running.add(pid)
    _answer(answers, {"started": number, "pid": pid})
    return False


def _tell_ends(running: set[int], answers: int) -> None:
    """Tell of every worker that has ended. It is not waited for, so that its id means nobody else yet."""
    for pid in sorted(running):
        info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if info is not None:
            running.discard(pid)
            code = info.si_status if info.si_code == os.CLD_EXITED else -info.si_status
            _answer(answers, {"ended": pid, "code": code})


def _be_a_worker(request: dict[str, Any]) -> int:
    """In the fork: become what `python -m finetrial.worker` would have been, and do the run."""
    parent = os.environ[worker.PARENT_VARIABLE]
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        os.chdir(request["cwd"])  # first: where the nursery began, what follows may mean something else
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, number in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(descriptor, number)
    except OSError as error:
        return worker.could_not_begin(RunFolder(Path(request["folder"])), error)
    close_from(3)
    os.environ.clear()
    os.environ.update(request["environment"], **{worker.PARENT_VARIABLE: parent})
    return worker.main(request["folder"])


def close_from(first: int) -> None:
    """Close every descriptor from one on, without going through all that there might be: a thousand million."""
    try:
        numbers = [int(path.name) for path in Path("/proc/self/fd").iterdir()]
    except OSError:
        most = os.sysconf("SC_OPEN_MAX")
        os.closerange(first, most if 0 < most < MOST_DESCRIPTORS else MOST_DESCRIPTORS)
        return
    for number in numbers:
        if number >= first:
            with contextlib.suppress(OSError):  # the one that they were listed by
                os.close(number)


def _answer(descriptor: int, answer: dict[str, Any]) -> None:
    os.write(descriptor, json.dumps(answer).encode() + b"\n")  # shorter than a pipe's atomic write


if __name__ == "__main__":
    sys.exit(main())
