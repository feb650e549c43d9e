"""Scheduling: what is resumed, what is given up, what stops the study, and that nothing outlives it."""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetrial import lease
from finetrial.errors import FinetrialError, Incomplete, RunsFailed
from finetrial.packing import Packing
from finetrial.plugins import Exit
from finetrial.progress import Progress
from finetrial.records import Attempt, Failure, Fit, How, MethodSpec, Result, RunRecord, RunSpec
from finetrial.schedule import COORDINATOR_ENDED, GIVEN_UP, MOST_HALVINGS, PUT_OFF, TRIED_AGAIN, Lane, Scheduler
from finetrial.store import Home
from scripted import COST, Scripted, done, failed, make_spec

SLEEP = "import time; time.sleep(600)"


class Recorder(Progress):
    """The progress display, with what it was told kept; can press Ctrl-C at the n-th look at a run."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.looks, self.interrupt_at = 0, interrupt_at

    def note(self, text: str) -> None:
        self.notes.append(text)

    def tick(self, spec: RunSpec, last_record: Any) -> None:
        self.looks += 1
        if self.looks == self.interrupt_at:
            raise KeyboardInterrupt


class Bench:
    """A home, an engine of programs, and what the scheduler reported."""

    def __init__(self, path: Path):
        self.home = Home(path / "home")
        self.programs: dict[str, list[str]] = {}
        self.engine: Any = Scripted(self.programs)
        self.progress = Recorder()
        self.finished: list[RunRecord] = []

    def spec(self, number: int, *programs: str, **changes: Any) -> RunSpec:
        spec = make_spec(number, **changes)
        self.programs[spec.run_id] = list(programs) or [done(spec)]
        return spec

    def run(
        self,
        *lanes: Lane,
        parallel: int = 1,
        attempts: int = 3,
        retry: bool = False,
        packing: Packing | None = None,
    ) -> None:
        packing = packing or Packing(parallel)
        Scheduler(
            self.home, self.engine, packing, attempts, self.progress, self.finished.append,
            TRIED_AGAIN | GIVEN_UP if retry else TRIED_AGAIN,
        ).run(list(lanes))  # fmt: skip

    def outcomes(self, spec: RunSpec) -> list[str | None]:
        return [attempt.outcome for attempt in self.home.run(spec.run_id).attempt_records()]

    def nothing_runs(self) -> bool:
        return all(handle.process.poll() is not None for handle in self.engine.handles)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for handle in getattr(bench.engine, "handles", []):
        with contextlib.suppress(OSError):
            bench.engine.stop(handle, 0)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# ---- the way it should go ---------------------------------------------------------------------------------


def test_every_run_of_every_lane_is_done_once(bench):
    specs = [bench.spec(number) for number in range(4)]
    bench.run(iter(specs[:2]), iter(specs[2:]))
    assert [record.spec for record in bench.finished] == specs
    for spec in specs:
        folder = bench.home.run(spec.run_id)
        assert bench.outcomes(spec) == ["done"]
        assert folder.spec() == spec
        assert not folder.lease_file.exists()
    bench.run(iter(specs[:2]), iter(specs[2:]))
    assert len(bench.engine.started) == 4
    assert len(bench.finished) == 8  # told again, so that trackers can catch up


def test_a_lane_is_asked_for_its_next_run_only_when_the_last_has_ended(bench):
    asked: list[list[bool]] = []
    specs = [bench.spec(number) for number in range(3)]

    def lane() -> Iterator[RunSpec]:
        for spec in specs:
            asked.append([bench.home.run(each.run_id).result() is not None for each in specs])
            yield spec

    bench.run(lane(), parallel=3)
    assert asked == [[False] * 3, [True, False, False], [True, True, False]]


def two_that_wait_for_each_other(bench: Bench) -> tuple[RunSpec, RunSpec]:
    """One after the other they would never end."""
    meet = (
        "import os, time\nopen('../{}-here', 'w').close()\n"
        "while not os.path.exists('../{}-here'): time.sleep(.01)\n"
    )
    one, two = make_spec(1), make_spec(2)
    bench.spec(1, meet.format(1, 2) + done(one))
    bench.spec(2, meet.format(2, 1) + done(two))
    return one, two


def test_runs_that_a_lane_gives_together_go_side_by_side_and_it_waits_for_all(bench):
    one, two = two_that_wait_for_each_other(bench)
    last = bench.spec(3)
    ended: list[bool] = []

    def lane() -> Lane:
        yield [one, two]
        ended.extend(bench.home.run(spec.run_id).result() is not None for spec in (one, two))
        yield last

    bench.run(lane(), parallel=2)
    assert ended == [True, True]
    assert bench.outcomes(last) == ["done"]


def test_a_lane_may_give_nothing_at_all(bench):
    bench.run(iter([[]]), iter([]), iter([bench.spec(0)]))
    assert len(bench.finished) == 1


# ---- as many as memory allows -----------------------------------------------------------------------------


def test_a_lane_may_wait_for_another_and_nobody_waits_for_it(bench):
    first, second, third = (bench.spec(number) for number in range(3))

    def waiting() -> Lane:
        while bench.home.run(second.run_id).result() is None:
            yield []
        yield third

    bench.run(waiting(), iter([first, second]), parallel=2)
    assert [record.spec for record in bench.finished] == [first, second, third]


def takes(spec: RunSpec, size: int, seconds: float = 0.3) -> str:
    """A program that says what it takes, of a room of 100, notes who is there meanwhile, and is done."""
    fit = Fit(device="cpu", budget=100, predicted=size, shared=100, evaluation_tokens=1)
    return (
        f"import os, time\nopen('fit.json', 'w').write({fit.model_dump_json()!r})\n"
        f"open('../here-{spec.number}', 'w').write('{size}')\ntime.sleep({seconds})\n"
        "there = [n for n in os.listdir('..') if n.startswith('here-')]\n"
        "taken = sum(int(open('../' + n).read() or 0) for n in there)\n"
        "open('../taken', 'a').write(f'{taken}\\n')\n"
        f"{done(spec)}\nos.remove('../here-{spec.number}')"
    )


def packed(bench: Bench, sizes: list[int], most: int = 8, packing: Packing | None = None) -> list[int]:
    """What ran side by side took, at the end of each run."""
    specs = [
        make_spec(n, stage="trial", method=MethodSpec(name="m", use="full", params={}))
        for n in range(len(sizes))
    ]
    for spec, size in zip(specs, sizes, strict=True):
        bench.programs[spec.run_id] = [takes(spec, size)]
    bench.run(iter([specs]), packing=packing or Packing(most, by_memory=True))
    assert [bench.outcomes(spec)[-1] for spec in specs] == ["done"] * len(specs)
    return [int(line) for line in (bench.home.runs / "taken").read_text().split()]


def test_as_many_run_at_once_as_their_memory_allows(bench):
    taken = packed(bench, [40, 40, 40, 40, 40])
    assert max(taken) == 80


def test_no_more_run_at_once_than_there_are_places(bench):
    assert max(packed(bench, [10, 10, 10, 10], most=2)) == 20


def test_a_run_that_says_it_takes_too_much_is_put_off_and_costs_no_attempt(bench):
    packed(bench, [30, 90])
    records = [folder.record() for folder in bench.home.find("trial.")]
    off = [attempt for record in records for attempt in record.attempts if attempt.outcome == "cancelled"]
    assert len(off) == 1
    assert not off[0].counts
    assert off[0].reason == PUT_OFF


def test_out_of_memory_beside_others_is_tried_again_with_fewer_and_not_with_less(bench):
    method = MethodSpec(name="m", use="full", params={})
    one, two = (make_spec(n, stage="trial", method=method) for n in range(2))
    bench.programs[one.run_id] = [takes(one, 10, seconds=1.0)]
    bench.programs[two.run_id] = [failed(two, "out_of_memory", "no more"), takes(two, 10)]
    packing = Packing(4, by_memory=True)
    bench.run(iter([[one, two]]), packing=packing)
    assert bench.outcomes(two) == ["cancelled", "done"]
    assert bench.home.run(two.run_id).out_of_memory() == 0
    assert packing.most == 1


def test_runs_that_run_out_of_memory_at_the_same_time_are_none_of_them_charged_for_it(bench):
    """Whoever is looked at last has nobody beside it any more; and three places become two, not none."""
    method = MethodSpec(name="m", use="full", params={})
    runs = [make_spec(n, stage="trial", method=method) for n in range(3)]
    for number, spec in enumerate(runs):
        fit = Fit(device="cpu", budget=100, predicted=10, shared=100, evaluation_tokens=1)
        waits = (
            f"import os, time\nopen('fit.json', 'w').write({fit.model_dump_json()!r})\n"
            f"open('../begun-{number}', 'w')\n"
            "while not all(os.path.exists(f'../begun-{n}') for n in range(3)): time.sleep(0.01)\n"
            f"time.sleep({0.4 * number})\n"
        )
        bench.programs[spec.run_id] = [waits + failed(spec, "out_of_memory", "no more"), takes(spec, 10)]
    packing = Packing(3, by_memory=True)
    bench.run(iter([runs]), packing=packing)
    assert [bench.outcomes(spec) for spec in runs] == [["cancelled", "done"]] * 3
    assert [bench.home.run(spec.run_id).out_of_memory() for spec in runs] == [0, 0, 0]
    assert packing.most == 2


def test_a_run_that_passes_its_own_budget_leaves_the_places_to_the_others(bench):
    method = MethodSpec(name="m", use="full", params={})
    one, two = (make_spec(n, stage="trial", method=method) for n in range(2))
    bench.programs[one.run_id] = [takes(one, 10, seconds=1.0)]
    over = failed(two, "out_of_memory", "it took more than it may", own_budget=True)
    bench.programs[two.run_id] = [over, takes(two, 10)]
    packing = Packing(4, by_memory=True)
    bench.run(iter([[one, two]]), packing=packing)
    assert bench.outcomes(two) == ["out_of_memory", "done"]
    assert packing.most == 4


@pytest.mark.parametrize("how_it_ends", ["out_of_memory", "timed_out"])
def test_runs_that_were_stacked_in_vain_go_on_each_alone(bench, how_it_ends):
    method = MethodSpec(name="m", use="lora", params={})
    how = How(limit_seconds=0.4)
    specs = [make_spec(n, stage="trial", method=method, how=how) for n in range(3)]
    ends = {
        "out_of_memory": failed(specs[0], "out_of_memory", "too much for so many"),
        "timed_out": SLEEP,
    }
    bench.programs |= {spec.run_id: [done(spec)] for spec in specs}
    bench.programs[specs[0].run_id] = [ends[how_it_ends], done(specs[0])]
    bench.run(iter([specs]), packing=Packing(1, stack=3), attempts=1)
    assert bench.engine.started[0] == specs[0].run_id
    assert sorted(bench.engine.started[1:]) == sorted(spec.run_id for spec in specs)
    for spec in specs:
        folder = bench.home.run(spec.run_id)
        assert folder.spec().how.stacked == 1
        assert bench.outcomes(spec)[-1] == "done"
        assert not folder.attempt_records()[0].counts


def two_stacked(bench):
    """The folders of two runs of one process, the first one's."""
    method = MethodSpec(name="m", use="lora", params={})
    specs = [make_spec(n, stage="trial", method=method, how=How(stacked=2)) for n in range(2)]
    lead, other = (bench.home.run(spec.run_id) for spec in specs)
    for spec, folder in zip(specs, (lead, other), strict=True):
        folder.create(spec)
    lead.stack_with([other])
    return lead, other


