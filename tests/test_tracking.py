"""Mirroring into trackers: each ending once, a tracker's fault is one warning and never a run's failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from finetrial import files, tracking
from finetrial.records import Attempt, Failure, Result, RunRecord, RunSpec
from finetrial.store import Home
from finetrial.tracking import Mirror
from scripted import COST, make_spec


class Notebook:
    """A tracker that keeps what it is given, and fails where it is told to."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, str | None, list[Mapping[str, Any]]]] = []
        self.error: BaseException | None = None
        self.hang = threading.Event()
        self.hang.set()

    def replay(
        self, folder: Path, spec: RunSpec, records: Iterable[Mapping[str, Any]], result: Result | None
    ) -> None:
        if self.error:
            raise self.error
        self.hang.wait()
        self.runs.append((spec.run_id, result and result.outcome, list(records)))


ONE, TWO = Notebook(), Notebook()


class Bench:
    def __init__(self, path: Path):
        self.home = Home(path)
        self.warnings: list[str] = []

    def mirror(self) -> Mirror:
        return Mirror(self.home, ["test_tracking:ONE", "test_tracking:TWO"], self.warnings.append)

    def record(self, number: int, outcome: str = "done", attempts: int = 1) -> RunRecord:
        spec = make_spec(number)
        folder = self.home.run(spec.run_id)
        folder.create(spec)
        if not folder.metrics_file.exists():
            files.append_json_line(folder.metrics_file, {"step": 1, "loss": 0.5})
            with folder.metrics_file.open("a") as stream:
                stream.write('{"step": 2, "lo')  # killed in mid-write
        result, failure = None, None
        if outcome == "done":
            result = Result(run_id=spec.run_id, outcome="done", cost=COST)
        else:
            failure = Failure(run_id=spec.run_id, kind=outcome, reason="x", attempt=attempts)
        tries = [Attempt(number=n, host="h", pid=1, started_at=0.0) for n in range(1, attempts + 1)]
        return RunRecord(spec, result, failure, tuple(tries))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    ONE.__init__()
    TWO.__init__()
    return Bench(tmp_path)


def test_every_run_is_replayed_once_with_its_whole_records(bench):
    record = bench.record(1)
    for mirror in (bench.mirror(), bench.mirror()):
        mirror(record)
        mirror(record)
    assert ONE.runs == TWO.runs == [(record.spec.run_id, "done", [{"step": 1, "loss": 0.5}])]
    assert bench.warnings == []


def test_a_run_that_failed_and_then_succeeded_is_shown_as_it_ended(bench):
    bench.mirror()(bench.record(1, "bug"))
    bench.mirror()(bench.record(1, "done", attempts=2))
    bench.mirror()(bench.record(1, "done", attempts=2))
    assert [outcome for _, outcome, _ in ONE.runs] == [None, "done"]


@pytest.mark.parametrize(
    "error", [RuntimeError("no network\nat all"), SystemExit(3), ImportError(), OSError(28, "")]
)
def test_a_tracker_that_fails_gives_one_warning_and_is_tried_again_at_the_next_call(bench, error):
    ONE.error = error
    mirror = bench.mirror()
    records = [bench.record(number) for number in (1, 2)]
    for record in records:
        mirror(record)
    assert len(bench.warnings) == 1
    assert "test_tracking:ONE failed" in bench.warnings[0]
    assert "\n" not in bench.warnings[0]
    assert ONE.runs == []
    assert len(TWO.runs) == 2
    ONE.error = None
    mirror = bench.mirror()
    for record in records:
        mirror(record)
    assert [run_id for run_id, *_ in ONE.runs] == [record.spec.run_id for record in records]
    assert len(TWO.runs) == 2
    assert len(bench.warnings) == 1


def test_a_tracker_that_hangs_holds_nothing_up_and_is_replayed_at_the_next_call(bench, monkeypatch):
    monkeypatch.setattr(tracking, "REPLAY_SECONDS", 0.1)  # of both together
    ONE.hang.clear()
    records = [bench.record(number) for number in (1, 2)]
    mirror = bench.mirror()
    for record in records:
        mirror(record)
    assert (ONE.runs, len(TWO.runs)) == ([], 2)
    (warned,) = bench.warnings
    assert "test_tracking:ONE failed" in warned
    assert "it has not come back after 0.05 s" in warned
    bench.warnings.clear()
    TWO.hang.clear()
    began = time.monotonic()
    bench.mirror()(bench.record(3))
    assert time.monotonic() - began < 10  # the thread of neither is waited for
    assert [text.count("it has not come back after 0.05 s") for text in bench.warnings] == [1, 1]
    TWO.hang.set()
    monkeypatch.setattr(tracking, "REPLAY_SECONDS", 60)
    ONE.runs = []  # what the first call's thread writes when it goes on is not looked at
    stuck, ONE.hang = ONE.hang, threading.Event()
    ONE.hang.set()
    mirror = bench.mirror()
    for record in records:
        mirror(record)
    assert [run_id for run_id, *_ in ONE.runs] == [record.spec.run_id for record in records]
    stuck.set()


def test_ctrl_c_during_a_replay_is_not_taken_for_the_trackers_fault(bench):
    ONE.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bench.mirror()(bench.record(1))
    assert bench.warnings == []


def test_a_tracker_that_is_not_there_is_a_warning_too(bench):
    warnings: list[str] = []
    Mirror(bench.home, ["none:THERE"], warnings.append)(bench.record(1))
    assert len(warnings) == 1
