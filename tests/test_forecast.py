"""How long a study takes: by hand, and by what has to hold for any."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetrial import plan
from finetrial.check import halving_notes
from finetrial.check_report import duration
from finetrial.forecast import Evidence, epoch_seconds, first_end_steps, forecast, makespan
from finetrial.records import Attempt, Cost, Result, RunRecord
from finetrial.rehearsed import Overfit, Pace, Phase, Rehearsal, Try
from finetrial.study import Study
from finetrial.study_file import parse_study
from wrong_study_files import text_of

lanes = st.lists(st.floats(0, 1e4), max_size=20)


@given(lanes, st.integers(1, 8))
def test_a_phase_takes_no_less_than_its_longest_lane_and_its_share_and_no_more_than_all(seconds, places):
    took = makespan(seconds, places)
    assert took >= max([*seconds, 0.0]) - 1e-6
    assert took >= sum(seconds) / places - 1e-6
    assert took <= sum(seconds) / places + max([*seconds, 0.0]) + 1e-6  # Graham 1966
    assert makespan(seconds, 1) == pytest.approx(sum(seconds))


def test_lanes_are_begun_in_order():
    assert makespan([3, 2, 2], 2) == 4
    assert makespan([2, 2, 3], 2) == 5


def test_a_lane_waits_for_its_group_and_lanes_take_turns():
    assert makespan([[[2, 3], [1]]], 2) == 4
    assert makespan([[[2, 3], [1]]], 1) == 6
    assert makespan([[[1, 1], [1]], [[2]]], 2) == 3  # not both of the first lane's first


@given(st.floats(0.01, 10), st.floats(0.001, 10), st.integers(1, 64), st.integers(65, 512), st.integers(1, 512))
def test_a_cost_per_row_and_one_per_step_are_met_between_two_paces(row, step, small, large, size):
    def took(batch_size: float) -> float:
        return 1000 * row + 1000 / batch_size * step

    paces = [Pace(batch_size=b, steps=1, padded_tokens=1, seconds=took(b)) for b in (small, large)]
    assert epoch_seconds(paces, size) == pytest.approx(took(min(max(size, small), large)))


STUDY = parse_study(
    text_of(
        methods="{full: {search: {learning_rate: 1e-3}}, lora: {search: {learning_rate: 1e-2}}}",
        search="{trials: 4, rows: 100, space: {epochs: [1, 3], batch_size: [10, 20]}}",
        train="{seeds: 3}", claims="[]", run="{parallel: 2, checkpoint: 1000 s}",
    ),
    file="study.yaml", base=Path(),
)  # fmt: skip
[TASK] = STUDY.tasks
INPUTS = {TASK.name: {}}


def rehearsal(pace: float) -> Rehearsal:
    """A step takes `pace` seconds at either batch size, 10 and 20."""

    def phase(rows: int, setup: float) -> Phase:
        paces = [(10, rows / 10 * pace), (20, rows / 20 * pace)]
        return Phase(
            setup_seconds=setup,
            paces=tuple(Pace(batch_size=b, steps=rows // b, padded_tokens=1, seconds=s) for b, s in paces),
        )

    learnt = Try(learning_rate=1e-3, steps=5, first_loss=1.0, loss=0.05, diverged=None, learnt=True)
    return Rehearsal(
        batch_size=20, micro_batches=1, micro_batch_tokens=None, gradient_checkpointing=False, budget_bytes=100,
        predicted_memory_bytes=50, measured_memory_bytes=50, overfit=Overfit(tries=(learnt,), fault=None),
        tokens_per_second=1.0, search=phase(100, 5.0), train=phase(1000, 9.0), validation_seconds=2.0,
        test_seconds=30.0, checkpoint_seconds=1.0, checkpoint_bytes=7_000, save_seconds=4.0, model_bytes=1_000,
        probe_seconds=10.0, contradictions=0,
    )  # fmt: skip


def record(spec, wall: float, span: float, **changes) -> RunRecord:
    cost = Cost(
        wall_seconds=wall, cpu_seconds=wall, peak_memory_bytes=1, device="cpu", **changes.pop("cost", {})
    )
    result = Result(run_id=spec.run_id, outcome="done", cost=cost, **changes)
    attempt = Attempt(number=1, host="h", pid=1, started_at=0.0, ended_at=span, outcome="done")
    return RunRecord(spec, result, None, (attempt,))


def evidence(**changes) -> Evidence:
    baseline = plan.baseline(STUDY, TASK, INPUTS, 1)
    rehearsals = {}
    for method, pace in zip(STUDY.methods, (1.0, 2.0), strict=True):
        spec = plan.rehearsal(STUDY, TASK, method, INPUTS, 1)
        found = {"rehearsal": rehearsal(pace).model_dump(mode="json")}
        rehearsals[spec.arm] = record(spec, 10.0, 11.0, measures=found)
    return Evidence({TASK.name: record(baseline, 20.0, 21.0)}, rehearsals, {}, **changes)


def test_a_study_by_hand():
    """A run starts in one second. Two epochs in the mean, each 7.5 steps (10 and 5), at 1 s and 2 s."""
    control = record(plan.baseline(STUDY, TASK, INPUTS, 1), 5.0, 6.0)
    found = forecast(STUDY, evidence(controls={TASK.name: control}), 2)
    full, lora = found.arms.values()
    evaluations = 2 * 2.0
    assert full.trial_seconds == pytest.approx(1 + 5 + 2 * 7.5 + evaluations)
    assert lora.trial_seconds == pytest.approx(1 + 5 + 2 * 15 + evaluations)
    assert full.replicate_seconds == pytest.approx(1 + 9 + 2 * 75 + evaluations + 30 + 4)
    assert lora.probe_seconds == pytest.approx(1 + 10)
    assert found.phases["baseline"] == 21
    assert found.phases["search"] == pytest.approx(4 * lora.trial_seconds)  # two lanes side by side
    assert found.phases["train"] == makespan([full.replicate_seconds] * 3 + [lora.replicate_seconds] * 3, 2)
    assert found.phases["control"] == 6
    assert found.phases["measure"] == makespan([11] * 6, 2)
    assert found.seconds == pytest.approx(math.fsum(found.phases.values()))
    assert found.correction == 1.0
    assert found.disk_bytes >= 3 * 2 * 1_000 + 2 * 2 * 7_000


def test_the_pilots_correct_the_pace_of_every_arm():
    """Three epochs at batch size 20: 15 steps of 1 s and 3 evaluations of 2 s; they took a third longer."""
    settings = {"learning_rate": 1e-3, "epochs": 3, "batch_size": 20, "warmup_ratio": 0.0, "weight_decay": 0.0}
    spec = plan.trial(STUDY, TASK, STUDY.methods[0], 0, settings, INPUTS, 1)
    pilot = record(spec, 35.0, 36.0, cost={"train_seconds": 20.0, "evaluate_seconds": 8.0})
    found = forecast(STUDY, evidence(pilots=[pilot]), 2)
    assert found.correction == pytest.approx(28 / 21)
    lora = found.arms[f"{TASK.name}/lora"]
    assert lora.trial_seconds == pytest.approx(1 + 5 + (2 * 15 + 2 * 2.0) * 28 / 21)


def test_a_disturbed_pilot_corrects_no_more_than_twice():
    settings = {"learning_rate": 1e-3, "epochs": 3, "batch_size": 20, "warmup_ratio": 0.0, "weight_decay": 0.0}
    spec = plan.trial(STUDY, TASK, STUDY.methods[0], 0, settings, INPUTS, 1)
    pilot = record(spec, 35.0, 36.0, cost={"train_seconds": 2000.0, "evaluate_seconds": 8.0})
    assert forecast(STUDY, evidence(pilots=[pilot]), 2).correction == 2.0


def test_checkpoints_cost_what_they_take():
    often = STUDY.model_copy(update={"run": STUDY.run.model_copy(update={"checkpoint_seconds": 10.0})})
    before, after = (forecast(each, evidence(), 2).arms[f"{TASK.name}/full"] for each in (STUDY, often))
    assert after.trial_seconds - before.trial_seconds == pytest.approx(math.floor((2 * 7.5 + 4) / 10))


def halved() -> Study:
    return STUDY.model_copy(update={"search": STUDY.search.model_copy(update={"halving": 3})})


def test_a_halved_search_by_hand():
    """One or three epochs, 7.5 steps of 1 s each; an evaluation after every epoch, and at the ends 1/9, 1/3, 1.

    Of one epoch: at 1/9, at 1/3, at the end. Of three: at 1/9, at 1/3 (both in one), at 2/3 and the end.
    """
    full = forecast(halved(), evidence(), 2).arms[f"{TASK.name}/full"]
    first, second, third = 15 / 9 + 2.0, 2 * 15 / 9 + 2.0, 2 * 15 / 3 + (1 + 2) / 2 * 2.0
    counts = halved().search.counts
    assert counts == (4, 2, 1)
    expected = sum(count * (1 + 5 + part) for count, part in zip(counts, (first, second, third), strict=True))
    assert full.search_seconds == pytest.approx(expected)


def searching(search: str) -> Study:
    methods = "{full: {search: {learning_rate: 1e-3}}, lora: {search: {learning_rate: 1e-2}}}"
    return parse_study(
        text_of(methods=methods, search=search, train="{seeds: 3}", claims="[]"), file="s.yaml", base=Path()
    )


def test_a_long_study_of_whole_trials_is_told_what_halving_would_save():
    """Of 100 rows in batches of one, three epochs: 300 steps, of which the ninth is 33."""
    rules = "trials: 60, rows: 100, space: {epochs: 3, batch_size: 1}"
    whole, halved_ = searching(f"{{{rules}}}"), searching(f"{{{rules}, halving: 3}}")
    [foretold, sooner] = (forecast(study, evidence(), 2) for study in (whole, halved_))
    assert foretold.seconds > 1800
    assert sooner.seconds < 0.9 * foretold.seconds
    [note] = halving_notes(whole, evidence(), foretold, 2)
    assert f"`search.halving: 3` the whole study would take about {duration(sooner.seconds)}" in note
    assert halving_notes(halved_, evidence(), sooner, 2) == []
    short = searching(f"{{{rules.replace('60', '4')}}}")
    assert halving_notes(short, evidence(), forecast(short, evidence(), 2), 2) == []


def test_trials_that_are_too_short_for_halving_are_told_before_they_begin():
    """Two epochs in the mean, of 10 or 5 steps: a ninth of 15 steps."""
    rules = "trials: 60, rows: 100, space: {epochs: [1, 3], batch_size: [10, 20]}"
    whole, halved_ = searching(f"{{{rules}}}"), searching(f"{{{rules}, halving: 3}}")
    foretold = forecast(whole, evidence(), 2)
    assert first_end_steps(whole.spaces["full"], rehearsal(1.0), 3) == pytest.approx(15 / 9)
    assert halving_notes(whole, evidence(), foretold, 2) == []  # though it is long
    notes = halving_notes(halved_, evidence(), forecast(halved_, evidence(), 2), 2)
    assert [note.partition(": ")[0] for note in notes] == [f"{TASK.name}/full", f"{TASK.name}/lora"]
    assert all("first compared after 1 step on the average" in note for note in notes)


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_pilot_at_its_rehearsals_pace_corrects_nothing_with_halving(epochs):
    settings = {
        "learning_rate": 1e-3,
        "epochs": epochs,
        "batch_size": 20,
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
    }
    spec = plan.trial(halved(), TASK, STUDY.methods[0], 0, settings, INPUTS, 1)
    took = {"train_seconds": 5.0 * epochs / 9, "evaluate_seconds": 2.0}
    pilot = record(spec, 35.0, 36.0, cost=took)
    assert forecast(halved(), evidence(pilots=[pilot]), 2).correction == pytest.approx(1.0)