def test_what_a_stack_takes_is_the_mean_of_what_its_runs_say_of_as_many_like_themselves(bench):
    lead, other = two_stacked(bench)
    packing = Packing(4, by_memory=True, stack=2)
    fit = Fit(device="cpu", budget=100, predicted=20, shared=100, evaluation_tokens=1, stacked=2)
    lead.write_fit(fit)
    assert packing.taken(lead) is None
    other.write_fit(fit.model_copy(update={"predicted": 80}))
    assert packing.taken(lead) == 50


def test_what_a_run_says_here_counts_and_not_what_it_said_on_another_machine(bench):
    method = MethodSpec(name="m", use="full", params={})
    folders = []
    for number in range(4):
        spec = make_spec(number, stage="trial", method=method)
        folders.append(bench.home.run(spec.run_id))
        folders[-1].create(spec)
        there = Fit(device="cpu", budget=100, predicted=6, shared=54, evaluation_tokens=1)
        folders[-1].write_fit(there)
    packing = Packing(8, by_memory=True)
    assert packing.too_many(folders) is None
    for folder in folders:
        folder.write_fit(there.model_copy(update={"shared": 13}))
    assert packing.too_many(folders) == folders[-1]
    assert packing.too_many(folders[:2]) is None
    folders[0].write_result(Result(run_id=folders[0].path.name, outcome="done", cost=COST))
    folders[0].write_fit(there)
    packing.learn(folders[0])
    assert packing.room == {None: 13}


