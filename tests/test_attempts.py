"""Endings without a result: what is resumed, what is given up, and what a later command tries again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetrial import lease
from finetrial.errors import Incomplete
from finetrial.lease import FileLock
from finetrial.packing import Packing
from finetrial.plugins import Exit
from finetrial.processes import HELD_CODE
from finetrial.records import Attempt, Failure, How, MethodSpec, Result, RunSpec
from finetrial.schedule import COORDINATOR_ENDED, GIVEN_UP, MOST_HALVINGS
from finetrial.store import RunFolder
from scripted import COST, SLEEP, Scripted, done, failed, gone, make_spec


def test_a_crashed_run_is_resumed_in_its_folder(bench):
    spec = bench.spec(0, "import os; os.abort()", "raise SystemExit(7)", done(make_spec(0)))
    bench.run(iter([spec]))
    assert bench.outcomes(spec) == ["crashed", "crashed", "done"]
    attempts = bench.home.run(spec.run_id).attempt_records()
    assert [a.reason for a in attempts] == ["killed by SIGABRT", "exit code 7", None]
    assert [a.exit_code for a in attempts] == [-6, 7, 0]
    assert len({a.pid for a in attempts}) == 3
    assert len(bench.progress.notes) == 2


def test_a_run_that_always_crashes_is_given_up_and_the_next_goes_on(bench):
    spec = bench.spec(0, "import sys; sys.stderr.write('the reason why'); sys.exit(3)")
    after = bench.spec(1)
    bench.run(iter([spec, after]), attempts=2)
    assert bench.outcomes(spec) == ["crashed", "crashed"]
    failure = bench.home.run(spec.run_id).failure()
    assert (failure.kind, failure.attempt) == ("crashed", 2)
    assert failure.reason == "exit code 3, 2 times; its log says why"
    assert failure.log_tail.count("the reason why") == 2
    assert bench.outcomes(after) == ["done"]
    bench.run(iter([spec, after]), attempts=2)
    assert bench.engine.started.count(spec.run_id) == 2  # given up for good


def test_a_run_that_got_further_each_time_it_was_killed_is_never_given_up(bench):
    def killed(step):
        return f"import os; os.makedirs('checkpoint/step-{step:08d}', exist_ok=True); os.kill(os.getpid(), 9)"

    spec = bench.spec(0, *[killed(step) for step in (5, 10, 15, 15, 20)], done(make_spec(0)))
    bench.run(iter([spec]), attempts=2)
    assert bench.outcomes(spec) == ["crashed"] * 5 + ["done"]
    attempts = bench.home.run(spec.run_id).attempt_records()
    assert [a.from_step for a in attempts] == [0, 5, 10, 15, 15, 20]
    assert [a.counts for a in attempts[:5]] == [False, False, False, True, False]
    stuck = bench.spec(1, killed(5))
    bench.run(iter([stuck]), attempts=2)
    assert bench.outcomes(stuck) == ["crashed"] * 3  # the first got further, two did not


def test_a_run_that_was_given_up_has_all_its_attempts_again_when_a_person_asks(bench):
    spec = bench.spec(0, *["raise SystemExit(3)"] * 5, done(make_spec(0)))
    bench.run(iter([spec]), attempts=2)
    bench.run(iter([spec]), attempts=2, retry=True)
    assert bench.outcomes(spec) == ["crashed"] * 4
    assert bench.home.run(spec.run_id).failure().attempt == 4
    bench.run(iter([spec]), attempts=2, retry=True)
    assert bench.outcomes(spec) == ["crashed"] * 5 + ["done"]
    assert bench.home.run(spec.run_id).failure() is None


@pytest.mark.parametrize("kind", sorted(GIVEN_UP))
def test_every_way_to_be_given_up_can_be_retried_and_is_not_by_itself(bench, kind):
    spec = bench.spec(0, failed(make_spec(0), kind, "why", final=True), done(make_spec(0)))
    bench.run(iter([spec]), attempts=1)
    bench.run(iter([spec]), attempts=1)
    assert bench.engine.started.count(spec.run_id) == 1
    bench.run(iter([spec]), attempts=1, retry=True)
    assert bench.finished[-1].outcome == "done"


def test_out_of_memory_goes_on_at_once_and_costs_no_attempt(bench):
    short = [failed(make_spec(0), "out_of_memory", "too much", attempt) for attempt in (1, 2)]
    spec = bench.spec(0, *short, done(make_spec(0)))
    bench.run(iter([spec]), attempts=1)
    assert bench.outcomes(spec) == ["out_of_memory", "out_of_memory", "done"]
    assert [attempt.counts for attempt in bench.finished[0].attempts] == [False, False, True]
    assert bench.progress.notes[0].endswith("out_of_memory (too much); resuming, with half as much at once")


def test_out_of_memory_goes_on_where_its_coordinator_was_killed_before_it_could(bench):
    spec = bench.spec(0, done(make_spec(0)))
    folder = bench.home.run(spec.run_id)
    folder.create(spec)
    ended = Attempt(
        number=1, host="h", pid=1, started_at=1.0, ended_at=2.0, outcome="out_of_memory", counts=False
    )
    folder.write_attempt(ended)
    folder.write_failure(Failure(run_id=spec.run_id, kind="out_of_memory", reason="too much", attempt=1))
    assert folder.record().outcome is None
    assert folder.out_of_memory() == 1
    bench.run(iter([spec]))
    assert bench.outcomes(spec) == ["out_of_memory", "done"]


def test_out_of_memory_again_and_again_is_given_up_and_a_retry_counts_anew(bench):
    programs = [failed(make_spec(0), "out_of_memory", "too much", number) for number in range(1, 15)]
    spec = bench.spec(0, *programs[: MOST_HALVINGS + 1], done(make_spec(0)))
    bench.run(iter([spec]))
    assert bench.outcomes(spec) == ["out_of_memory"] * (MOST_HALVINGS + 1)
    assert bench.finished[-1].outcome == "out_of_memory"
    assert bench.home.run(spec.run_id).out_of_memory() == 0  # given up: what is tried again starts whole
    bench.run(iter([spec]), retry=True)
    assert bench.finished[-1].outcome == "done"


def test_an_exit_without_a_result_is_a_crash_whatever_its_code_says(bench):
    spec = bench.spec(0, "pass")
    bench.run(iter([spec]), attempts=1)
    assert bench.home.run(spec.run_id).failure().reason.startswith("it ended without a result")


def test_a_result_counts_whatever_the_exit_code_says(bench):
    spec = bench.spec(0, done(make_spec(0)) + "; import os; os.kill(os.getpid(), 9)")
    bench.run(iter([spec]))
    assert bench.outcomes(spec) == ["done"]


def test_a_run_over_its_time_limit_is_ended_with_all_it_started(bench):
    grandchild = (
        "import subprocess, sys, time\n"
        "for new in (False, True):\n"
        "    sleep = [sys.executable, '-S', '-c', 'import time; time.sleep(600)']\n"
        "    p = subprocess.Popen(sleep, start_new_session=new)\n"
        "    print(p.pid, flush=True)\n"
        "time.sleep(600)"
    )
    how = How(limit_seconds=1.0)
    spec = bench.spec(0, grandchild, how=how)
    bench.run(iter([spec]), attempts=2)
    assert bench.outcomes(spec) == ["timed_out", "timed_out"]
    failure = bench.home.run(spec.run_id).failure()
    assert failure.kind == "timed_out"
    assert failure.reason.startswith("took longer than its limit of 1 s, 2 times")
    pids = [int(line) for line in bench.home.run(spec.run_id).log_file.read_text().split()]
    assert len(pids) == 4
    assert bench.nothing_runs()
    deadline = time.monotonic() + 30
    while not all(gone(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(gone(pid) for pid in pids)


HELD = f"raise SystemExit({HELD_CODE})"


def hold(folder: RunFolder) -> FileLock:
    """Have the run's lock, as a process does that was left behind."""
    folder.path.mkdir(parents=True)
    lock = FileLock(folder.lock_file)
    assert lock.acquire() is None
    return lock


