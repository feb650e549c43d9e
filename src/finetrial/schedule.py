"""Run specs to finished folders: claim, start, watch, resume, give up. Parent side; knows no phase.

A lane is a generator of specs, or of several at once that do not depend on one another: it is asked for more
only when all that it gave have ended for good, so what it proposes may depend on what came out. What goes side
by side, of one lane and of several, is `packing.py`'s to say.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from finetrial import lease as leases
from finetrial import loaded, processes
from finetrial.errors import FinetrialError, Incomplete, RunsFailed
from finetrial.packing import Packing, stacks
from finetrial.plugins import Engine, Exit
from finetrial.progress import Progress
from finetrial.records import Failure, Outcome, RunRecord, RunSpec
from finetrial.store import Home, RunFolder
from finetrial.under_way import (
    BESIDE,
    COORDINATOR_ENDED,
    Held,
    Lane,
    Process,
    Queue,
    Running,
    Working,
    claim,
    close,
    launch,
    leads,
    may_share,
    release,
    time_limit,
)

POLL_SECONDS = 0.05
# From SIGTERM to SIGKILL, for a checkpoint of some gigabytes: within the 30 s that SLURM and Kubernetes grant.
# With processes.KILL_SECONDS, and what a renewal is late, it is less than a lease may be old.
GRACE_SECONDS = 25.0
# Failures that a later `finetrial run` tries again: the cause lies outside the run and may be gone.
TRIED_AGAIN: frozenset[Outcome] = frozenset({"bug", "refused", "cancelled"})
# Failures that only `--retry-failed` tries again: the run had its chances, or would fail the same way.
GIVEN_UP: frozenset[Outcome] = frozenset({"crashed", "timed_out", "lost", "out_of_memory"})
# Endings without a result that are resumed at once, up to the cap on attempts.
RESUMED: frozenset[Outcome] = frozenset({"crashed", "timed_out", "lost"})
# A run that ran out of memory goes on with half as much at once, so many times at most.
MOST_HALVINGS = 12
# Such an ending is the coordinator's doing, not the run's, and does not count towards the cap.
PUT_OFF = "put off: the runs beside it leave it too little memory"


class Ending(NamedTuple):
    """How an attempt ended: what it was, why, and what of a failure's record bears on what comes next."""

    outcome: Outcome
    reason: str | None
    final: bool = False
    own_budget: bool = False
    less_helps: bool = True
    began: bool = True  # not where another process holds it, or one that was to share its process
    holder: str | None = None  # the process that holds it