def test_a_run_that_leaves_its_stack_unfitted_keeps_nobody_waiting(bench):
    lead, other = two_stacked(bench)
    other.write_failure(Failure(run_id=other.path.name, kind="out_of_memory", reason="no", attempt=1))
    lead.write_fit(Fit(device="cpu", budget=9, predicted=20, shared=100, evaluation_tokens=1, stacked=2))
    assert Packing(4, by_memory=True, stack=2).taken(lead) == 20
    lead.stack_file.write_text('["trial.')
    assert lead.stacked_with() == []


def test_on_several_gpus_each_process_is_on_the_emptiest_and_each_gpu_has_its_own_room(bench):
    """Two of 60 fit together only because they are on two GPUs; the third waits for one of them."""
    taken = packed(bench, [60, 60, 60], packing=Packing(8, by_memory=True, gpus=("0", "3")))
    assert max(taken) == 120
    placed = [folder.spec().how.gpu for folder in bench.home.find("trial.")]
    assert set(placed) == {"0", "3"}


def test_a_fixed_number_of_processes_is_spread_over_the_gpus_and_shares_them(bench):
    packed(bench, [10, 10, 10], packing=Packing(3, gpus=("0", "1")))
    how = [folder.spec().how for folder in bench.home.find("trial.")]
    assert sorted((each.gpu, each.parallel) for each in how) == [("0", 2), ("0", 2), ("1", 2)]