def test_a_run_that_another_process_still_holds_waits_and_is_not_charged_for_it(bench):
    spec = bench.spec(0, HELD, HELD, done(make_spec(0)))
    lock = hold(bench.home.run(spec.run_id))
    bench.run(iter([spec]), attempts=1)
    lock.release()
    assert bench.outcomes(spec) == ["cancelled", "cancelled", "done"]
    attempts = bench.home.run(spec.run_id).attempt_records()
    assert [attempt.counts for attempt in attempts] == [False, False, True]
    assert attempts[0].reason == f"process {os.getpid()} still works on it"


def test_a_run_that_another_process_holds_for_long_ends_the_command_with_its_name(bench, monkeypatch):
    monkeypatch.setattr("finetrial.under_way.HELD_SECONDS", 0.0)
    spec = bench.spec(0, HELD, HELD, done(make_spec(0)))
    lock = hold(bench.home.run(spec.run_id))
    with pytest.raises(Incomplete, match=f"{spec.run_id} cannot begin: process {os.getpid()} still"):
        bench.run(iter([spec]), attempts=1)
    lock.release()
    assert bench.outcomes(spec) == ["cancelled"] * 2
    bench.run(iter([spec]), attempts=1)
    assert bench.outcomes(spec) == ["cancelled", "cancelled", "done"]


