"""Records in, summary out: which runs count, verdicts, the ledger, what is said of failures."""

from __future__ import annotations

import math
import random
import sys
from types import ModuleType

import pytest
import scipy.stats

from finetrial import claims, report_measures
from finetrial.analyse import summarise
from finetrial.plugins import Metric, metric_of
from finetrial.records import (
    RunRecord,
    TaskSpec,
)
from finetrial.summary import Summary
from made_records import (
    FULL,
    FULL_DRIFT,
    LESS,
    LORA,
    LORA_DRIFT,
    META,
    TASK,
    WITHIN,
    arm_of,
    claim_of,
    ended,
    failed,
    frozen_body,
    proof,
    records,
    replaced,
    replicate,
    spec,
    study,
    toy_task,
    toy_tasks,  # noqa: F401 - a fixture
    trial,
    trials,
    without,
)

# ---- verdicts ------------------------------------------------------------------------------------------


def test_both_worked_examples_are_supported_with_their_published_numbers():
    summary = summarise(study(), records(), META, model_sha256="abc")
    within, less = summary.claims
    assert within.verdict == less.verdict == "supported"
    assert within.p_t == pytest.approx(0.00644, abs=5e-6)
    assert within.contrast.estimate == pytest.approx(0.01818, abs=1e-8)
    assert within.contrast_bound > 0
    assert within.p_sign_flip == less.p_sign_flip == 1 / 32
    assert less.p_t == pytest.approx(4.6e-6, rel=0.02)
    assert (within.p_holm, less.p_holm) == pytest.approx((within.p_t, 2 * less.p_t))
    assert within.difference.estimate == pytest.approx(-0.006)
    assert less.difference.estimate == pytest.approx(0.100 / 0.150 - 1)  # of the means
    assert within.pairs == (0, 1, 2, 3, 4)
    assert within.missing == ()
    # 80 % power: the noncentral t's tail beyond the critical value for one of two claims, by scipy.stats
    noncentrality = within.smallest_detectable / within.contrast.sd * 5**0.5
    critical = scipy.stats.t.ppf(1 - 0.05 / 2, 4)
    assert scipy.stats.nct.sf(critical, 4, noncentrality) == pytest.approx(0.80, abs=1e-6)
    assert "lora is at most 3 % worse than full" in within.reason
    assert summary.complete
    assert summary.model_sha256 == "abc"


def test_run_ids_of_a_claim_are_the_replicates_or_the_probes_it_was_judged_by():
    summary = summarise(study(), records(), META)
    known = {r.spec.run_id for r in records()}
    within, less = summary.claims
    assert len(within.run_ids) == len(less.run_ids) == 10
    assert all(i.startswith("replicate.toy") for i in within.run_ids)
    assert all(i.startswith("probe.toy") for i in less.run_ids)
    assert set(within.run_ids) | set(less.run_ids) <= known


def test_a_method_clearly_below_the_margin_is_refuted():
    summary = summarise(study([WITHIN]), records(lora=[0.70, 0.71, 0.69, 0.705, 0.695]), META)
    claim = summary.claims[0]
    assert claim.verdict == "refuted"
    assert claim.contrast_bound < 0
    assert claim.seeds_needed is None


def test_more_drift_than_claimed_is_refuted():
    summary = summarise(study([LESS]), records(lora_drift=FULL_DRIFT), META)
    assert summary.claims[0].verdict == "refuted"
    assert summary.claims[0].contrast_bound > 0


def test_between_the_two_it_is_inconclusive_and_says_what_would_settle_it():
    summary = summarise(study([WITHIN]), records(lora=[0.70, 0.85, 0.76, 0.86, 0.79]), META)
    claim = summary.claims[0]
    assert claim.verdict == "inconclusive"
    assert claim.seeds_needed > 5
    assert f"about {claim.seeds_needed} replicates would settle it with 80 % power" in claim.reason


def test_a_claim_that_holds_alone_but_not_after_holm_is_inconclusive():
    alone = records(lora=[0.785, 0.80, 0.79, 0.80, 0.815])
    single = summarise(study([WITHIN]), alone, META).claims[0]
    assert single.verdict == "supported"
    assert 0.025 < single.p_t < 0.05
    many = [WITHIN.model_copy(update={"text": f"{i}"}) for i in range(2)]
    for claim in summarise(study(many), alone, META).claims:
        assert claim.verdict == "inconclusive"
        assert claim.p_holm == pytest.approx(2 * single.p_t)
        assert "Holm over 2 claims" in claim.reason
        assert claim.seeds_needed > 5