def test_out_of_memory_on_one_gpu_lets_fewer_be_on_each(bench):
    method = MethodSpec(name="m", use="full", params={})
    runs = [make_spec(n, stage="trial", method=method) for n in range(3)]
    bench.programs[runs[0].run_id] = [takes(runs[0], 10, seconds=2.0)]
    bench.programs[runs[1].run_id] = [takes(runs[1], 10, seconds=2.0)]
    bench.programs[runs[2].run_id] = [failed(runs[2], "out_of_memory", "no more"), takes(runs[2], 10)]
    packing = Packing(4, by_memory=True, gpus=("0", "1"))
    bench.run(iter([runs]), packing=packing)
    assert bench.outcomes(runs[2]) == ["cancelled", "done"]
    assert (packing.most, packing.each) == (4, 1)


def test_lanes_go_side_by_side_up_to_the_limit(bench):
    """Each run waits for a file of the other: one after the other they would never end."""
    one, two = two_that_wait_for_each_other(bench)
    bench.run(iter([one]), iter([two]), parallel=2)
    assert bench.outcomes(one) == bench.outcomes(two) == ["done"]


def test_with_one_at_a_time_no_two_runs_overlap(bench):
    alone = (
        "import os\nassert not os.path.exists('../busy')\nopen('../busy', 'w').close()\n"
        "{}\nos.remove('../busy')"
    )
    specs = [bench.spec(n, alone.format(done(make_spec(n)))) for n in range(3)]
    bench.run(*(iter([spec]) for spec in specs), parallel=1)
    assert [bench.outcomes(spec) for spec in specs] == [["done"]] * 3