def test_what_another_process_holds_keeps_no_other_run_from_its_end(bench, monkeypatch):
    monkeypatch.setattr("finetrial.under_way.HELD_SECONDS", 0.0)
    held, beside, after = make_spec(0), make_spec(1), bench.spec(2)
    bench.spec(0, HELD)
    bench.spec(1, f"import time; time.sleep(1.5)\n{done(beside)}")
    lock = hold(bench.home.run(held.run_id))
    with pytest.raises(Incomplete, match=f"{held.run_id} cannot begin"):
        bench.run(iter([[held, after]]), iter([beside]), parallel=2)
    lock.release()
    assert [bench.outcomes(spec) for spec in (beside, after)] == [["done"]] * 2
    assert bench.outcomes(held) == ["cancelled"] * 2  # it rested meanwhile


@pytest.mark.parametrize("named", [True, False])
def test_of_runs_that_share_a_process_the_others_go_on_together_without_the_held_one(bench, monkeypatch, named):
    monkeypatch.setattr("finetrial.under_way.HELD_SECONDS", 0.0)
    method = MethodSpec(name="m", use="lora", params={})
    one, held, three = specs = [make_spec(n, stage="trial", method=method) for n in range(3)]
    mine = f"import os; open('worker.lock', 'w').write(str(os.getpid())); {HELD}"
    both = "\n".join(f"os.chdir('../{spec.run_id}'); {done(spec)}" for spec in (one, three))
    together = f"import os\n{both}"
    bench.programs |= {one.run_id: [mine, together], held.run_id: [HELD], three.run_id: [together]}
    lock = hold(bench.home.run(held.run_id))
    who = f"process {os.getpid()}" if named else "another process"
    if not named:  # what is written in it cannot be read yet
        bench.home.run(held.run_id).lock_file.write_text("")
    with pytest.raises(Incomplete, match=f"{held.run_id} cannot begin: {who} still works on it"):
        bench.run(iter([specs]), packing=Packing(1, stack=3), attempts=1)
    lock.release()
    assert [bench.outcomes(spec) for spec in (one, three)] == [["cancelled", "done"]] * 2
    assert set(bench.outcomes(held)) == {"cancelled"}
    assert [a.stacked for a in bench.home.run(one.run_id).attempt_records()] == [3, 2]


