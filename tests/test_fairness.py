"""The fairness ledger: what each arm was given and used, and what is said where that was not equal."""

from __future__ import annotations

import pytest
import scipy.stats

from finetrial.analyse import summarise
from finetrial.records import (
    Rung,
    SearchStop,
    Seeds,
)
from finetrial.report_tables import scores
from finetrial.report_text import paragraph
from finetrial.space import Fixed, Range
from made_records import (
    META,
    TRAINED,
    arm_of,
    control,
    cost,
    ended,
    failed,
    probe,
    proof,
    records,
    replaced,
    replicate,
    spec,
    study,
    toy_tasks,  # noqa: F401 - a fixture
    trial,
    without,
)


def test_the_ledger_adds_up_what_the_arm_used():
    row = summarise(study(), records(), META).ledger[1]
    assert row.method == "lora"
    assert (row.trials_planned, row.trials_done, row.attempts) == (3, 3, 8)
    assert (row.search_steps, row.search_tokens, row.search_flops) == (30, 1200, 300.0)
    assert (row.train_steps, row.train_tokens, row.train_flops) == (50, 2000, 500.0)
    assert row.train_rows == 40
    assert row.learning_rate_decades == pytest.approx(2)
    assert row.shared_streams


def test_cost_is_that_of_all_runs_and_the_interval_that_of_finished_replicates():
    found = replaced(records(), replicate("lora", 0, 0.8, cost=cost(6.0)))
    found = replaced(found, replicate("lora", 1, 0.8, cost=cost(100.0), outcome="diverged", reason="loss"))
    measured = arm_of(summarise(study(), found, META), "lora").cost
    assert measured.search_seconds == 3
    assert measured.train_seconds == 109
    assert measured.train_seconds_each.estimate == 9 / 4 / 2  # of steps alone


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda r: replaced(r, failed(spec("trial", 0, "lora"))),
            "toy: unequal numbers of trials done, of 3 each: full 3, lora 2",
        ),
        (lambda r: replaced(r, control(1e-4)), "toy: the base measured against itself drifts by up to 0.0001"),
        (
            lambda r: replaced(r, trial("full", 1, 1.0, 5e-6)),
            "toy/full: the best trial reaches the best possible f1 (1)",
        ),
        (
            lambda r: replaced(
                r, trial("full", 1, 0.9, 5e-6, settings_used={"learning_rate": 5e-5, "batch_size": 16})
            ),
            "toy/full: trials did not use the learning_rate that they were given",
        ),
        (
            lambda r: replaced(r, failed(spec("replicate", 1, "lora"))),
            "toy/lora: 1 of 5 replicates gave no score (0 diverged, 1 failed); means are over the rest",
        ),
    ],
)
def test_a_broken_fairness_rule_is_a_note_and_an_even_study_has_none(change, words):
    assert summarise(study(), records(), META).fairness_notes == ()
    notes = summarise(study(), change(records()), META).fairness_notes
    assert any(note.startswith(words) for note in notes), notes


def test_replicates_that_did_not_get_their_settings_are_noted():
    found = [
        r._replace(
            spec=r.spec.model_copy(update={"settings": {"learning_rate": 5e-4}}),
            result=r.result.model_copy(update={"settings_used": {"learning_rate": 5e-5}}),
        )
        if r.spec.stage == "replicate" and r.spec.method.name == "lora"
        else r
        for r in records()
    ]
    (note,) = summarise(study(), found, META).fairness_notes
    assert note == "toy/lora: replicates did not use the learning_rate that they were given"


def test_replicates_with_streams_of_their_own_are_noted():
    other = spec("replicate", 2, "lora")
    other = other.model_copy(update={"seeds": Seeds(data_order=1, head=1, adapter=1, dropout=1)})
    found = [r for r in records() if r.spec.run_id != spec("replicate", 2, "lora").run_id]
    found.append(ended(other, proof=proof(), scores={"test": {"f1": 0.79}}, score=0.79))
    summary = summarise(study(), found, META)
    assert not any(row.shared_streams for row in summary.ledger)
    assert any("did not share their random streams" in note for note in summary.fairness_notes)


def with_result(record, **fields):
    return record._replace(result=record.result.model_copy(update=fields))