# ---- endings without a result ----------------------------------------------------------------------------


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


# ---- what stops the study --------------------------------------------------------------------------------


def test_a_bug_stops_the_study_with_the_logs_tail_and_is_tried_again_later(bench):
    program = failed(make_spec(0), "bug", "KeyError: 'x'", log_tail="Traceback\n  line 7")
    spec, other, after = bench.spec(0, program, done(make_spec(0))), bench.spec(1, SLEEP), bench.spec(2)
    with pytest.raises(RunsFailed, match="KeyError: 'x'") as caught:
        bench.run(iter([spec, after]), iter([other]), parallel=2)
    assert "  line 7" in str(caught.value)
    assert caught.value.exit_code == 3
    assert bench.outcomes(spec) == ["bug"]
    assert bench.outcomes(other) == ["cancelled"]
    assert bench.nothing_runs()
    bench.programs[other.run_id] = [done(other)]
    bench.run(iter([spec, after]), iter([other]), parallel=2)
    assert bench.outcomes(spec) == ["bug", "done"]
    assert bench.outcomes(other) == ["cancelled", "done"]
    assert bench.home.run(spec.run_id).failure() is None


def test_a_refusal_stops_the_study_with_exit_code_1(bench):
    spec = bench.spec(0, failed(make_spec(0), "refused", "no column 'label'"))
    with pytest.raises(FinetrialError, match="t: no column 'label'") as caught:
        bench.run(iter([spec]))
    assert caught.value.exit_code == 1


def test_ctrl_c_ends_every_run_and_the_same_command_goes_on(bench):
    specs = [bench.spec(number, SLEEP) for number in range(2)]
    bench.progress.interrupt_at = 3
    with pytest.raises(Incomplete, match="run the same command") as caught:
        bench.run(*(iter([spec]) for spec in specs), parallel=2)
    assert caught.value.exit_code == 4
    assert bench.nothing_runs()
    for spec in specs:
        assert bench.outcomes(spec) == ["cancelled"]
        assert not bench.home.run(spec.run_id).lease_file.exists()
        bench.programs[spec.run_id] = [done(spec)]
    bench.run(*(iter([spec]) for spec in specs), parallel=2)
    assert [bench.outcomes(spec) for spec in specs] == [["cancelled", "done"]] * 2


def test_all_runs_are_asked_to_end_before_the_first_is_waited_for(bench):
    """Each ends only when all have been asked: one after the other they would be killed."""
    waits = (
        "import os, signal, time\n"
        "def end(*_):\n"
        "    open('../asked-' + os.path.basename(os.getcwd()), 'w')\n"
        "    while len([n for n in os.listdir('..') if n.startswith('asked-')]) < 3: time.sleep(0.01)\n"
        "    open('left', 'w')\n"
        "    raise SystemExit\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "open('ready', 'w')\n"
        "time.sleep(600)"
    )
    specs = [bench.spec(number, waits) for number in range(3)]
    folders = [bench.home.run(spec.run_id).path for spec in specs]

    def lane() -> Iterator[RunSpec]:
        while not all((folder / "ready").exists() for folder in folders):
            time.sleep(0.01)
        raise OSError("the disk is full")
        yield

    with pytest.raises(OSError, match="disk is full"):
        bench.run(*(iter([spec]) for spec in specs), lane(), parallel=4)
    assert all((folder / "left").exists() for folder in folders)


def test_lanes_that_wait_for_each_other_are_said_and_not_waited_for(bench):
    def waiting() -> Lane:
        while True:
            yield []

    with pytest.raises(FinetrialError, match="nothing runs"):
        bench.run(waiting(), iter([bench.spec(0)]), waiting())


def test_a_lane_that_waits_is_asked_again_when_a_run_has_ended_and_not_before(bench):
    asked = []

    def waiting() -> Lane:
        while len(asked) < 3:
            asked.append(time.monotonic())
            yield []

    specs = [
        bench.spec(number, f"import time; time.sleep(0.5)\n{done(make_spec(number))}") for number in range(2)
    ]
    bench.run(iter(specs), waiting(), parallel=2)
    assert len(asked) == 3
    assert min(later - earlier for earlier, later in itertools.pairwise(asked)) > 0.4


