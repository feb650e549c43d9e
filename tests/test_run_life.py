"""The life of a run's folder, in any order of events: no result is lost, no damage passes for a number.

A state machine over the real store, leases and scheduler. What an attempt does is scripted and done in this
process; a coordinator that dies is one that did what it does up to there and left its lease to nobody.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from finetrial import files, sealed, setting_aside
from finetrial import lease as leases
from finetrial.errors import FinetrialError, Incomplete
from finetrial.packing import Packing
from finetrial.plugins import Exit
from finetrial.progress import Progress
from finetrial.records import Attempt, Failure, Outcome, Result, RunRecord, RunSpec
from finetrial.schedule import GIVEN_UP, RESUMED, TRIED_AGAIN, Scheduler
from finetrial.sealed import Damaged
from finetrial.store import Home, RunFolder
from scripted import COST, make_spec

SPEC = make_spec()
ATTEMPTS = 2  # that may get no further before a run is given up
RECORDS = ("spec.json", "result.json", "failure.json", "attempts/1.json", "attempts/2.json")
HOW_DAMAGED = ("flip", "cut", "zero")
# What one attempt may do, and how its process then ends.
ENDINGS: dict[str, Exit] = {
    "done": Exit(0),
    "crashed": Exit(-9, reason="killed"),
    "further": Exit(-9, reason="killed"),
    "timed_out": Exit(None, "timed_out", "too long"),
    "out_of_memory": Exit(1),
    "refused": Exit(1),
    "bug": Exit(1),
}


class Handle(NamedTuple):
    pid: int
    ending: Exit


class Acting:
    """An engine whose attempts do, in order, what a script says; when it is at its end they are done."""

    def __init__(self, script: list[str], scores: list[float]):
        self.script, self.scores, self.started = list(script), scores, 0

    def start(self, run_folder: Path, spec: RunSpec) -> Handle:
        act = self.script[self.started] if self.started < len(self.script) else "done"
        self.started += 1
        folder = RunFolder(run_folder)
        number = max(attempt.number for attempt in folder.attempt_records())
        if act == "done":
            folder.write_result(result_of(spec, self.scores.pop()))
        elif act == "further":
            write_checkpoint(folder, folder.checkpoint_step() + 1)
        elif act in ("out_of_memory", "refused", "bug"):
            folder.write_failure(failure_of(act, number))
        return Handle(os.getpid(), ENDINGS[act])

    def poll(self, handle: Handle) -> Exit:
        return handle.ending

    def stop(self, handle: Handle, grace_seconds: float) -> None:
        pass


def result_of(spec: RunSpec, score: float) -> Result:
    return Result(run_id=spec.run_id, outcome="done", score=score, cost=COST)


def failure_of(kind: Outcome, number: int) -> Failure:
    return Failure(run_id=SPEC.run_id, kind=kind, reason="why", attempt=number)


def write_checkpoint(folder: RunFolder, step: int) -> None:
    """A checkpoint as far as the parent knows one: a committed folder, the older one gone."""
    folder.checkpoint.mkdir(exist_ok=True)
    temporary, final = folder.checkpoint / ".step.tmp", folder.checkpoint / f"step-{step:08d}"
    temporary.mkdir()
    (temporary / "state.json").write_text(f'{{"step": {step}}}')
    files.commit_folder(temporary, final)
    for path in folder.checkpoint.iterdir():
        if path != final:
            shutil.rmtree(path)


class RunLife(RuleBasedStateMachine):
    """What is known beside the files: the result and what was set aside, byte for byte, and every claim."""

    claims = Bundle("claims")

    @initialize()
    def begin(self) -> None:
        self.place = Path(tempfile.mkdtemp())
        self.home = Home(self.place / "home")
        self.folder = self.home.run(SPEC.run_id)
        self.result: bytes | None = None  # as written; None: none was, or a fault from outside took it
        self.broken: dict[str, bytes] = {}  # damaged records: what they hold now
        self.set_aside: list[dict[str, bytes]] = []
        self.held: str | None = None  # the token of the lease, while its holder is there
        self.last: str | None = None  # the token of the lease, whether its holder is or not
        self.scores = [float(n) for n in range(100)]

    def teardown(self) -> None:
        shutil.rmtree(self.place)

    # -- what a coordinator and its runs do ----------------------------------------------------------------

    @rule(script=st.lists(st.sampled_from(sorted(ENDINGS)), max_size=3), retry_failed=st.booleans())
    def coordinate(self, script: list[str], retry_failed: bool) -> None:
        """`finetrial run` for this one run; what it does is what the files say, and nothing else."""
        said = setting_aside.damaged(self.home)
        assert bool(said) == bool(self.broken)
        self._expect_set_aside(said)
        before = self._record()
        engine = Acting(script, self.scores)
        tried_again = TRIED_AGAIN | (GIVEN_UP if retry_failed else frozenset())
        ended: list[RunRecord] = []
        scheduler = Scheduler(self.home, engine, Packing(1), ATTEMPTS, Progress(), ended.append, tried_again)
        stopped = None
        try:
            scheduler.run([iter([SPEC])])
        except FinetrialError as error:
            stopped = error
        over = before is not None and (
            before.result is not None or (before.failure is not None and before.failure.kind not in tried_again)
        )
        if over:
            assert (engine.started, stopped) == (0, None)
            assert ended[0].result == before.result
        elif self.held is not None:
            assert isinstance(stopped, Incomplete)
            assert engine.started == 0
        else:
            assert engine.started > 0
            after = self.folder.record()
            done = [*script, "done"][: engine.started]
            assert after.outcome == (done[-1] if done[-1] != "further" else "crashed")
            assert len(after.attempts) == len(before.attempts if before else ()) + engine.started
            assert all(attempt.outcome is not None for attempt in after.attempts)
            assert leases.read(self.folder.lease_file) is None
            assert (stopped is not None) == (after.outcome in ("refused", "bug"))
            if after.outcome in RESUMED:
                last = max((a.number for a in after.attempts[:-1] if a.gave_up), default=0)
                assert after.attempts[-1].gave_up
                assert sum(a.counts for a in after.attempts[last:] if a.outcome in RESUMED) == ATTEMPTS
        if self.held is None:
            self.last = None
        self._remember()

    @precondition(lambda self: self.folder.path.exists() and not self.broken)
    @rule(further=st.booleans(), result=st.booleans(), elsewhere=st.booleans())
    def die(self, further: bool, result: bool, elsewhere: bool) -> None:
        """A coordinator and its worker die in an attempt, perhaps after a checkpoint or the result."""
        record = self.folder.record()
        if record.result is not None or record.failure is not None or self.held is not None:
            return
        lease = leases.claim(self.folder.lease_file)
        assert lease is not None
        number = len(record.attempts) + 1
        for attempt in record.attempts:
            if attempt.outcome is None:
                ended = attempt.model_copy(update={"outcome": "lost", "ended_at": 1.0, "counts": False})
                self.folder.write_attempt(ended)
        self.folder.write_attempt(Attempt(number=number, host="h", pid=1, started_at=0.0))
        files.append_json_line(self.folder.metrics_file, {"kind": "train", "step": number, "loss": 1.0})
        if further:
            write_checkpoint(self.folder, self.folder.checkpoint_step() + 1)
        if result:
            self.folder.write_result(result_of(SPEC, self.scores.pop()))
        self._lose(lease, elsewhere)
        self.last = lease.token
        self._remember()

    @rule(target=claims)
    def claim(self) -> leases.Lease | None:
        """Another coordinator asks for the run: it is had if and only if nobody live has it."""
        self.folder.create(SPEC) if not self.folder.path.exists() else None
        lease = leases.claim(self.folder.lease_file)
        assert (lease is None) == (self.held is not None)
        if lease is not None:
            self.held = self.last = lease.token
        return lease

    @rule(lease=claims)
    def renew(self, lease: leases.Lease | None) -> None:
        """Of all that ever claimed it one at most is told that it still has it."""
        if lease is not None:
            there = self._bytes(self.folder.lease_file)
            kept = leases.renew(self.folder.lease_file, lease)
            assert kept == (lease.token == self.last)
            if kept:  # back from where it was lost, and nobody has taken the run over
                self.held = lease.token
            assert kept or self._bytes(self.folder.lease_file) == there

    @rule(lease=consumes(claims))
    def release(self, lease: leases.Lease | None) -> None:
        if lease is not None:
            leases.release(self.folder.lease_file, lease)
            if lease.token == self.last:
                self.held = self.last = None
            assert (leases.read(self.folder.lease_file) is not None) == (self.last is not None)

    @rule(lease=claims, elsewhere=st.booleans())
    def lose(self, lease: leases.Lease | None, elsewhere: bool) -> None:
        """The holder's process, or its machine, is gone without a word."""
        if lease is not None and lease.token == self.held:
            self._lose(lease, elsewhere)
            self.held = None

    @precondition(lambda self: self.folder.path.exists())
    @rule(
        steps=st.lists(st.integers(1, 9), max_size=4), up_to=st.integers(0, 9), torn=st.sampled_from([0, 1, 3])
    )
    def metrics(self, steps: list[int], up_to: int, torn: int) -> None:
        """Lines written, the last perhaps cut short; a resumed run keeps those up to its checkpoint."""
        before = [line["step"] for line in files.json_lines(self.folder.metrics_file)]
        for step in steps:
            files.append_json_line(self.folder.metrics_file, {"kind": "train", "step": step, "loss": 1.0})
        if torn and steps:
            whole = self.folder.metrics_file.read_bytes()
            self.folder.metrics_file.write_bytes(whole[:-torn])
            steps = steps[:-1]
        self.folder.keep_metrics_up_to(up_to)
        after = [line["step"] for line in files.json_lines(self.folder.metrics_file)]
        assert after == [step for step in [*before, *steps] if step <= up_to]

    @rule()
    def drop_checkpoint(self) -> None:
        self.folder.drop_checkpoint()
        assert self.folder.checkpoint_step() == 0

    @rule()
    def second_coordinator(self) -> None:
        """Two commands on one folder: the second is told who has it."""
        refused = pytest.raises(Incomplete, match=f"worked on by process {os.getpid()}")
        with self.home.coordinate(), refused, self.home.coordinate():
            pass
        with self.home.coordinate():
            pass

    # -- faults from outside -------------------------------------------------------------------------------

    @rule(name=st.sampled_from(RECORDS), where=st.integers(0, 9999), how=st.sampled_from(HOW_DAMAGED))
    def damage(self, name: str, where: int, how: str) -> None:
        """A record's bytes change: the run is then refused by name, or nothing that it says has changed."""
        path = self.folder.path / name
        if not path.exists() or name in self.broken:
            return
        before = self._record()
        data = bytearray(path.read_bytes())
        place = where % len(data)
        if how == "flip":
            data[place] ^= 1 << (where % 7)
        elif how == "cut":
            del data[place:]
        else:
            data[place] = 0
        whole = path.read_bytes()
        path.write_bytes(data)
        after = self._record()
        if after is None:  # and `a_restart_reads_the_same` sees that it is named
            self.broken[name] = bytes(data)
        else:  # white space, or where and how it is done: no part of what the run is
            assert before is not None
            assert after._replace(spec=before.spec) == before
            path.write_bytes(whole)

    @rule()
    def take_aside(self) -> None:
        self._expect_set_aside(setting_aside.damaged(self.home))

    # -- what holds after every event ----------------------------------------------------------------------

    @invariant()
    def a_result_is_what_was_written(self) -> None:
        if "result.json" not in self.broken:
            assert self._bytes(self.folder.result_file) == self.result

    @invariant()
    def attempts_are_in_sequence(self) -> None:
        record = self._record()
        if record is not None:
            numbers = [attempt.number for attempt in record.attempts]
            assert numbers == list(range(1, len(numbers) + 1))
            assert all(attempt.outcome is not None for attempt in record.attempts[:-1])

    @invariant()
    def a_restart_reads_the_same(self) -> None:
        """State is in the files alone: whoever opens them anew sees what was seen."""
        if self.broken:
            with pytest.raises(Damaged) as raised:
                Home(self.home.path).run(SPEC.run_id).record()
            assert raised.value.path.relative_to(self.folder.path).as_posix() in self.broken
        elif self.folder.spec_file.exists():
            assert RunFolder(Path(str(self.folder.path))).record() == self.folder.record()

    @invariant()
    def what_was_set_aside_stays(self) -> None:
        for number, records in enumerate(self.set_aside, start=1):
            for name, content in records.items():
                kept = self.home.damaged / f"{SPEC.run_id}.{number}" / name
                assert kept.read_bytes() == content

    # ------------------------------------------------------------------------------------------------------

    def _record(self) -> RunRecord | None:
        with contextlib.suppress(Damaged):
            return self.folder.record() if self.folder.spec_file.exists() else None
        return None

    def _remember(self) -> None:
        self.result = self._bytes(self.folder.result_file)

    def _expect_set_aside(self, said: list[str]) -> None:
        if not self.broken:
            assert said == []
            return
        (sentence,) = said
        assert any(str(self.folder.path / name) in sentence for name in self.broken)
        result = {} if self.result is None or "result.json" in self.broken else {"result.json": self.result}
        self.set_aside.append({**result, **self.broken})
        self.broken, self.result, self.held, self.last = {}, None, None, None

    def _lose(self, lease: leases.Lease, elsewhere: bool) -> None:
        """Make a lease that of a process, or a machine, that is gone."""
        gone = {"process_started_at": 1.0}
        if elsewhere:
            gone = {"host": f"not-{socket.gethostname()}", "renewed_at": time.time() + 3600}  # by its clock
            leases.seen[lease.token] = (gone["renewed_at"], leases.STALE_SECONDS, time.monotonic())
        sealed.write(self.folder.lease_file, lease.model_copy(update=gone))

    @staticmethod
    def _bytes(path: Path) -> bytes | None:
        return path.read_bytes() if path.exists() else None


TestRunLife = RunLife.TestCase
TestRunLife.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