def test_a_lower_is_better_metric_is_judged_the_other_way_round():
    task = TaskSpec(name="toy", use="toy_tasks:LOSS", params={})
    good = {"lora": [0.51, 0.50, 0.505, 0.5, 0.51], "full": [0.5, 0.505, 0.5, 0.51, 0.50]}
    summary = summarise(study([WITHIN], tasks=[task]), records(**good, trivial=0.9, task=task), META)
    assert summary.claims[0].verdict == "supported"
    assert summary.claims[0].contrast_bound < 0
    bad = summarise(
        study([WITHIN], tasks=[task]),
        records(**good | {"lora": [0.6, 0.61, 0.6, 0.62, 0.6]}, trivial=0.9, task=task),
        META,
    )
    assert bad.claims[0].verdict == "refuted"
    assert arm_of(bad, "lora").search.best_score == 0.6  # the lowest of 0.6, 0.7, 0.65


def test_a_reference_that_hardly_beats_the_majority_makes_the_claim_not_assessable():
    """Gain of 0.006 over 0.8 is less than twice 3 % of 0.806."""
    summary = summarise(study([WITHIN]), records(trivial=0.80), META)
    claim = summary.claims[0]
    assert claim.verdict == "not_assessable"
    assert "majority" in claim.reason
    assert "twice the margin" in claim.reason
    assert claim.p_t is claim.p_holm is claim.contrast_bound is None
    assert claim.difference.estimate == pytest.approx(-0.006)  # described all the same


@pytest.mark.parametrize(("trivial", "verdict"), [(0.77, "not_assessable"), (0.75, "supported")])
def test_the_reference_must_gain_two_margins_over_the_trivial_baseline(trivial, verdict):
    """Two margins are 2 x 3 % of 0.806 = 0.0484; the gains are 0.036 and 0.056."""
    assert summarise(study([WITHIN]), records(trivial=trivial), META).claims[0].verdict == verdict


def test_the_untrained_model_is_shown_and_is_not_the_trivial_baseline():
    found = records()
    high = found[0].result.model_copy(update={"scores": {"test": {"f1": 0.80}}})
    found[0] = found[0]._replace(result=high)
    summary = summarise(study([WITHIN]), found, META)
    assert summary.tasks[0].baselines["untrained"] == {"f1": 0.80}
    assert summary.claims[0].verdict == "supported"


@pytest.mark.parametrize(("higher", "best"), [(True, 0.7), (False, 0.2)])
def test_the_best_baseline_of_those_that_count_is_named_and_of_equals_the_first(higher, best):
    [task] = summarise(study(), records(), META).tasks
    scores = {"uniform": best, "majority": best, "untrained": best, "none": 0.5, "frozen body": 2 * best - 0.5}
    baselines = {name: {"f1": value} for name, value in scores.items()} | {"other": {"loss": 9.0}}
    task = task.model_copy(update={"baselines": baselines, "higher_is_better": higher})
    assert task.best_baseline() == ("frozen body", 2 * best - 0.5)
    assert task.best_baseline("frozen body") == ("uniform", best)
    assert task.best_baseline("frozen body", "uniform", "untrained") == ("majority", best)
    assert task.best_baseline(metric="loss") == ("other", 9.0)
    assert task.best_baseline(metric="absent") is None


def test_a_head_on_a_frozen_body_is_a_baseline_and_its_body_a_control():
    summary = summarise(study(), replaced(records(), frozen_body(0.79, drift=0.0)), META)
    [task] = summary.tasks
    assert task.baselines["frozen body"] == {"f1": 0.79}
    assert [control.name for control in task.controls] == ["base against base", "frozen body"]
    assert task.controls[1].drift == (0.0, 0.0, 0.0)
    assert claim_of(summary, "within").verdict == "supported"  # a trivial answer it is not


def test_a_frozen_body_that_moved_is_noted_and_drifts_below_it_are_noise():
    summary = summarise(study(), replaced(records(), frozen_body(drift=0.2)), META)
    assert any("a frozen body drifts by up to 0.2 instead of 0" in note for note in summary.fairness_notes)
    assert claim_of(summary, "drifts_less").verdict == "not_assessable"


