"""A run's folder and what a study's end means: what may change in a begun run, and the exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetrial.evidence import trial_score
from finetrial.records import (
    Cost,
    GroupProof,
    How,
    ModelSource,
    Proof,
    Result,
    RunRecord,
    RunSpec,
    Seeds,
    TaskSpec,
)
from finetrial.store import RunFolder
from finetrial.terminal import exit_code
from summary_example import example_summary

SEEDS = Seeds(data_order=1, head=2, adapter=3, dropout=4)
SPEC = RunSpec(
    study="s", stage="trial", task=TaskSpec(name="t", use="t", params={}), number=0,
    model=ModelSource(name="./m"), seeds=SEEDS, how=How(base="/here"),
)  # fmt: skip


def test_a_begun_run_follows_a_changed_place_and_limit_and_keeps_its_id(tmp_path: Path):
    folder = RunFolder(tmp_path / SPEC.run_id)
    folder.create(SPEC)
    moved = SPEC.model_copy(update={"how": How(base="/there", limit_seconds=60.0, micro_batch=2)})
    folder.create(moved)
    assert folder.spec().how == moved.how
    assert folder.spec().run_id == SPEC.run_id


def result(void: str | None) -> Result:
    proof = Proof(
        groups={"adapter": GroupProof(tensors=1, moved=0, relative_change=None, change_norm=0.0)},
        largest={},
        void=void,
    )
    cost = Cost(wall_seconds=1.0, cpu_seconds=1.0, peak_memory_bytes=1, device="cpu")
    return Result(run_id=SPEC.run_id, outcome="done", score=99.0, proof=proof, cost=cost)


def test_a_trial_that_trained_nothing_has_no_score_to_win_with():
    assert trial_score(RunRecord(SPEC, result(None), None, ())) == 99.0
    assert trial_score(RunRecord(SPEC, result("nothing moved in: adapter"), None, ())) is None


def summary_with(*, complete: bool = True, kinds: tuple[str, ...] = (), valid: bool = True):
    """The example study with chosen failures, and arms with or without a valid replicate."""
    example = example_summary()
    row = example.failures[0]
    arms = tuple(arm.model_copy(update={"failed": 0 if valid else arm.planned}) for arm in example.arms)
    failures = tuple(row.model_copy(update={"kind": kind}) for kind in kinds)
    return example.model_copy(update={"complete": complete, "failures": failures, "arms": arms})


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ({}, 0),
        ({"kinds": ("diverged",)}, 0),  # counted and reported, and no fault
        ({"kinds": ("crashed",)}, 3),
        ({"valid": False}, 3),  # all replicates void or diverged: nothing was compared
        ({"complete": False}, 4),
        ({"complete": False, "kinds": ("diverged", "cancelled")}, 4),
        ({"complete": False, "kinds": ("crashed",)}, 3),
    ],
)
def test_the_exit_code_says_how_a_study_ended(case, code):
    assert exit_code(summary_with(**case)) == code
