"""A bounded slice of the fault campaign (`make crash`): a real study, attacked at points named in `bench/`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[1] / "bench"
FAULTS = 60


@pytest.fixture(scope="module")
def crash(bench_module) -> ModuleType:
    return bench_module("crash")


@pytest.fixture(scope="module")
def attacked(crash, tmp_path_factory):
    """The undisturbed study, and where the attacked ones go."""
    return crash.Field(tmp_path_factory.mktemp("field"))


@pytest.mark.timeout(1800)
def test_no_fault_loses_a_run_does_one_twice_or_changes_a_number(crash, attacked):
    fought = crash.campaign(attacked, FAULTS, seed=1, jobs=2)
    fired = [fault for chain in fought for fault in chain.fired]
    assert [line for chain in fought for line in chain.wrong] == []
    assert len(fired) >= FAULTS
    assert len({fault.phase for fault in fired}) == 9
    assert {fault.kind for fault in fired} == set(crash.KINDS)


def test_every_phase_gets_its_share_and_every_kind_is_chosen(crash, attacked):
    """At the size of the whole campaign, before anything is attacked."""
    waiting = crash.in_order_of_choice(crash.possible(attacked.passed), 0)
    assert len(waiting) == len(set(waiting)) > 1000
    chosen = crash.next_faults(waiting, [], 1000, 50)
    phases = [fault.phase for fault in chosen]
    assert set(phases) == {
        "import", "ask", "train", "save", "evaluate", "result", "export", "report", "clean-up",
    }  # fmt: skip
    assert min(phases.count(phase) for phase in set(phases)) >= 50
    assert {fault.kind for fault in chosen} == set(crash.KINDS)
    assert len({fault.point for fault in chosen}) >= 40
    assert not set(chosen) & set(waiting)


def test_the_nth_call_fails_once_and_the_study_is_the_same(tmp_path):
    """Some of the calls that `crash_nth.py` goes through in whole; it forks, so it has a process of its own.

    The 8th write comes after a run's end, the 17th is half a line of metrics.jsonl.
    """
    output = tmp_path / "nth.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCH / "crash_nth.py"), "--output", str(output)]
    command += ["--calls", "write", "fsync", "--numbers", "8", "17", "50"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert found["wrong"] == []
    assert [found[call]["failed"] for call in ("write", "fsync")] == [3, 3]


def test_a_wrong_number_would_be_seen(crash, attacked):
    """The comparison itself, on a study that was tampered with."""
    trained = [run for run in attacked.outcome["weights"] if run.startswith(("trial", "replicate"))]
    assert len(trained) == 2 * (3 + 1 + 1) + 2 * 2  # trials to each of their ends, replicates
    assert all(len(attacked.outcome["weights"][run]) == 64 for run in trained)
    summary = attacked.home / "analysis" / "summary.json"
    text = summary.read_text()
    assert crash.outcome_of(attacked.home) == attacked.outcome
    summary.write_text(text.replace('"best_score": ', '"best_score": 1', 1))
    assert crash.outcome_of(attacked.home) != attacked.outcome
    assert list(crash.untidy(attacked.home)) == []
    next((attacked.home / "runs").glob("replicate.*/attempts/1.json")).unlink()
    assert list(crash.untidy(attacked.home)) != []
