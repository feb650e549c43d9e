"""Scheduling: lanes, what stops the study, who works on a run, and that nothing outlives it."""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetrial import lease, loaded, processes, schedule, under_way
from finetrial.errors import FinetrialError, Incomplete, RunsFailed
from finetrial.records import How, RunSpec
from finetrial.schedule import Lane
from scripted import SLEEP, Bench, Recorder, Scripted, done, failed, make_spec


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


def test_a_lane_may_wait_for_another_and_nobody_waits_for_it(bench):
    first, second, third = (bench.spec(number) for number in range(3))

    def waiting() -> Lane:
        while bench.home.run(second.run_id).result() is None:
            yield []
        yield third

    bench.run(waiting(), iter([first, second]), parallel=2)
    assert [record.spec for record in bench.finished] == [first, second, third]


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


@pytest.mark.parametrize("kind", ["refused", "bug"])
def test_after_an_upgrade_that_a_run_met_the_same_command_goes_on(bench, monkeypatch, kind):
    spec = bench.spec(0, failed(make_spec(0), kind, "AttributeError: of before"), done(make_spec(0)))
    with monkeypatch.context() as patched:
        patched.setenv(loaded.VARIABLE, "of before")
        with pytest.raises(Incomplete, match="finetrial changed while it ran") as caught:
            bench.run(iter([spec]))
    assert caught.value.exit_code == 4
    bench.run(iter([spec]))
    assert bench.outcomes(spec) == [kind, "done"]


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


def test_a_run_that_ends_in_its_grace_is_asked_only_once(bench):
    """Past its last step a worker lets the signal do what it does by itself, which would lose its result."""
    ask = "import signal, time\nasked = []\nsignal.signal(15, lambda *_: asked.append(1))\nopen('up', 'w')\n"
    ask += "while not asked: time.sleep(0.01)\n"
    slow = bench.spec(0, f"{ask}time.sleep(1); raise SystemExit(143)")
    last = bench.spec(1, f"{ask}signal.signal(15, signal.SIG_DFL); time.sleep(2)\n{done(make_spec(1))}")
    folders = [bench.home.run(spec.run_id).path for spec in (slow, last)]

    def lane() -> Iterator[RunSpec]:
        while not all((folder / "up").exists() for folder in folders):
            time.sleep(0.01)
        raise KeyboardInterrupt
        yield

    with pytest.raises(Incomplete):
        bench.run(iter([slow]), iter([last]), lane(), parallel=3)
    assert [bench.outcomes(spec) for spec in (slow, last)] == [["cancelled"], ["done"]]
    assert bench.nothing_runs()


def test_a_worker_has_the_time_that_platforms_grant_and_no_lease_gets_old_meanwhile():
    assert 20 <= schedule.GRACE_SECONDS <= 27  # of the 30 s of SLURM and Kubernetes, some for the coordinator
    longest = under_way.RENEW_SECONDS + schedule.GRACE_SECONDS + processes.KILL_SECONDS
    assert longest < lease.STALE_SECONDS


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


def test_a_run_whose_records_cannot_be_read_is_left_free(bench):
    spec = bench.spec(0)
    folder = bench.home.run(spec.run_id)
    folder.create(spec)
    hindrance = folder.path / "attempts" / "1.json"
    hindrance.mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        bench.run(iter([spec]))
    hindrance.rmdir()
    bench.run(iter([spec]))
    assert bench.outcomes(spec) == ["done"]


@pytest.mark.parametrize(
    "harm",
    ["os.remove(file); os.mkdir(file)", "open('result.json', 'w').write('{')"],
    ids=["attempt", "result"],
)
def test_where_one_run_s_end_cannot_be_written_all_others_are_let_go_and_the_reason_is_told(bench, harm):
    hinders = (
        "import os, time\nfile = 'attempts/1.json'\n"
        "while f'\"pid\": {os.getpid()}' not in open(file).read(): time.sleep(0.01)\n"
        f"{harm}; open('ready', 'w')\ntime.sleep(600)"
    )
    full, beside = bench.spec(0, hinders), bench.spec(1, "import time; time.sleep(600)")
    ready = bench.home.run(full.run_id).path / "ready"
    wait = f"import os, time\nwhile not os.path.exists({str(ready.resolve())!r}): time.sleep(0.01)\n"
    fault = bench.spec(2, wait + failed(make_spec(2), "bug", "the reason"))
    with pytest.raises(RunsFailed, match="the reason"):
        bench.run(*(iter([spec]) for spec in (full, beside, fault)), parallel=3)
    assert not any(bench.home.run(spec.run_id).lease_file.exists() for spec in (full, beside, fault))
    assert bench.outcomes(beside) == ["cancelled"]


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
    monkeypatch.setattr("finetrial.under_way.RENEW_SECONDS", 0.0)
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


class FullDisk(Recorder):
    """No file may grow, from the first look at a run on, for some looks; then all is well again."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.until = looks

    def tick(self, spec: RunSpec, last_record: Any) -> None:
        self.looks += 1
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (0 if self.looks < self.until else hard, hard))


@pytest.fixture
def files_may_grow_again() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("files_may_grow_again")
def test_a_lease_that_cannot_be_renewed_for_a_while_ends_nothing(bench, monkeypatch):
    monkeypatch.setattr("finetrial.under_way.RENEW_SECONDS", 0.0)
    monkeypatch.setattr("finetrial.under_way.RENEW_AGAIN_SECONDS", 0.0)
    bench.progress = FullDisk(looks=5)
    spec = bench.spec(0, f"import time; time.sleep(1.0)\n{done(make_spec(0))}")
    bench.run(iter([spec]))
    assert bench.progress.looks > 5
    assert bench.outcomes(spec) == ["done"]


@pytest.mark.usefixtures("files_may_grow_again")
def test_a_lease_that_cannot_be_renewed_until_it_is_stale_ends_the_command(bench, monkeypatch):
    monkeypatch.setattr("finetrial.under_way.RENEW_SECONDS", 0.0)
    monkeypatch.setattr("finetrial.under_way.RENEW_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr("finetrial.lease.STALE_SECONDS", 0.5)
    bench.progress = FullDisk(looks=10**6)
    spec = bench.spec(0, SLEEP)
    with pytest.raises(OSError, match="File too large"):
        bench.run(iter([spec]))
    assert bench.nothing_runs()


def test_what_is_only_shown_of_a_run_may_be_unreadable(bench):
    unreadable = "import os, time; os.mkdir('metrics.jsonl'); time.sleep(0.5)\n"
    spec = bench.spec(0, unreadable + done(make_spec(0)))
    bench.run(iter([spec]))
    assert bench.progress.looks > 1
    assert bench.outcomes(spec) == ["done"]


def test_a_checkpoint_that_a_finished_run_left_is_dropped(bench):
    spec = bench.spec(0)
    folder = bench.home.run(spec.run_id)
    bench.run(iter([spec]))
    folder.checkpoint.mkdir()
    bench.run(iter([spec]))
    assert not folder.checkpoint.exists()