@dataclass(frozen=True)
class Scheduler:
    """Drives lanes of runs on one engine, as many at a time as `packing` says."""

    home: Home
    engine: Engine
    packing: Packing
    attempts: int
    progress: Progress
    on_finished: Callable[[RunRecord], None]
    tried_again: frozenset[Outcome] = TRIED_AGAIN
    check_room: Callable[[], None] = lambda: None  # raises where there is none for another run
    clock: Working = field(default_factory=Working)
    held: Held = field(default_factory=Held)

    def run(self, lanes: Sequence[Lane]) -> None:
        """Finish every run of every lane; a run that has ended is not started again.

        Raises:
            RunsFailed: a run ended by a fault of the program; the study stops and the message has the log.
            FinetrialError: a run was refused: what the study names is not there.
            Incomplete: a person stopped it, or finetrial changed meanwhile; running again goes on from here.
        """
        with self.clock:
            self._run([Queue(lane) for lane in lanes])

    def _run(self, queues: Sequence[Queue]) -> None:
        running: list[Running] = []
        idle = 0
        try:
            while self._fill(queues, running) or running:
                idle = 0 if running else self._ask_again(queues, idle)
                for run in list(running):
                    self._renew(running)
                    ended = self._watch(run, last=sum(other.process is run.process for other in running) == 1)
                    if ended is None:
                        continue
                    self._renew(running)  # ending one over its limit takes its time, and so does what follows
                    running.remove(run)
                    self._end(run, ended)
                    for queue in queues:
                        queue.waits = False
                self._make_room(running)
                time.sleep(POLL_SECONDS if running else 0)
        except KeyboardInterrupt:
            raise Incomplete("stopped; everything finished is kept: run the same command to go on") from None
        finally:
            self._cancel(running)  # none, unless something was raised

    def _ask_again(self, queues: Sequence[Queue], idle: int) -> int:
        """Have lanes that wait for each other asked again, though nothing runs; how often in a row that was."""
        for queue in queues:
            queue.waits = False
        if idle > len(queues):  # each could have given way to the next by now
            raise FinetrialError(
                "nothing runs, and what is left waits for runs that nobody does. That is a fault of finetrial: "
                "please report it; what is finished is kept"
            )
        return idle + 1

    def _fill(self, queues: Sequence[Queue], running: list[Running]) -> bool:
        """Start what may go side by side, of the lanes with the fewest runs first; whether anything is left."""
        while True:
            self._renew(running)
            for queue in queues:
                queue.ready.sort(key=self.held.rests)
            # The first among equals, and first those that need not wait for another process.
            by_need = sorted(queues, key=lambda q: (bool(q.ready) and self.held.rests(q.ready[0]), q.under_way))
            queue = next((queue for queue in by_need if queue.next() is not None), None)
            if queue is None:
                break
            spec = queue.ready[0]
            folder = self.home.run(spec.run_id)
            if self._has_ended(folder):
                self._tidy_up(folder)
                self.on_finished(folder.record())
                queue.ready.pop(0)
                continue
            if self.held.rests(spec):
                if running:
                    break
                self.held.check(spec)
            specs = self._stack(queue)
            place = self.packing.place(specs, leads(running))
            if place is None:
                break
            specs = [spec.model_copy(update={"how": spec.how.model_copy(update=place)}) for spec in specs]
            self.check_room()
            running += self._start(queue, specs)
            here = {id(run.process): run.process for run in running if run.spec.how.gpu == specs[0].how.gpu}
            for process in here.values():
                process.beside = max(process.beside, len(here) - 1)
            names = {spec.run_id for spec in specs}
            queue.ready = [waiting for waiting in queue.ready if waiting.run_id not in names]
            queue.under_way += len(specs)
        return any(not queue.over for queue in queues)

    def _has_ended(self, folder: RunFolder) -> bool:
        """Whether a run has ended for good, as far as this command goes."""
        failure = folder.failure()
        ended = failure is not None and not failure.goes_on and failure.kind not in self.tried_again
        return folder.result() is not None or ended

    def _stack(self, queue: Queue) -> list[RunSpec]:
        """The queue's first run, and those that are trained together with it."""
        first, *others = (spec for spec in queue.ready if spec not in self.held or spec is queue.ready[0])
        if self.packing.stack == 1 or not stacks(first) or first in self.held:
            return [first]
        most = may_share(self.home.run(first.run_id), self.packing.stack)
        alike = ((spec, self.home.run(spec.run_id)) for spec in others if spec.arm == first.arm)
        ready = (
            spec for spec, folder in alike if may_share(folder, most) == most and not self._has_ended(folder)
        )
        found = [first, *itertools.islice(ready, most - 1)]
        share = {"stacked": len(found)}
        return [spec.model_copy(update={"how": spec.how.model_copy(update=share)}) for spec in found]

    def _start(self, queue: Queue, specs: Sequence[RunSpec]) -> list[Running]:
        """Start runs in one process, the first one's."""
        process = Process(self.engine)
        runs: list[Running] = []
        try:
            for spec in specs:
                folder = self.home.run(spec.run_id)
                runs.append(claim(queue, spec, folder, process))
            runs[0].folder.stack_with([run.folder for run in runs[1:]])
            launch(runs, self.clock)
        except BaseException:  # no process, a full disk, Ctrl-C: what nobody would watch must not run
            self._stop(process, GRACE_SECONDS)
            for run in runs:
                with contextlib.suppress(OSError, FinetrialError):  # what was raised says more
                    release(run, "cancelled", "interrupted while it was started")
            raise
        for run in runs:
            self.progress.started(run.spec)
        return runs

    def _make_room(self, running: list[Running]) -> None:
        """Put off the newest process where what all of them say they take is more than there is."""
        folder = self.packing.too_many(leads(running))
        if folder is None:
            return
        newest = next(run.process for run in running if run.folder.path == folder.path)
        self._stop(newest, GRACE_SECONDS)
        self.packing.ended(folder)
        for run in [run for run in running if run.process is newest]:
            self._renew(running)
            running.remove(run)
            if run.folder.result() is not None or run.folder.failure() is not None:  # it has got there first
                self._end(run, Exit(None, outcome="crashed", reason=PUT_OFF))
            else:
                release(run, "cancelled", PUT_OFF, counts=False)
                self.progress.finished(run.folder.record())
                run.queue.again(run.spec)

    def _end(self, run: Running, ended: Exit) -> None:
        """Settle a run whose process has ended, or its part of it; to be resumed, it waits for a place."""
        over = self._settle(run, ended)
        if over:
            run.queue.under_way -= 1
        else:
            self.progress.finished(run.folder.record())  # for now
            run.queue.again(run.spec)

    def _tidy_up(self, folder: RunFolder) -> None:
        """Do for an ended run what its worker or its coordinator did not live to do."""
        leases.drop_stale(folder.lease_file)
        result, failure = folder.result(), folder.failure()
        if result is not None:
            self._drop_checkpoint(folder)  # a failed run's is what `--retry-failed` goes on from
        for attempt in folder.attempt_records():
            if attempt.outcome is None and result is not None:
                close(folder, attempt, result.outcome, None, COORDINATOR_ENDED)
            elif attempt.outcome is None and failure is not None and failure.attempt == attempt.number:
                close(folder, attempt, failure.kind, None, COORDINATOR_ENDED)

    def _watch(self, run: Running, *, last: bool) -> Exit | None:
        """How a run ended, or None while it goes on; one over its time limit is ended here.

        `last`: of its process, whose end is waited for.
        """
        ended = run.process.poll() if last else run.ended()
        if ended is not None:
            return ended
        if run.deadline is not None and self.clock.now() > run.deadline:
            self._stop(run.process, GRACE_SECONDS)
            limit = time_limit(run.spec) or 0
            return Exit(None, "timed_out", f"took longer than its limit of {limit:g} s")
        self.progress.tick(run.spec, run.last_metrics())
        return None

    def _renew(self, running: Sequence[Running]) -> None:
        """Renew every lease that is due: as often as anything was done that may take its time."""
        for run in running:
            if not run.renew(time.monotonic()):
                raise Incomplete(f"{run.spec.run_id} was taken over by another coordinator; leave it to that")

    def _settle(self, run: Running, ended: Exit) -> bool:
        """Record how an attempt ended; True if that ends the run, False if it is to be resumed."""
        self.packing.ended(run.folder)
        ending = self._outcome(run, ended)
        outcome, reason = ending.outcome, ending.reason
        if not ending.began:
            close(run.folder, run.attempt, outcome, ended.code, reason, counts=False)
            leases.release(run.folder.lease_file, run.lease)
            if ending.holder is not None and self.held.found(run.spec, ending.holder, run.folder.lock_file):
                self.progress.note(f"{run.spec.run_id}: {reason}; waiting for its end")
            return False
        self.held.let_go(run.spec)
        if self._is_crowded(run, ending):
            run.folder.failure_file.unlink(missing_ok=True)
            close(run.folder, run.attempt, "cancelled", ended.code, f"{reason}; {BESIDE}", counts=False)
            leases.release(run.folder.lease_file, run.lease)
            self.progress.note(f"{run.spec.run_id}: {reason}, and not alone; tried again with fewer beside it")
            return False
        # Killed after it had got further: that may happen any number of times, for the steps are finite.
        further = run.folder.checkpoint_step() > run.attempt.from_step
        further = (further or run.folder.kept_outputs() > run.kept_outputs) and outcome != "timed_out"
        if run.stacked and outcome in RESUMED:  # it may be another's doing
            reason, further = f"{reason}; {BESIDE}", True
        past = run.folder.current_attempts()
        count = sum(a.outcome in RESUMED and a.counts for a in past) + (not further)
        halved = sum(a.outcome == "out_of_memory" for a in past)
        if outcome == "out_of_memory":
            in_vain = not ending.less_helps and run.process.beside == 0
            gave_up, further = ending.final or in_vain or halved >= MOST_HALVINGS, True
        else:
            gave_up = outcome in RESUMED and not further and count >= self.attempts
        close(run.folder, run.attempt, outcome, ended.code, reason, counts=not further, gave_up=gave_up)
        leases.release(run.folder.lease_file, run.lease)
        if outcome in RESUMED or outcome == "out_of_memory":
            if not gave_up:
                less = ", with half as much at once" if outcome == "out_of_memory" else ""
                self.progress.note(f"{run.spec.run_id}: {outcome} ({reason}); resuming{less}")
                return False
            if outcome != "out_of_memory":
                why = "" if outcome == "timed_out" else "; its log says why"
                reason = f"{reason}, {count} time{'s' * (count > 1)}{why}"
            run.folder.write_failure(
                Failure(
                    run_id=run.spec.run_id, kind=outcome, attempt=run.attempt.number, final=True,
                    reason=reason or outcome, log_tail=run.folder.log_tail(),
                )
            )  # fmt: skip
        record = run.folder.record()
        # Where a process still works, that is its own to do; it may not have lived to.
        for folder in run.process.folders if run.process.exit is not None else ():
            if folder.result_file.exists():
                self._drop_checkpoint(folder)
        self.progress.finished(record)
        self.on_finished(record)
        self._stop_on_fault(record)
        return True

    def _is_crowded(self, run: Running, ending: Ending) -> bool:
        """Whether memory may suffice with fewer beside it; of runs that are stacked, for half as many."""
        if ending.outcome != "out_of_memory" or ending.final:
            return False
        return run.stacked or (not ending.own_budget and self.packing.back_off(run.process.beside))

    def _drop_checkpoint(self, folder: RunFolder) -> None:
        left = None if folder.spec().may_go_on else folder.drop_checkpoint()  # else it is for its lane to say
        if left is not None:
            self.progress.note(left)

    def _outcome(self, run: Running, ended: Exit) -> Ending:
        """What an ending was, by what the folder holds.

        The exit code alone proves nothing; but killed while the system killed for want of memory is just that.
        """
        result = run.folder.result()
        if result is not None:
            return Ending(result.outcome, result.reason)
        failure = run.folder.failure()
        if failure is not None and failure.attempt == run.attempt.number:
            return Ending(failure.kind, failure.reason, failure.final, failure.own_budget, failure.less_helps)
        if ended.code == processes.HELD_CODE:
            pid = run.holder()
            # Of a stack the first: its worker asks for one lock after the other, and ends at one that is held.
            if pid is not None and run.folder is run.first_held():
                holder = f"process {pid}" if pid >= 0 else "another process"
                return Ending("cancelled", f"{holder} still works on it", began=False, holder=holder)
            if run.stacked:
                return Ending("cancelled", "another run of its process is held", began=False)
        if ended.code == -signal.SIGKILL and processes.memory_kills() > run.memory_kills:
            return Ending("out_of_memory", "killed by the system, which ran out of memory")
        if ended.outcome is not None:
            return Ending(ended.outcome, ended.reason)
        return Ending("crashed", ended.reason or "it ended without a result")

    @staticmethod
    def _stop_on_fault(record: RunRecord) -> None:
        failure = record.failure
        if failure is None or failure.kind not in ("bug", "refused"):
            return
        loaded.check()  # an upgrade meanwhile would explain it
        if failure.kind == "refused":
            raise FinetrialError(f"{record.spec.arm}: {failure.reason}")
        tail = "\n".join(f"    {line}" for line in failure.log_tail.splitlines()[-12:])
        raise RunsFailed(
            f"{failure.run_id} stopped the study: {failure.reason}\n{tail}\n"
            f"  `finetrial show {failure.run_id}` has its log; run again to try it again"
        )

    def _stop(self, process: Process, grace_seconds: float) -> None:
        left_behind = process.stop(grace_seconds)
        if left_behind is not None:
            self.progress.note(left_behind)

    def _cancel(self, running: Sequence[Running]) -> None:
        deadline = time.monotonic() + GRACE_SECONDS  # of all together: so long a platform may wait
        for run in running:
            with contextlib.suppress(OSError):
                run.process.ask()
        for run in running:
            with contextlib.suppress(OSError):
                self._stop(run.process, max(0.0, deadline - time.monotonic()))
        for run in running:
            with contextlib.suppress(OSError, FinetrialError):
                release(run, "cancelled", "stopped with its coordinator")