def test_a_replicate_scored_on_other_inputs_than_the_baseline_does_not_count():
    def hashed(r, digest):
        trained = {} if r.spec.stage == "baseline" else {"train": "t"}
        return with_result(r, input_sha256={"test": digest, **trained})

    found = [hashed(r, "a") if r.spec.stage in ("baseline", "replicate") else r for r in records()]
    same, unhashed = summarise(study(), found, META), summarise(study(), records(), META)
    assert same.tasks[0].input_sha256 == {"test": "a", "train": "t"}
    assert same.model_copy(update={"tasks": unhashed.tasks}) == unhashed
    odd = hashed(replicate("lora", 2, 0.79), "b")
    summary = summarise(study(), replaced(found, odd), META)
    within, less = summary.claims
    assert within.pairs == less.pairs == (0, 1, 3, 4)
    assert arm_of(summary, "lora").replicates[2].void == "other test inputs than the baseline's"
    assert any(
        n.startswith("toy: runs were not all evaluated on the same test") for n in summary.fairness_notes
    )
    assert "lora 2: other test inputs than the baseline's" in within.reason


def test_replicates_of_all_methods_trained_on_the_same_inputs_or_do_not_count():
    def trained(r, digest):
        return with_result(r, input_sha256={"train": digest})

    found = [trained(r, "t") if r.spec.stage == "replicate" else r for r in records()]
    assert summarise(study(), found, META).arms == summarise(study(), records(), META).arms
    odd = trained(replicate("lora", 2, 0.79), "u")
    summary = summarise(study(), replaced(found, odd), META)
    assert [r.void for r in arm_of(summary, "full").replicates] == [None] * 5
    assert arm_of(summary, "lora").replicates[2].void == "other train inputs than most replicates of the task"
    assert summary.claims[0].pairs == (0, 1, 3, 4)
    halves = [trained(r, "u") if r.spec.method and r.spec.method.name == "lora" else r for r in found]
    summary = summarise(study(), halves, META)  # nothing tells which are right
    for method in ("full", "lora"):
        voids = {r.void for r in arm_of(summary, method).replicates}
        assert voids == {"other train inputs than as many replicates of the task"}


def test_a_probe_on_other_inputs_than_the_control_measured_something_else():
    odd = probe("lora", 2, 0.09)
    drift = {**odd.result.measures["drift"], "input_sha256": "y"}
    found = replaced(records(), with_result(odd, measures={"drift": drift}))
    summary = summarise(study(), found, META)
    within, less = summary.claims
    assert within.pairs == (0, 1, 2, 3, 4)
    assert less.pairs == (0, 1, 3, 4)
    assert "lora 2: probe on other inputs" in less.reason
    assert arm_of(summary, "lora").drift.replicates == (0, 1, 3, 4)


def test_runs_of_another_environment_are_named():
    found = [with_result(r, environment={"torch": "2.13.0", "threads": "1"}) for r in records()]
    assert summarise(study(), found, META).fairness_notes == ()
    odd = with_result(replicate("lora", 2, 0.79), environment={"torch": "2.14.0", "threads": "1"})
    notes = summarise(study(), replaced(found, odd), META).fairness_notes
    assert notes == (
        f"runs were not all made with the same torch: 2.13.0 (28 runs), 2.14.0 (1 run: {odd.spec.run_id}); "
        f"equal settings may then give unequal numbers",
    )


def test_unequal_learning_rate_widths_and_capped_rows_are_noted():
    spaces = {
        "full": {"learning_rate": Fixed(value=1e-5)},
        "lora": {"learning_rate": Range(low=1e-5, high=1e-2, log=True)},
    }
    notes = summarise(study(spaces=spaces, rows=20), records(), META).fairness_notes
    assert "learning-rate ranges are not equally wide: full not searched, lora 3 decades" in notes
    assert any(note.startswith("trials trained on 20 rows and replicates on all") for note in notes)


def test_an_arm_that_is_not_told_from_an_answer_without_training_is_noted():
    weak = [0.50, 0.52, 0.49, 0.51, 0.50]  # the majority class scores 0.5
    notes = summarise(study(), records(lora=weak), META).fairness_notes
    assert notes == (
        "toy/lora: its mean f1 on test, 0.504 (0.4898 to 0.5182), is not told from the best answer without "
        "training (majority, 0.5): it may have learnt nothing of the task",
    )
    low, high = scipy.stats.t.interval(0.95, 4, 0.504, scipy.stats.sem(weak))
    assert (round(low, 4), round(high, 4)) == (0.4898, 0.5182)


def test_an_arm_that_is_below_an_answer_without_training_is_said_to_be_worse():
    notes = summarise(study(), records(lora=[0.30, 0.32, 0.29, 0.31, 0.30]), META).fairness_notes
    assert any("is worse than the best answer without training (majority, 0.5)" in note for note in notes)
    assert not any("not told from" in note for note in notes)