def test_any_error_of_the_coordinator_ends_its_runs_too(bench):
    running = bench.spec(0, SLEEP)

    def lane() -> Iterator[RunSpec]:
        raise OSError("the disk is full")
        yield

    with pytest.raises(OSError, match="disk is full"):
        bench.run(iter([running]), lane(), parallel=2)
    assert bench.nothing_runs()
    assert bench.outcomes(running) == ["cancelled"]


class CannotStart(Scripted):
    def start(self, run_folder: Path, spec: RunSpec) -> Any:
        raise KeyboardInterrupt if spec.number else OSError("too many processes")


class DoneAtOnce(Scripted):
    def start(self, run_folder: Path, spec: RunSpec) -> Any:
        super().start(run_folder, spec).process.wait()
        raise KeyboardInterrupt


def test_a_run_that_had_its_result_when_its_start_was_interrupted_is_done(bench):
    spec = bench.spec(0)
    bench.engine = DoneAtOnce(bench.programs)
    with pytest.raises(Incomplete):
        bench.run(iter([spec]))
    bench.engine = Scripted(bench.programs)
    bench.run(iter([spec]))
    assert bench.outcomes(spec) == ["done"]


@pytest.mark.parametrize(("number", "error"), [(0, OSError), (1, Incomplete)])
def test_a_run_that_cannot_be_started_is_left_free_for_the_next_try(bench, number, error):
    spec = bench.spec(number)
    bench.engine = CannotStart(bench.programs)
    with pytest.raises(error):
        bench.run(iter([spec]))
    bench.engine = Scripted(bench.programs)
    bench.run(iter([spec]))
    assert bench.outcomes(spec) == ["cancelled", "done"]


# ---- who works on a run ----------------------------------------------------------------------------------


def test_a_run_that_another_holds_is_left_to_it(bench):
    spec = bench.spec(0)
    folder = bench.home.run(spec.run_id)
    folder.create(spec)
    mine = lease.claim(folder.lease_file)
    with pytest.raises(Incomplete, match="being worked on elsewhere"):
        bench.run(iter([spec]))
    assert bench.engine.started == []
    assert lease.read(folder.lease_file) == mine


def test_a_run_that_another_holds_keeps_what_its_spec_says_of_there(bench):
    spec = bench.spec(0)
    folder = bench.home.run(spec.run_id)
    folder.create(spec)
    lease.claim(folder.lease_file)
    with pytest.raises(Incomplete):
        bench.run(iter([spec.model_copy(update={"how": How(threads=7)})]))
    assert folder.spec() == spec


def test_a_run_that_another_takes_over_is_ended_here_and_its_records_are_left_alone(bench, monkeypatch):
    monkeypatch.setattr("finetrial.schedule.RENEW_SECONDS", 0.0)
    spec = bench.spec(0, SLEEP)
    folder = bench.home.run(spec.run_id)

    class TakenOver(Recorder):
        def tick(self, spec: RunSpec, last_record: Any) -> None:
            if not theirs:
                folder.lease_file.unlink()
                theirs.append(lease.claim(folder.lease_file))
                [attempt] = folder.attempt_records()
                folder.write_attempt(attempt.model_copy(update={"outcome": "lost", "reason": "theirs"}))

    theirs = []
    bench.progress = TakenOver()
    with pytest.raises(Incomplete, match="taken over"):
        bench.run(iter([spec]))
    assert bench.nothing_runs()
    assert lease.read(folder.lease_file).token == theirs[0].token
    assert [(a.outcome, a.reason) for a in folder.attempt_records()] == [("lost", "theirs")]


def test_a_checkpoint_that_a_finished_run_left_is_dropped(bench):
    spec = bench.spec(0)
    folder = bench.home.run(spec.run_id)
    bench.run(iter([spec]))
    folder.checkpoint.mkdir()
    bench.run(iter([spec]))
    assert not folder.checkpoint.exists()