def test_a_lock_s_file_that_an_ended_process_left_holds_nothing_up(bench):
    """Behind a run that is held, those of a stack are not asked for."""
    method = MethodSpec(name="m", use="lora", params={})
    one, held, three = specs = [make_spec(n, stage="trial", method=method) for n in range(3)]
    mine = f"import os; open('worker.lock', 'w').write(str(os.getpid())); {HELD}"
    both = "import os\n" + "\n".join(f"os.chdir('../{spec.run_id}'); {done(spec)}" for spec in (one, three))
    bench.programs |= {
        one.run_id: [mine, both],
        held.run_id: [done(held)],
        three.run_id: [both],
    }
    lock = hold(bench.home.run(held.run_id))
    left = bench.home.run(three.run_id)
    left.path.mkdir()
    left.lock_file.write_text("4000001 elsewhere 2026-11-01T00:00:00+00:00")
    bench.run(iter([specs]), packing=Packing(1, stack=3), attempts=1)
    lock.release()
    assert [a.stacked for a in left.attempt_records()] == [3, 2]
    assert bench.outcomes(three) == ["cancelled", "done"]
    assert len(bench.progress.notes) == 1  # of the run that is held


def test_the_minute_begins_anew_with_every_run_that_has_ended(bench, monkeypatch):
    """Two are held and nothing else is left; then one of them goes on, and the other's holder ends with it."""
    monkeypatch.setattr("finetrial.under_way.HELD_SECONDS", 0.5)
    monkeypatch.setattr("finetrial.under_way.HELD_REST_SECONDS", 0.3)
    first, second = make_spec(0), make_spec(1)
    ended = f"import os\nif not os.path.exists('../{second.run_id}/result.json'): {HELD}\n"
    bench.spec(0, ended + done(first))
    bench.spec(1, HELD, f"import time; time.sleep(2)\n{done(second)}")
    locks = [hold(bench.home.run(spec.run_id)) for spec in (first, second)]
    bench.run(iter([first]), iter([second]), parallel=2)
    for lock in locks:
        lock.release()
    assert [bench.outcomes(spec)[-1] for spec in (first, second)] == ["done", "done"]


def test_a_held_run_that_has_ended_is_no_longer_waited_for(bench, monkeypatch):
    """Its holder may have done it, and the last try may lie back."""
    monkeypatch.setattr("finetrial.under_way.HELD_SECONDS", -1.0)
    held, beside = make_spec(0), make_spec(1)
    bench.spec(0, HELD)
    result = Result(run_id=held.run_id, outcome="done", cost=COST).model_dump_json()
    by_holder = f"import time; time.sleep(1.0); open('../{held.run_id}/result.json', 'w').write({result!r})"
    bench.spec(1, f"{by_holder}\n{done(beside)}")
    lock = hold(bench.home.run(held.run_id))
    bench.run(iter([held]), iter([beside]), parallel=2)
    lock.release()
    assert bench.home.run(held.run_id).result().outcome == "done"


def test_the_same_exit_code_of_a_run_that_nobody_else_holds_is_a_crash(bench):
    mine = f"import os; open('worker.lock', 'w').write(str(os.getpid())); {HELD}"
    spec = bench.spec(0, mine)
    bench.run(iter([spec]), attempts=1)
    assert bench.outcomes(spec) == ["crashed"]


class DoesNotEnd(subprocess.Popen):
    """A process that is stuck in a driver: the system does not end it, whatever it is sent."""

    def poll(self) -> None:
        return None

    def wait(self, timeout: float | None = None) -> int:
        assert timeout is not None, "waits for ever"
        raise subprocess.TimeoutExpired(self.args, timeout)


class Stuck(Scripted):
    def start(self, run_folder: Path, spec: RunSpec) -> Any:
        handle = super().start(run_folder, spec)
        if len(self.started) == 1:
            handle.process.__class__ = DoesNotEnd
        return handle


