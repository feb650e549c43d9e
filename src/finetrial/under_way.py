"""A run under way: its lane, its process, who holds it, and the record of this attempt at it. Parent side.

What becomes of it when it has ended is `schedule.py`'s.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from finetrial import lease as leases
from finetrial import processes
from finetrial.errors import Incomplete
from finetrial.plugins import Engine, Exit
from finetrial.records import Attempt, Failure, Outcome, RunSpec
from finetrial.store import RunFolder

# A run, or several that may go side by side; none of them: nothing before other lanes have got on.
Lane = Iterator[RunSpec | Sequence[RunSpec]]

RENEW_SECONDS = 10.0
RENEW_AGAIN_SECONDS = 1.0  # where the disk did not let it
HELD_SECONDS = 60.0  # that another process may take to let go of its run, where nothing else is left to do
HELD_REST_SECONDS, MOST_REST_SECONDS = 30.0, 600.0  # before such a run is tried again, where there is
ASKED_POLL_SECONDS = 0.02
PAUSE_SECONDS = 5.0  # a busy machine may keep a thread waiting for less than that
LOOK_SECONDS = 0.5
# Such an ending is the coordinator's doing, not the run's, and does not count towards the cap.
COORDINATOR_ENDED = "its coordinator ended before it"
STOPPED_WITH = "the process that it shared was stopped"
# Likewise, and such a run shares no process again, or, cancelled for want of memory, with half as many.
BESIDE = "not alone, so it is tried again with fewer beside it"


class Working:
    """A clock, entered to run, that stands still while everything does: a container or a job that is suspended.

    That is told by a thread that only looks at the time: what its coordinator is busy with itself is no pause,
    unless it keeps all threads from running.
    """

    def __init__(self) -> None:
        # How long it stood still until the last look, and when that was; not entered, it goes on as time does.
        self._seen = (0.0, math.inf)
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self._seen, self._over = (self._seen[0], time.monotonic()), threading.Event()
        threading.Thread(target=self._look, args=(self._over,), name="clock", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._seen = (self._stood_still(self._seen, time.monotonic()), math.inf)

    def now(self) -> float:
        """Seconds; a pause that has just ended is left out before the thread sees it."""
        seen = self._seen
        now = time.monotonic()
        return now - self._stood_still(seen, now)

    def _stood_still(self, seen: tuple[float, float], now: float) -> float:
        before, looked = seen
        gap = now - looked
        return before + gap if gap > PAUSE_SECONDS else before

    def _look(self, over: threading.Event) -> None:
        while not over.wait(LOOK_SECONDS):
            now = time.monotonic()
            self._seen = (self._stood_still(self._seen, now), now)


class Held:
    """Runs that another process still holds: one of an earlier command, or one that no signal ends.

    Such a run is begun again and again, which is waiting for that process; while others go on, with a rest.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[float, float, str]] = {}  # run id -> when first, when last, why it waits
        self._alone: float | None = None  # since when nothing else is left

    def __contains__(self, spec: RunSpec) -> bool:
        return spec.run_id in self._found

    def found(self, spec: RunSpec, holder: str, lock_file: Path) -> bool:
        """Whether that is new."""
        now, new = time.monotonic(), spec not in self
        first, *_ = self._found.get(spec.run_id, (now,))
        self._found[spec.run_id] = (first, now, f"{holder} still works on it and holds {lock_file}")
        return new

    def let_go(self, spec: RunSpec) -> None:
        """Take note that a run was begun and has ended: it was none of those that wait."""
        self._found.pop(spec.run_id, None)
        self._alone = None

    def rests(self, spec: RunSpec) -> bool:
        """Whether it was tried so lately, beside how long it has been held, that all else comes first."""
        if spec not in self:
            return False
        first, last, _ = self._found[spec.run_id]
        return time.monotonic() - last < min(max(HELD_REST_SECONDS, last - first), MOST_REST_SECONDS)

    def check(self, spec: RunSpec) -> None:
        """See that it is worth waiting for, as nothing else is left.

        Raises:
            Incomplete: it has been held for long since then.
        """
        _, last, why = self._found[spec.run_id]
        self._alone = time.monotonic() if self._alone is None else self._alone
        if last - self._alone > HELD_SECONDS:
            raise Incomplete(
                f"{spec.run_id} cannot begin: {why}; end that process, or wait for its end, then run the same "
                f"command again"
            )


