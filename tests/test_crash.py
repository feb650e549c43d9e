"""A bounded slice of the fault campaign (`make crash`): a real study, attacked at points named in `bench/`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[1] / "bench" / "crash.py"
FAULTS = 60


@pytest.fixture(scope="module")
def crash() -> ModuleType:
    spec = importlib.util.spec_from_file_location("crash", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["crash"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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
    assert len({fault.kind for fault in fired}) == 11


def test_a_wrong_number_would_be_seen(crash, attacked):
    """The comparison itself, on a study that was tampered with."""
    trained = [run for run in attacked.outcome["weights"] if run.startswith(("trial", "replicate"))]
    assert len(trained) == 8
    assert all(len(attacked.outcome["weights"][run]) == 64 for run in trained)
    summary = attacked.home / "analysis" / "summary.json"
    text = summary.read_text()
    assert crash.outcome_of(attacked.home) == attacked.outcome
    summary.write_text(text.replace('"best_score": ', '"best_score": 1', 1))
    assert crash.outcome_of(attacked.home) != attacked.outcome
    assert list(crash.untidy(attacked.home)) == []
    next((attacked.home / "runs").glob("replicate.*/attempts/1.json")).unlink()
    assert list(crash.untidy(attacked.home)) != []