def test_a_process_that_not_even_a_kill_ends_is_left_behind_with_a_note(bench, monkeypatch):
    monkeypatch.setattr("finetrial.processes.KILL_SECONDS", 0.1)
    monkeypatch.setattr("finetrial.schedule.GRACE_SECONDS", 0.1)
    spec = bench.spec(0, SLEEP, done(make_spec(0)), how=How(limit_seconds=0.5))
    bench.engine = Stuck(bench.programs)
    bench.run(iter([spec]))
    assert bench.outcomes(spec) == ["timed_out", "done"]
    [note] = [note for note in bench.progress.notes if "not even by SIGKILL" in note]
    assert f"{spec.run_id}: process {bench.engine.handles[0].pid} does not end" in note


def test_a_limit_is_kept_that_is_longer_than_what_passes_for_a_pause(bench, monkeypatch):
    monkeypatch.setattr("finetrial.under_way.PAUSE_SECONDS", 0.5)
    monkeypatch.setattr("finetrial.under_way.LOOK_SECONDS", 0.05)
    spec = bench.spec(0, SLEEP, done(make_spec(0)), how=How(limit_seconds=1.5))
    bench.run(iter([spec]))
    assert bench.outcomes(spec) == ["timed_out", "done"]


PAUSED = """\
import sys
import time
from pathlib import Path

from finetrial.records import How
from scripted import Bench, done, make_spec

bench = Bench(Path(sys.argv[1]))
up = "import os, time; open('pid', 'w').write(str(os.getpid()))"
waits = "while not os.path.exists('go'): time.sleep(0.01)"
spec = bench.spec(0, "\\n".join([up, waits, done(make_spec(0))]), how=How(limit_seconds=5.0))
folder = bench.home.run(spec.run_id).path
print(folder, flush=True)
lanes = [iter([spec])]
if sys.argv[2] == "busy":
    def proposals():  # as a search is asked for its next trial
        folder.joinpath("thinks").touch()
        while not folder.joinpath("thought").exists():
            time.sleep(0.01)
        yield from ()
    lanes.append(proposals())
bench.run(*lanes)
print(bench.outcomes(spec))
"""


@pytest.mark.parametrize("coordinator_is", ["idle", "busy"])
def test_time_in_which_everything_was_paused_is_no_time_of_a_run(tmp_path, coordinator_is):
    """As a container or a job is suspended: the coordinator and its run are stopped, and continued together."""
    command = [sys.executable, "-c", PAUSED, str(tmp_path), coordinator_is]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    coordinator = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    folder = Path(coordinator.stdout.readline().strip())
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        time.sleep(0.01)
    while coordinator_is == "busy" and not (folder / "thinks").exists():
        time.sleep(0.01)
    everything = [coordinator.pid, int((folder / "pid").read_text())]
    for pid in everything:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(5.5)
    for pid in everything:
        os.kill(pid, signal.SIGCONT)
    (folder / "thought").touch()
    time.sleep(0.3)  # the coordinator looks at it before it ends
    (folder / "go").touch()
    assert coordinator.communicate(timeout=60)[0] == "['done']\n"


def test_who_shares_a_process_with_one_that_takes_too_long_is_not_charged_for_it(bench):
    method = MethodSpec(name="m", use="lora", params={})
    lead, slow = (make_spec(n, stage="trial", method=method) for n in range(2))
    slow = slow.model_copy(update={"how": How(limit_seconds=0.5)})
    bench.programs[lead.run_id] = ["import time; time.sleep(600)", done(lead)]
    bench.programs[slow.run_id] = [done(slow)]
    bench.run(iter([[lead, slow]]), packing=Packing(1, stack=2))
    assert bench.outcomes(slow) == ["timed_out", "done"]
    assert bench.outcomes(lead) == ["crashed", "done"]
    counted = [bench.home.run(spec.run_id).attempt_records()[0].counts for spec in (lead, slow)]
    assert counted == [False, False]  # nobody knows whose doing it was