def test_a_head_that_did_not_train_is_no_baseline_and_a_study_without_it_is_not_complete():
    void = frozen_body(proof=proof(void="the head did not move"))
    assert "frozen body" not in summarise(study(), replaced(records(), void), META).tasks[0].baselines
    found = [r for r in records() if r.spec.run_id != frozen_body().spec.run_id]
    assert not summarise(study(), found, META).complete


def test_without_a_baseline_the_margin_has_no_proportion():
    found = replaced(records(), failed(spec("baseline", 0)))
    claim = summarise(study([WITHIN]), found, META).claims[0]
    assert claim.verdict == "not_assessable"
    assert "no baseline" in claim.reason


def test_drift_within_the_numeric_noise_is_not_assessable():
    small = {"lora_drift": [1e-7] * 5, "full_drift": [2e-7, 2.1e-7, 2e-7, 1.9e-7, 2e-7]}
    claim = summarise(study([LESS]), records(**small, noise=1e-7), META).claims[0]
    assert claim.verdict == "not_assessable"
    assert "numeric noise" in claim.reason
    assert summarise(study([LESS]), records(**small, noise=1e-9), META).claims[0].verdict == "supported"


def test_a_family_is_the_claims_that_can_be_assessed():
    summary = summarise(study(), records(trivial=0.80), META)
    less = claim_of(summary, "drifts_less")
    assert less.p_holm == less.p_t


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_with_three_pairs_or_fewer_the_report_describes_and_gives_no_verdict(seeds):
    summary = summarise(
        study(seeds=seeds),
        records(LORA[:seeds], FULL[:seeds], LORA_DRIFT[:seeds], FULL_DRIFT[:seeds]),
        META,
    )
    for claim in summary.claims:
        assert claim.verdict == "not_assessable"
        assert "at least 4" in claim.reason
        assert claim.difference.n == seeds
        assert claim.p_t is None
    assert summary.complete


def test_five_equal_contrasts_have_no_t_and_rest_on_the_sign_flip():
    claim = summarise(study([WITHIN]), records(lora=[0.8] * 5, full=[0.8] * 5), META).claims[0]
    assert claim.p_t is None
    assert claim.p_holm == claim.p_sign_flip == 1 / 32
    assert claim.verdict == "supported"


# ---- what failed ---------------------------------------------------------------------------------------


def test_failed_diverged_and_void_replicates_are_counted_named_and_not_averaged():
    found = replaced(
        records(),
        failed(spec("replicate", 1, "lora")),
        replicate("full", 3, 0.0, outcome="diverged", reason="loss is not finite", scores={}),
        replicate("lora", 4, 0.99, proof=proof(void="adapter did not move")),
    )
    found = without(without(found, "probe", "lora", 1), "probe", "full", 3)
    summary = summarise(study(), found, META)
    within = claim_of(summary, "within")
    assert within.pairs == (0, 2)
    assert within.missing == (1, 3, 4)
    assert within.verdict == "not_assessable"
    assert "lora 1: crashed" in within.reason
    assert "lora 4: void, adapter did not move" in within.reason
    assert "full 3: diverged" in within.reason
    lora = arm_of(summary, "lora")
    assert lora.failed == 2
    assert lora.planned == 5
    assert lora.test["f1"].n == 3
    assert lora.test["f1"].estimate == pytest.approx((0.80 + 0.79 + 0.805) / 3)
    assert lora.drift.replicates == (0, 2, 3)  # a void replicate's drift does not count either
    assert [(f.kind, f.reason, f.attempts) for f in summary.failures] == [
        ("diverged", "loss is not finite", 1),
        ("crashed", "signal 9", 3),
    ]
    row = next(r for r in summary.ledger if r.method == "lora")
    assert (row.replicates_done, row.replicates_failed, row.replicates_diverged) == (4, 1, 0)
    assert any("toy/lora: void replicates: 4 (adapter did not move)" in n for n in summary.fairness_notes)
    assert summary.complete


@pytest.mark.parametrize(
    ("seeds", "claims", "words"),
    [
        (4, [WITHIN], "lora - 0.97 × full is 0.03 in every pair, of which p is 0.062; "),
        (
            5,
            [WITHIN, WITHIN],
            "in every pair, of which p is 0.031 by itself and 0.062 after Holm over 2 claims; ",
        ),
    ],
)
def test_of_equal_differences_it_is_said_that_there_are_too_few(seeds, claims, words):
    summary = summarise(study(claims, seeds=seeds), records(*[[1.0] * seeds] * 4), META)
    assert {claim.verdict for claim in summary.claims} == {"inconclusive"}
    assert words in summary.claims[0].reason