def test_searches_that_were_ended_at_different_lengths_are_noted():
    """Though as many trials of each are done: of the longer one two diverged."""
    found = replaced(records(), failed(spec("trial", 2, "full"), "diverged", "loss"))
    found = without(found, "trial", "lora", 2)
    stop = SearchStop(after=2, planned=3, gain=0.0, noise=1.0)
    notes = summarise(study(), found, META, stops={"toy/lora": stop}).fairness_notes
    assert "toy: early_stop ended searches at different lengths, in trials: full after 3, lora after 2" in notes
    assert not any("unequal numbers of trials done" in note for note in notes)


def test_trials_that_moved_nothing_are_noted_and_do_not_end_with_a_score():
    found = replaced(records(), trial("lora", 1, 0.9, 5e-4, proof=proof(void="the adapter did not move")))
    summary = summarise(study(), found, META)
    assert any("toy/lora: 1 of its trials are void" in note for note in summary.fairness_notes)
    assert "1 of 6 search trials failed (1 void)" in paragraph(summary)


def halved(number, *ends, score=0.7, loss=0.5, **fields):
    """A trial's run to the last of these ends; without a loss it failed."""
    settings = {"learning_rate": 5e-4 * (number + 1), "batch_size": 16}
    made = spec("trial", number, "lora", settings=settings, rung=Rung(ends=ends))
    if loss is None:
        return failed(made, "diverged", "loss")
    return ended(
        made, score=score, validation_loss=loss if ends[-1] > 1 else None, settings_used=settings, **fields
    )


def test_an_optimum_that_was_never_trained_to_the_end_is_noted_and_the_ledger_counts_what_got_there():
    found = [r for r in records() if not (r.spec.stage == "trial" and r.spec.arm == "toy/lora")]
    found += [
        halved(0, 9),
        halved(1, 9, loss=0.4),
        halved(2, 9, loss=None),
        halved(1, 9, 3),
        halved(1, 9, 3, 1, loss=None),
    ]
    summary = summarise(study(halving=3), found, META)
    assert any(
        "toy/lora: no trial at full length gave a score; the best is one that was stopped at 1/9" in note
        for note in summary.fairness_notes
    )
    (row,) = [row for row in summary.ledger if row.method == "lora"]
    assert row.search_counts == (2, 1, 0)


def test_how_replicates_were_run_is_noted_where_it_changes_what_they_cost():
    short = [replicate("full", n, 0.8, cost=cost().model_copy(update={"gives_back": True})) for n in range(2)]
    recomputed = [
        replicate("lora", n, 0.8, training=TRAINED.model_copy(update={"gradient_checkpointing": True}))
        for n in range(5)
    ]
    notes = summarise(study(), replaced(records(), *short, *recomputed), META).fairness_notes
    (back,) = (note for note in notes if "gave large blocks" in note)
    assert "of toy/full gave" in back
    assert "those of toy/full, toy/lora did not" in back
    (twice,) = (note for note in notes if "computed activations twice" in note)
    assert "of toy/lora computed" in twice
    assert "those of toy/full did not" in twice


@pytest.mark.parametrize(("steps", "noted"), [(29, True), (30, False)])
def test_trials_that_are_compared_after_few_steps_are_noted(steps, noted):
    """On the average of those that ended there, not of one that was whole by then."""
    one, other = (TRAINED.model_copy(update={"steps": n, "planned_steps": 9 * n}) for n in (steps, 30))
    whole = TRAINED.model_copy(update={"steps": 1, "planned_steps": 1})
    found = [*records(), halved(3, 9, training=one), halved(4, 9, training=other), halved(5, 9, training=whole)]
    notes = summarise(study(), found, META).fairness_notes
    assert any(n.startswith("toy/lora: its trials are first compared after 29 steps") for n in notes) is noted


def test_an_arm_of_which_no_trial_has_a_score_is_said_to_have_no_replicates():
    found = [r for r in records() if r.spec.method is None or r.spec.method.name != "lora"]
    found += [failed(spec("trial", n, "lora"), "diverged", "loss") for n in range(3)]
    summary = summarise(study(), found, META)
    assert all("(lora 0 to 4: no trial gave a score)" in claim.reason for claim in summary.claims)
    assert "5 of 10 replicates were not trained, as no trial gave a score" in paragraph(summary)
    (row,) = [row for row in scores(summary, summary.tasks[0]).rows if row[0] == "lora"]
    assert row[1] == "0 of 5"


def test_seeds_are_those_that_have_a_score_so_far():
    found = [r for r in records() if r.spec.stage != "replicate" or r.spec.number < 2]
    summary = summarise(study(), found, META)
    assert [row[1] for row in scores(summary, summary.tasks[0]).rows[:2]] == ["2 of 5", "2 of 5"]