def test_what_a_crashed_run_left_running_is_ended(bench):
    leave = (
        "import subprocess, sys, os\n"
        "p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
        "print(p.pid, flush=True); os._exit(5)"
    )
    spec = bench.spec(0, leave)
    bench.run(iter([spec]), attempts=1)
    pid = int(bench.home.run(spec.run_id).log_file.read_text())
    deadline = time.monotonic() + 30
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(pid)


def test_a_run_whose_coordinator_died_is_lost_resumed_and_not_charged_for_it(bench):
    spec = bench.spec(0, "raise SystemExit(1)", done(make_spec(0)))
    folder = bench.home.run(spec.run_id)
    folder.create(spec)
    for number in (1, 2, 3):  # three dead coordinators
        folder.write_attempt(Attempt(number=number, host=socket.gethostname(), pid=1, started_at=0.0))
    bench.run(iter([spec]), attempts=2)
    assert bench.outcomes(spec) == ["lost", "lost", "lost", "crashed", "done"]
    assert folder.attempt_records()[0].reason == COORDINATOR_ENDED


def test_what_a_dead_coordinator_left_beside_a_result_is_cleared_up(bench):
    spec = bench.spec(0, done(make_spec(0)))
    bench.run(iter([spec]))
    folder = bench.home.run(spec.run_id)
    mine = lease.claim(folder.lease_file)
    dead = mine.model_copy(update={"process_started_at": 0.0})  # its process id is another's by now
    folder.lease_file.write_text(dead.model_dump_json())
    folder.write_attempt(folder.attempt_records()[0].model_copy(update={"outcome": None}))
    (folder.checkpoint / "step-00000001").mkdir(parents=True)
    bench.run(iter([spec]))
    assert bench.outcomes(spec) == ["done"]
    assert not folder.checkpoint.exists()
    assert not folder.lease_file.exists()


def test_a_run_that_was_given_up_keeps_its_checkpoint_and_its_last_ending(bench):
    spec = bench.spec(0, failed(make_spec(0), "out_of_memory", "too large", final=True))
    bench.run(iter([spec]))
    folder = bench.home.run(spec.run_id)
    folder.write_attempt(folder.attempt_records()[0].model_copy(update={"outcome": None}))
    (folder.checkpoint / "step-00000001").mkdir(parents=True)
    bench.run(iter([spec]))
    assert bench.outcomes(spec) == ["out_of_memory"]
    assert folder.checkpoint.exists()


class LosesEverything(Scripted):
    """An engine whose machines all go away."""

    def poll(self, handle: Any) -> Exit | None:
        ended = super().poll(handle)
        return ended and Exit(None, "lost", "the machine is gone")


def test_a_run_that_its_engine_always_loses_is_given_up(bench):
    bench.engine = LosesEverything(bench.programs)
    spec = bench.spec(0, "pass")
    bench.run(iter([spec]), attempts=3)
    assert bench.outcomes(spec) == ["lost"] * 3
    assert bench.home.run(spec.run_id).failure().kind == "lost"


@pytest.mark.parametrize("kind", ["out_of_memory", "crashed"])
def test_a_failure_that_the_child_wrote_is_taken_as_it_is(bench, kind):
    spec = bench.spec(0, failed(make_spec(0), kind, "its own words", final=True))
    bench.run(iter([spec]), attempts=1)
    assert bench.home.run(spec.run_id).failure().reason.startswith("its own words")
    assert bench.outcomes(spec) == [kind]


def test_the_failure_of_an_earlier_attempt_says_nothing_of_this_one(bench):
    spec = bench.spec(0, failed(make_spec(0), "bug", "stale", attempt=7))
    bench.run(iter([spec]), attempts=1)
    assert bench.outcomes(spec) == ["crashed"]