def test_the_tested_factor_is_not_rounded():
    claim = WITHIN.model_copy(update={"margin": 0.0025})
    assert "lora - 0.9975 × full" in summarise(study([claim]), records(), META).claims[0].reason


def test_where_no_replicate_has_a_score_there_are_no_means_over_the_rest():
    found = replaced(records(), *(failed(spec("replicate", number, "lora")) for number in range(5)))
    (note,) = [n for n in summarise(study(), found, META).fairness_notes if "gave no score" in n]
    assert note == "toy/lora: 5 of 5 replicates gave no score (0 diverged, 5 failed)"


def test_one_missing_pair_is_said_in_the_reason_of_a_verdict():
    found = without(replaced(records(), failed(spec("replicate", 2, "lora"))), "probe", "lora", 2)
    claim = summarise(study([WITHIN]), found, META).claims[0]
    assert claim.verdict == "supported"
    assert claim.missing == (2,)
    assert "1 of 5 pairs is missing (lora 2: crashed)" in claim.reason


def test_a_replicate_without_proof_of_training_is_void():
    summary = summarise(study(), replaced(records(), replicate("lora", 0, 0.9, proof=None)), META)
    assert arm_of(summary, "lora").replicates[0].void == "no proof of training"
    assert claim_of(summary, "within").missing == (0,)


def test_drift_that_was_not_measured_leaves_scores_alone():
    found = [r for r in records() if r.spec.stage != "probe"]
    found = replaced(found, ended(frozen_body().spec, scores={"test": {"f1": 0.5}}, proof=proof()))
    summary = summarise(study(measure=()), found, META)
    assert claim_of(summary, "within").verdict == "supported"
    less = claim_of(summary, "drifts_less")
    assert less.verdict == "not_assessable"
    assert "drift not measured" in less.reason
    assert less.difference is None
    assert arm_of(summary, "lora").drift is None
    assert summary.tasks[0].controls == ()
    assert summary.complete


def test_a_failed_probe_is_named():
    found = replaced(records(), failed(spec("probe", 2, "lora"), "out_of_memory", "12 GB"))
    less = claim_of(summarise(study(), found, META), "drifts_less")
    assert less.missing == (2,)
    assert "lora 2: probe out of memory" in less.reason


# ---- unfinished studies --------------------------------------------------------------------------------


def test_an_unfinished_study_is_summarised_and_said_to_be_incomplete():
    waiting = RunRecord(spec("replicate", 4, "lora"), None, None, ())
    summary = summarise(study(), replaced(records(), waiting), META)
    assert not summary.complete
    assert len(arm_of(summary, "lora").replicates) == 4
    assert arm_of(summary, "lora").failed == 0
    assert claim_of(summary, "within").verdict == "supported"
    assert claim_of(summary, "within").missing == (4,)
    assert "lora 4: not finished" in claim_of(summary, "within").reason


def test_a_cancelled_run_is_left_waiting_and_is_no_failure_of_its_arm():
    found = replaced(records(), failed(spec("replicate", 4, "lora"), "cancelled", "interrupted"))
    summary = summarise(study(), found, META)
    assert not summary.complete
    assert arm_of(summary, "lora").failed == 0


@pytest.mark.parametrize("stages", [(), ("baseline",), ("baseline", "trial")])
def test_a_study_that_has_only_begun_has_a_summary(stages):
    found = [r for r in records() if r.spec.stage in stages]
    summary = summarise(study(), found, META)
    assert not summary.complete
    for claim in summary.claims:
        assert claim.verdict == "not_assessable"
        assert claim.missing == (0, 1, 2, 3, 4)
        assert "0 of 5 pairs" in claim.reason
        assert "(lora 0 to 4: not finished; full 0 to 4: not finished)" in claim.reason
    assert all(a.test == {} for a in summary.arms)
    assert all(a.cost.train_seconds_each is None if "trial" in stages else a.cost is None for a in summary.arms)
    assert Summary.model_validate_json(summary.model_dump_json()) == summary