@dataclass
class Queue:
    """A lane under way: what it gave and is not begun, and how many runs of it go on."""

    lane: Lane
    ready: list[RunSpec] = field(default_factory=list)
    under_way: int = 0
    over: bool = False
    waits: bool = False  # for other lanes: it is asked again when one of their runs has ended

    def next(self) -> RunSpec | None:
        """What may be begun next; nothing while that depends on what goes on."""
        while not self.ready and not self.under_way and not self.over and not self.waits:
            given = next(self.lane, None)
            if given is None:
                self.over = True
            elif not given:  # nothing yet
                self.waits = True
            else:
                self.ready = [given] if isinstance(given, RunSpec) else list(given)
        return self.ready[0] if self.ready else None

    def again(self, spec: RunSpec) -> None:
        """A run that was under way waits for a place, before the others."""
        alone = spec.how.model_copy(update={"stacked": 1})
        self.ready.insert(0, spec.model_copy(update={"how": alone}))
        self.under_way -= 1


@dataclass
class Process:
    """An engine's process, of one run or of several that are stacked; stopped once, its end seen once."""

    engine: Engine
    handle: Any = None  # None: not started
    exit: Exit | None = None
    folders: list[RunFolder] = field(default_factory=list)  # of its runs
    beside: int = 0  # the most other processes that there were on its GPU or machine while it ran
    asked: bool = False  # to end

    def poll(self) -> Exit | None:
        if self.exit is None and self.handle is not None:
            self.exit = self.engine.poll(self.handle)
        return self.exit

    def ask(self) -> None:
        """Ask it to end, where its engine can without waiting for it."""
        if self.handle is not None and self.poll() is None and hasattr(self.engine, "ask"):
            self.asked = True
            self.engine.ask(self.handle)

    def stop(self, grace_seconds: float) -> str | None:
        """End it; a warning if it is there all the same."""
        deadline = time.monotonic() + grace_seconds
        # To ask again would end at once one that writes its result: past its last step it takes no notice.
        while self.asked and self.handle is not None and self.poll() is None and time.monotonic() < deadline:
            time.sleep(ASKED_POLL_SECONDS)
        if self.handle is None or self.poll() is not None:
            return None
        self.engine.stop(self.handle, 0.0 if self.asked else grace_seconds)
        still_there = self.engine.poll(self.handle) is None
        self.exit = Exit(None, outcome="crashed", reason=STOPPED_WITH)
        if not still_there:
            return None
        return (
            f"{self.folders[0].path.name}: process {self.handle.pid} does not end, not even by SIGKILL (is it "
            f"stuck in a driver?); it is left behind, and its run waits for its end"
        )


@dataclass
class Running:
    """A run in progress: its folder, its process, who holds it, and until when it may take."""

    queue: Queue
    spec: RunSpec
    folder: RunFolder
    process: Process
    lease: leases.Lease
    attempt: Attempt
    renew_at: float
    memory_kills: int  # that the system had made before it
    kept_outputs: int  # parts of evaluations that it began with
    stacked: bool = False
    deadline: float | None = None  # by the scheduler's clock, known once its process is there
    renewed_at: float = field(default_factory=time.monotonic)

    def renew(self, now: float) -> bool:
        """Say that it is worked on, where that is due; False if another has taken it over.

        What the disk refuses is tried again for as long as others respect what was said last.
        """
        if now < self.renew_at:
            return True
        try:
            held = leases.renew(self.folder.lease_file, self.lease)
        except OSError:
            if now - self.renewed_at > leases.STALE_SECONDS - RENEW_SECONDS:
                raise
            self.renew_at = now + RENEW_AGAIN_SECONDS
            return True
        self.renewed_at, self.renew_at = now, now + RENEW_SECONDS
        return held

    def last_metrics(self) -> dict[str, Any] | None:
        """What it has told last, to be shown: nothing where that cannot be read."""
        with contextlib.suppress(OSError):
            return self.folder.last_metrics()
        return None

    def ended(self) -> Exit | None:
        """How it ended, or None while it goes on. One that is stacked ends before its process does."""
        ended = self.process.poll()
        if ended is None and self.stacked:
            failed = self.folder.failure()
            over = failed and failed.attempt == self.attempt.number and not self._ran_out_with_others(failed)
            if self.folder.result_file.exists() or over:
                return Exit(0)
        return ended

    def holder(self) -> int | None:
        """The last process that had the run's lock, if that is not its own; -1 where it does not say which."""
        return self._holder(self.folder)

    def first_held(self) -> RunFolder | None:
        """Of the runs of its process, the first whose lock its own did not get."""
        return next((each for each in self.process.folders if self._holder(each) is not None), None)

    def _holder(self, folder: RunFolder) -> int | None:
        pid = -1
        with contextlib.suppress(OSError):
            pid = leases.pid_in(folder.lock_file.read_bytes())
        return pid if pid != self.attempt.pid else None

    def _ran_out_with_others(self, failed: Failure) -> bool:
        """Whether it is out of memory once it had begun: so are the others soon, and until then it is held."""
        fit = self.folder.fit() if failed.kind == "out_of_memory" else None
        return fit is not None and fit.stacked == self.spec.how.stacked