def test_an_arm_whose_trials_all_failed_ends_there():
    found = [r for r in records() if r.spec.method is None or r.spec.method.name != "lora"]
    found += [failed(spec("trial", n, "lora"), "diverged", "loss") for n in range(3)]
    summary = summarise(study(), found, META)
    assert summary.complete
    assert arm_of(summary, "lora").search.best is None
    assert next(r for r in summary.ledger if r.method == "lora").trials_diverged == 3


# ---- search and drift ----------------------------------------------------------------------------------


def test_the_best_trial_is_the_highest_and_among_equals_the_first():
    found = replaced(records(), *trials("lora", (0.7, 0.6, 0.7)))
    search = arm_of(summarise(study(), found, META), "lora").search
    assert search.best.startswith("trial.toy.lora.000-")
    assert search.best_score == 0.7
    assert [t.startup for t in search.trials] == [True, False, False]


def test_a_guided_trial_is_not_called_a_random_one_though_more_trials_make_the_start_up_longer():
    """With 3 trials 1 was drawn; of 6, 2 would be, and the second was guided."""
    assert study(trials=6).search.startup_trials == 2
    search = arm_of(summarise(study(trials=6), records(), META), "lora").search
    assert [t.startup for t in search.trials] == [True, False, False]


def test_a_diverged_trial_is_never_the_best():
    found = replaced(records(), trial("lora", 1, 0.99, 5e-4, outcome="diverged", reason="loss"))
    search = arm_of(summarise(study(), found, META), "lora").search
    assert search.best.startswith("trial.toy.lora.002-")
    assert search.trials[1].score is None


def test_an_optimum_where_the_setting_itself_ends_is_no_edge():
    best = trial("lora", 1, 0.9, 5e-4)
    settings = {**best.spec.settings, "warmup_ratio": 0.0}
    best = best._replace(spec=best.spec.model_copy(update={"settings": settings}))
    found = summarise(study(), replaced(records(), best), META)
    warmup = next(d for d in arm_of(found, "lora").search.dimensions if d.name == "warmup_ratio")
    assert (warmup.low, warmup.optimum, warmup.edge) == (0.0, 0.0, None)
    assert next(r for r in found.ledger if r.method == "lora").edge_flags == ()


def test_a_metric_without_a_bound_is_summarised(monkeypatch):
    module = ModuleType("toy_open")
    module.OPEN = toy_task()
    module.OPEN.metric = Metric("f1", True, 0.0, math.inf)
    monkeypatch.setitem(sys.modules, "toy_open", module)
    task = TaskSpec(name="toy", use="toy_open:OPEN", params={})
    summary = summarise(study(tasks=(task,)), records(task=task), META)
    assert summary.tasks[0].best_possible is None
    assert arm_of(summary, "lora").test["f1"].n == 5


def test_an_optimum_at_the_end_of_its_range_is_flagged_everywhere():
    found = replaced(records(), trial("lora", 1, 0.9, 4.9e-3))
    summary = summarise(study(), found, META)
    rate = next(d for d in arm_of(summary, "lora").search.dimensions if d.name == "learning_rate")
    assert (rate.edge, rate.optimum, rate.low, rate.high, rate.log) == (
        "high",
        4.9e-3,
        5e-5,
        5e-3,
        True,
    )
    assert next(r for r in summary.ledger if r.method == "lora").edge_flags == ("learning_rate: high",)
    assert any("toy/lora: the best learning_rate, 0.0049" in note for note in summary.fairness_notes)


def test_drift_per_layer_and_replicate_with_the_seed_to_seed_band_and_the_control():
    summary = summarise(study(), records(), META)
    drift = arm_of(summary, "lora").drift
    assert [layer.layer for layer in drift.layers] == [0, 1, 2]
    assert drift.layers[0].cka == (0.0,) * 5
    assert drift.layers[1].cka == pytest.approx(LORA_DRIFT)
    assert drift.layers[1].cka_mean == pytest.approx(0.10)
    assert drift.layers[2].seed_to_seed == pytest.approx([0.01] * 4)
    assert drift.cka.estimate == pytest.approx(0.10)
    assert drift.seed_to_seed.estimate == pytest.approx(0.01)
    assert (drift.seed_to_seed.low, drift.seed_to_seed.n) == (None, 4)  # neighbouring pairs share a model
    assert drift.per_replicate["3"] == 0.105
    assert summary.tasks[0].controls[0].drift == (0.0, 0.0, 0.0)
    assert summary.tasks[0].controls[0].run_id.startswith("probe.toy.000-")


def test_numbers_of_a_probe_of_one_s_own_are_summarised_over_replicates_and_reported():
    """Not: what is no number, what only some replicates have, and the probes with a place of their own."""
    found = records()
    probes = [r for r in found if r.spec.stage == "probe" and r.spec.arm == "toy/lora"]
    for n, probe in enumerate(probes):
        own = {"relative_change": 0.01 * (n + 1), "tensors": 4, "kept": True, "name": "x", "layers": [1, 2]}
        own |= {"huge": 10**400, "large": 1e300} | ({} if n else {"some": 1.0})
        result = probe.result.model_copy(update={"measures": {**probe.result.measures, "change": own}})
        found = replaced(found, probe._replace(result=result))
    summary = summarise(study(), found, META)
    assert arm_of(summary, "full").own_measures == {}
    numbers = arm_of(summary, "lora").own_measures["change"]
    assert sorted(numbers) == ["relative_change", "tensors"]
    change = numbers["relative_change"]
    low, high = scipy.stats.t.interval(0.95, 4, 0.03, scipy.stats.sem([0.01, 0.02, 0.03, 0.04, 0.05]))
    assert (change.estimate, change.low, change.high) == pytest.approx((0.03, low, high))
    table = report_measures.own(summary, summary.tasks[0])
    assert table.rows[0] == ("change: relative change", "– (not measured)", "0.03 (0.0104 to 0.0496)")
    assert table.rows[1][-1] == "4 (4 to 4)"


def test_a_void_replicate_is_nobodys_neighbour():
    stuck = replicate("lora", 2, 0.8, proof=proof(void="the head did not move"))
    drift = arm_of(summarise(study(), replaced(records(), stuck), META), "lora").drift
    assert drift.replicates == (0, 1, 3, 4)
    assert drift.seed_to_seed.n == 2  # 1 beside 0, and 4 beside 3


# ---- the whole -----------------------------------------------------------------------------------------


def test_equal_studies_give_equal_summaries_whatever_the_order_and_the_times():
    slower = [
        r._replace(
            result=r.result.model_copy(
                update={"cost": r.result.cost.model_copy(update={"wall_seconds": 9.0, "peak_memory_bytes": 99})}
            )
        )
        for r in records()
    ]
    random.Random(3).shuffle(slower)
    later = META.model_copy(update={"created_at": "later"})
    first, second = summarise(study(), records(), META), summarise(study(), slower, later)
    assert first != second

    def lasting(summary):
        data = summary.model_dump(mode="json", exclude={"meta"})
        for arm in data["arms"]:
            del arm["cost"]
        return data

    assert lasting(first) == lasting(second)


def test_a_summary_goes_through_json_unchanged():
    summary = summarise(study(), records(), META)
    assert Summary.model_validate_json(summary.model_dump_json()) == summary


def test_each_claim_is_judged_on_each_task_by_its_own_runs():
    other = TaskSpec(name="other", use="toy_tasks:TOY", params={})
    found = records() + records(lora=[0.5] * 5, task=other)
    summary = summarise(study([WITHIN], tasks=[TASK, other]), found, META)
    assert [(c.task, c.verdict) for c in summary.claims] == [
        ("toy", "supported"),
        ("other", "refuted"),
    ]
    assert [a.task for a in summary.arms] == ["toy", "toy", "other", "other"]


def test_a_metric_may_depend_on_the_task_s_parameters():
    chosen = TaskSpec(name="t", use="toy_tasks:CHOSEN", params={"metric": "matthews"})
    assert metric_of(chosen).name == "matthews"
    assert metric_of(TASK).name == "f1"


def test_a_verdict_needs_no_fewer_pairs_than_documented():
    side = lambda name, values: claims.Side(  # noqa: E731
        name, dict(enumerate(values)), {i: (f"{name}{i}",) for i in range(len(values))}, {}
    )
    case = claims.Case(WITHIN, "t", side("lora", LORA[:4]), side("full", FULL[:4]), trivial=("majority", 0.5))
    assert claims.judge([case])[0].verdict == "supported"


def test_too_few_planned_replicates_say_what_to_do():
    few = summarise(
        study(seeds=2), records(lora=LORA[:2], full=FULL[:2], lora_drift=[0.1] * 2, full_drift=[0.2] * 2), META
    )
    assert few.claims[0].reason.endswith("needs at least 4; raise train.seeds, finished runs are kept")