def claim(queue: Queue, spec: RunSpec, folder: RunFolder, process: Process) -> Running:
    """Take a run, and record that another attempt begins.

    Raises:
        Incomplete: somebody else works on it.
    """
    if not folder.spec_file.exists():
        folder.create(spec)
    lease = leases.claim(folder.lease_file)
    if lease is None:
        held = leases.read(folder.lease_file)
        who = leases.describe(held) if held is not None else "another process"
        raise Incomplete(f"{spec.run_id} is being worked on elsewhere, by {who}; run again when it has ended")
    try:
        folder.failure_file.unlink(missing_ok=True)
        past = folder.attempt_records()
        for attempt in past:
            if attempt.outcome is None:  # whoever started it did not live to see its end
                close(folder, attempt, "lost", None, COORDINATOR_ENDED, counts=False)
        attempt = Attempt(
            number=max((attempt.number for attempt in past), default=0) + 1, host=socket.gethostname(), pid=0,
            started_at=time.time(), from_step=folder.checkpoint_step(), stacked=spec.how.stacked,
        )  # fmt: skip
        run = Running(
            queue, spec, folder, process, lease, attempt, time.monotonic() + RENEW_SECONDS,
            processes.memory_kills(), folder.kept_outputs(),
        )  # fmt: skip
        folder.create(spec)  # how it is done here: of one that another works on, that is the other's to say
        folder.write_attempt(attempt)
    except BaseException:
        # No caller has the lease yet: the run would be held for as long as this process lives.
        leases.release(folder.lease_file, lease)
        raise
    process.folders.append(folder)
    return run


def launch(runs: Sequence[Running], clock: Working) -> None:
    """Start the process of claimed runs."""
    process, first = runs[0].process, runs[0]
    process.handle = process.engine.start(first.folder.path, first.spec)
    for run in runs:
        limit = time_limit(run.spec)
        run.deadline = clock.now() + limit if limit is not None else None
        run.stacked = len(runs) > 1
        run.attempt = run.attempt.model_copy(update={"pid": process.handle.pid})
        run.folder.write_attempt(run.attempt)


def may_share(folder: RunFolder, most: int) -> int:
    """How many runs, this one among them, a process may do at once.

    Half as many as there were when memory did not suffice; one where a process may have died of its doing.
    """
    if folder.has_failed():
        return 1
    for attempt in folder.attempt_records():
        if (attempt.reason or "").endswith(BESIDE):
            most = min(most, attempt.stacked // 2 if attempt.outcome == "cancelled" else 1)
    return max(1, most)


def time_limit(spec: RunSpec) -> float | None:
    """Seconds that an attempt may take; trainings that share a process share its time."""
    return spec.how.limit_seconds * spec.how.stacked if spec.how.limit_seconds is not None else None


def leads(running: Sequence[Running]) -> list[RunFolder]:
    """The folder of the first run of every process."""
    return list({id(run.process): run.folder for run in reversed(running)}.values())[::-1]


def release(run: Running, outcome: Outcome, reason: str, *, counts: bool = True) -> None:
    """Let go of a run that nobody works on any more; if it has a result all the same, that is how it ended."""
    try:
        result = run.folder.result()
        close(run.folder, run.attempt, result.outcome if result else outcome, None, reason, counts=counts)
    finally:
        leases.release(run.folder.lease_file, run.lease)


def close(
    folder: RunFolder, attempt: Attempt, outcome: Outcome, code: int | None, reason: str | None, *,
    counts: bool = True, gave_up: bool = False,
) -> None:  # fmt: skip
    """Record how an attempt ended."""
    if any(a.number == attempt.number and a.outcome for a in folder.attempt_records()):
        return  # ended before, by a coordinator that took the run over
    ended = {"ended_at": time.time(), "outcome": outcome, "exit_code": code, "reason": reason}
    ended |= {"counts": counts, "gave_up": gave_up}
    folder.write_attempt(attempt.model_copy(update=ended))
