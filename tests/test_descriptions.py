"""What stands beside the verdicts: tuning curves, effect sizes, test examples, all tasks together.

Known answers are by hand, by brute force over subsets, or scipy's.
"""

from __future__ import annotations

import sys
from itertools import combinations
from types import ModuleType

import numpy as np
import pytest
import scipy.stats

from finetrial.analyse import summarise
from finetrial.plugins import Metric
from finetrial.records import TaskSpec
from finetrial.study import Claim
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
    drawn,
    ended,
    failed,
    proof,
    records,
    replaced,
    replicate,
    spec,
    study,
    toy_task,
    toy_tasks,  # noqa: F401 - an automatic fixture
    trial,
)

FORGETS = Claim(
    text="lora forgets less than full", kind="forgets_less", method="lora", reference="full", margin=0
)


# ---- tuning curves -------------------------------------------------------------------------------------


def drawn_trial(number, score, method="lora", task=TASK, **fields):
    settings = drawn(method, number)
    return ended(
        spec("trial", number, method, task, settings=settings),
        **{"score": score, "settings_used": settings, **fields},
    )


def curve_of(scores, *, method="lora", task=TASK, **search):
    """The curve of an arm all of whose trials were drawn at random; None is a failed one."""
    trials = [
        failed(spec("trial", n, method, task, settings=drawn(method, n)), "out_of_memory", "too large")
        if score is None
        else drawn_trial(n, score, method, task)
        for n, score in enumerate(scores)
    ]
    asked = study(trials=len(scores), tasks=[task], **{"sampler": "random", **search})
    return arm_of(summarise(asked, [*records(task=task)[:2], *trials], META), method).search.curve


def best_of_subsets(scores, n, choose=max):
    return float(np.mean([choose(some) for some in combinations(scores, n)]))


def assert_around(curve, top):
    for low, expected, high in zip(curve.low, curve.expected, curve.high, strict=True):
        assert -1e-9 <= low <= expected + 1e-9 <= high + 2e-9 <= top + 3e-9


def test_of_a_random_search_all_trials_count():
    scores = [n / 20 for n in range(1, 11)]
    curve = curve_of(scores)
    assert len(curve.run_ids) == 10
    assert curve.without_score == 0
    assert [curve.expected[n - 1] for n in (1, 2, 5, 10)] == pytest.approx(
        [0.275, 0.366667, 0.458333, 0.5], abs=1e-6
    )
    assert curve.expected == pytest.approx([best_of_subsets(scores, n) for n in range(1, 11)])
    assert_around(curve, top=1)


def test_of_tpe_the_start_up_trials_alone_count():
    found = [*records()[:2], *(drawn_trial(n, 0.6 + n / 100) for n in range(3)), trial("lora", 3, 0.9, 5e-4)]
    search = arm_of(summarise(study(trials=4, startup=3), found, META), "lora").search
    assert search.curve.run_ids == tuple(t.run_id for t in search.trials[:3])
    assert search.curve.expected == pytest.approx([0.61, (0.61 + 0.62 + 0.62) / 3, 0.62])
    assert [t.startup for t in search.trials] == [True, True, True, False]


def test_a_trial_that_tpe_guided_is_no_draw_though_more_trials_make_the_start_up_longer():
    """With 6 trials 2 are drawn; once there are 9, 3 would be, and the third was guided."""
    found = [*records()[:2], drawn_trial(0, 0.5), drawn_trial(1, 0.6), trial("lora", 2, 0.9, 5e-4)]
    assert study(trials=9).search.startup_trials == 3
    search = arm_of(summarise(study(trials=9), found, META), "lora").search
    assert len(search.curve.run_ids) == 2
    assert [t.startup for t in search.trials] == [True, True, False]


def test_a_failed_trial_counts_with_the_worst_value_of_the_metric():
    curve = curve_of([0.5, None, 0.8])
    assert curve.without_score == 1
    assert curve.expected == pytest.approx([1.3 / 3, 2.1 / 3, 0.8])


def test_a_diverged_or_void_trial_counts_with_the_worst_value_and_one_that_waits_or_was_lost_not_at_all():
    found = [
        *records()[:2],
        drawn_trial(0, None, outcome="diverged", reason="loss"),
        drawn_trial(1, 0.9, proof=proof(void="adapter did not move")),
        drawn_trial(2, 0.6),
        failed(spec("trial", 3, "lora", settings=drawn("lora", 3)), "cancelled", "asked to"),
        failed(spec("trial", 4, "lora", settings=drawn("lora", 4)), "timed_out", "too slow a machine"),
    ]
    asked = study(trials=5, sampler="random")
    curve = arm_of(summarise(asked, found, META), "lora").search.curve
    assert (len(curve.run_ids), curve.without_score) == (3, 2)
    assert curve.expected == pytest.approx([0.2, 0.4, 0.6])


def test_where_lower_is_better_the_best_is_the_lowest():
    task = TaskSpec(name="toy", use="toy_tasks:LOSS", params={})  # worst 9, best 0
    curve = curve_of([1.0, 3.0, None], task=task)
    assert curve.expected == pytest.approx([best_of_subsets([1.0, 3.0, 9.0], n, min) for n in (1, 2, 3)])
    assert_around(curve, top=9)


def test_a_score_beyond_the_stated_bound_opens_the_band_on_that_side():
    task = TaskSpec(name="toy", use="toy_tasks:LOSS", params={})
    curve = curve_of([1.0, 3.0, 12.0], task=task)
    assert curve.high == (None, None, None)
    assert None not in curve.low
    assert curve.expected[0] == pytest.approx(16 / 3)


def test_what_a_failed_trial_is_worth_without_a_bound_nothing_says(monkeypatch):
    module = ModuleType("toy_open")
    module.OPEN = toy_task(higher_is_better=False)
    module.OPEN.metric = Metric("f1", False, float("inf"), 0.0)
    monkeypatch.setitem(sys.modules, "toy_open", module)
    task = TaskSpec(name="toy", use="toy_open:OPEN", params={})
    assert curve_of([1.0, 3.0, None], task=task) is None
    assert curve_of([1.0, 3.0, 2.0], task=task).expected == pytest.approx([2.0, 4 / 3, 1.0])


def test_equal_studies_have_equal_curves_and_no_trial_no_curve():
    assert curve_of([0.5, 0.7, 0.6]) == curve_of([0.5, 0.7, 0.6])
    assert arm_of(summarise(study(), records()[:2], META), "lora").search.curve is None


# ---- effect sizes --------------------------------------------------------------------------------------


def test_effect_sizes_of_a_within_claim_agree_with_scipy():
    effect = summarise(study([WITHIN]), records(), META).claims[0].effect
    differences = np.subtract(LORA, FULL)
    d = differences.mean() / differences.std(ddof=1)
    assert effect.g == pytest.approx(0.797885 * d, rel=1e-5)  # J of 4 degrees of freedom
    t = d * 5**0.5
    assert scipy.stats.nct.cdf(t, 4, effect.g_low * 5**0.5) == pytest.approx(0.975, abs=1e-6)
    assert scipy.stats.nct.cdf(t, 4, effect.g_high * 5**0.5) == pytest.approx(0.025, abs=1e-6)
    assert effect.above == 1 / 5
    assert effect.ratio == pytest.approx(np.mean(LORA) / np.mean(FULL))
    for end in (effect.ratio_low, effect.ratio_high):  # Fieller: where the paired t-test just rejects
        p = scipy.stats.ttest_1samp(np.array(LORA) - end * np.array(FULL), 0).pvalue
        assert p == pytest.approx(0.05, abs=1e-9)
    welch = scipy.stats.ttest_ind(LORA, 0.97 * np.array(FULL), equal_var=False, alternative="greater")
    assert effect.p_unpaired == pytest.approx(welch.pvalue)


def test_effect_sizes_of_a_drift_claim_are_of_the_drifts():
    effect = summarise(study([LESS]), records(), META).claims[0].effect
    assert effect.above == 0
    assert effect.ratio == pytest.approx(0.10 / 0.15)
    welch = scipy.stats.ttest_ind(LORA_DRIFT, 0.8 * np.array(FULL_DRIFT), equal_var=False, alternative="less")
    assert effect.p_unpaired == pytest.approx(welch.pvalue)


def test_a_lower_is_better_metric_is_tested_unpaired_the_other_way_round_too():
    task = TaskSpec(name="toy", use="toy_tasks:LOSS", params={})
    lora, full = [0.51, 0.50, 0.505, 0.5, 0.51], [0.5, 0.505, 0.5, 0.51, 0.50]
    found = records(lora=lora, full=full, trivial=0.9, task=task)
    effect = summarise(study([WITHIN], tasks=[task]), found, META).claims[0].effect
    welch = scipy.stats.ttest_ind(lora, 1.03 * np.array(full), equal_var=False, alternative="less")
    assert effect.p_unpaired == pytest.approx(welch.pvalue)


def test_ties_count_half():
    found = records(lora=[0.8, 0.8, 0.9, 0.7, 0.9], full=[0.8] * 5)
    assert summarise(study([WITHIN]), found, META).claims[0].effect.above == pytest.approx((2 + 2 * 0.5) / 5)


def test_what_the_data_cannot_give_is_none():
    alike = summarise(study([WITHIN]), records(lora=[0.8] * 5, full=[0.8] * 5), META).claims[0].effect
    assert (alike.g, alike.g_low, alike.p_unpaired) == (None, None, None)
    assert alike.above == 0.5
    two = summarise(study([WITHIN], seeds=2), records(LORA[:2], FULL[:2], (), ()), META).claims[0].effect
    assert (two.g, two.p_unpaired) == (None, None)
    near_zero = records(lora=[0.1, 0.2, -0.1, 0.1, 0.0], full=[0.1, -0.2, 0.1, -0.1, 0.2])
    unbounded = summarise(study([WITHIN]), near_zero, META).claims[0].effect
    assert unbounded.ratio == pytest.approx(3.0)  # 0.06 / 0.02
    assert (unbounded.ratio_low, unbounded.ratio_high) == (None, None)
    none = summarise(study([WITHIN]), records((), (), (), ()), META).claims[0]
    assert none.effect is None


def test_no_claim_about_forgetting_has_a_ratio():
    claim = summarise(study([FORGETS], measure=("forgetting",)), records(), META).claims[0]
    assert claim.effect is None  # nothing was measured
    assert claim.of_method.absent == {"forgetting not measured": 5}


def test_the_denominators_say_what_became_of_every_planned_replicate():
    found = replaced(
        records(),
        failed(spec("replicate", 1, "lora")),
        replicate("lora", 2, 0.0, outcome="diverged", reason="loss is not finite", scores={}),
        replicate("lora", 4, 0.0, outcome="diverged", reason="loss is not finite", scores={}),
    )
    claim = claim_of(summarise(study(), found, META), "within")
    assert (claim.of_method.planned, claim.of_method.valid) == (5, 2)
    assert claim.of_method.absent == {"crashed": 1, "diverged": 2}
    assert (claim.of_reference.planned, claim.of_reference.valid, claim.of_reference.absent) == (5, 5, {})
    assert claim.effect.p_unpaired is None  # as there is no paired one


# ---- test examples -------------------------------------------------------------------------------------

RIGHT = {"lora": [3, 4, 2, 3, 4], "full": [4, 4, 3, 3, 4]}  # of five examples, the first so many


def by_example(found, values_of):
    """Run id -> example id -> score, of every replicate among the records."""
    return {
        r.spec.run_id: {f"q{i}": float(v) for i, v in enumerate(values_of(r.spec.method.name, r.spec.number))}
        for r in found
        if r.spec.stage == "replicate"
    }


def right_or_wrong(method, number):
    right = RIGHT[method][number]
    return [100.0] * right + [0.0] * (5 - right)


def classified(change=lambda tests: tests):
    scores = {name: [20.0 * n for n in right] for name, right in RIGHT.items()}
    found = records(**scores, trivial=10.0)
    return summarise(study([WITHIN]), found, META, tests=change(by_example(found, right_or_wrong)))


def test_the_crossed_bootstrap_is_of_the_score_difference_by_seed_and_example():
    claim = classified().claims[0]
    seen = claim.on_examples
    assert seen.examples == 5
    assert seen.left_out is None
    assert seen.difference.estimate == pytest.approx(claim.difference.estimate)
    assert seen.difference.draws == 2000
    assert -40 <= seen.difference.low < -8 < seen.difference.high <= 0  # mean of -20, 0, -20, 0, 0
    assert classified() == classified()


def test_the_interval_for_new_examples_agrees_with_its_variance():
    """sd of the pigeonhole bootstrap (Owen 2007) from its three parts, by a large normal matrix."""
    rng = np.random.default_rng(5)
    seeds, examples = 5, 200
    full = (
        rng.normal(60, 5, (seeds, 1)) + rng.normal(0, 20, (1, examples)) + rng.normal(0, 10, (seeds, examples))
    )
    lora = (
        full
        - 1
        + rng.normal(0, 1, (seeds, 1))
        + rng.normal(0, 6, (1, examples))
        + rng.normal(0, 10, (seeds, examples))
    )
    values = {"lora": lora, "full": full}
    found = records(list(lora.mean(axis=1)), list(full.mean(axis=1)), trivial=1.0)
    tests = by_example(found, lambda method, number: values[method][number])
    interval = summarise(study([WITHIN]), found, META, tests=tests).claims[0].on_examples.difference
    d = lora - full
    of_seeds, of_examples = d.mean(axis=1).var(), d.mean(axis=0).var()
    cells = (d - d.mean(axis=1, keepdims=True) - d.mean(axis=0) + d.mean()).var()
    sd = (of_seeds / seeds + of_examples / examples + cells / (seeds * examples)) ** 0.5
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(sd, rel=0.06)


def test_mcnemar_is_by_pair_of_models():
    seen = classified().claims[0].on_examples
    # replicates 0 and 2: `full` alone gets one more right; the others agree on every example
    assert [(d.number, d.method_only, d.reference_only) for d in seen.discordant] == [
        (0, 0, 1), (1, 0, 0), (2, 0, 1), (3, 0, 0), (4, 0, 0),
    ]  # fmt: skip
    assert [d.p for d in seen.discordant] == [1.0] * 5  # a binomial of one
    assert (seen.method_only, seen.reference_only, seen.median_p) == (0.0, pytest.approx(0.4), 1.0)


def test_where_lower_is_better_an_example_without_error_is_the_right_one():
    task = TaskSpec(name="toy", use="toy_tasks:LOSS", params={})
    scores = {name: [100.0 - 20.0 * n for n in right] for name, right in RIGHT.items()}
    found = records(**scores, trivial=90.0, task=task)
    tests = by_example(found, lambda *run: [100.0 - value for value in right_or_wrong(*run)])
    seen = summarise(study([WITHIN], tasks=[task]), found, META, tests=tests).claims[0].on_examples
    assert seen.discordant == classified().claims[0].on_examples.discordant


def test_examples_that_are_more_than_right_or_wrong_have_no_mcnemar():
    found = records(lora=[50.0, 52.0, 51.0, 50.0, 52.0], full=[51.0] * 5, trivial=10.0)
    mean = {r.spec.run_id: r.result.score for r in found if r.spec.stage == "replicate"}
    tests = {run: {"a": score - 1, "b": score + 1} for run, score in mean.items()}
    seen = summarise(study([WITHIN]), found, META, tests=tests).claims[0].on_examples
    assert seen.discordant == ()
    assert seen.median_p is None
    assert seen.difference.estimate == pytest.approx(0.0)


def test_a_score_that_is_no_mean_over_examples_has_no_such_interval_and_says_so():
    """As Matthews' correlation: McNemar still describes, for every example is right or wrong."""
    found = records(lora=[61.0] * 5, full=[70.0] * 5, trivial=10.0)
    tests = by_example(found, right_or_wrong)
    seen = summarise(study([WITHIN]), found, META, tests=tests).claims[0].on_examples
    assert seen.difference is None
    assert seen.left_out.startswith(
        "the score is no mean over examples (61, and the mean is 60, of replicate.toy.lora.000-"
    )
    assert len(seen.discordant) == 5


def test_replicates_without_scores_by_example_are_named():
    seen = (
        classified(lambda tests: {k: v for k, v in tests.items() if ".lora.001" not in k}).claims[0].on_examples
    )
    assert seen.examples is None
    assert seen.difference is None
    assert seen.left_out.startswith("no scores by example of replicate.toy.lora.001-")
    assert "and 9 more" in classified(lambda tests: {}).claims[0].on_examples.left_out


def test_replicates_that_were_scored_on_other_examples_are_not_compared_on_them():
    def one_missing(tests):
        run = next(run for run in tests if ".full.003" in run)
        return tests | {run: {name: score for name, score in tests[run].items() if name != "q0"}}

    seen = classified(one_missing).claims[0].on_examples
    assert seen.left_out == "the replicates were scored on different examples"
    assert seen.examples == 4


def test_claims_about_drift_have_no_examples_and_no_verdict_rests_on_any():
    found = records()
    with_them = summarise(study(), found, META, tests=by_example(found, lambda *_: [0.8, 0.8]))
    without = summarise(study(), found, META)
    assert claim_of(with_them, "drifts_less").on_examples is None
    for ours, theirs in zip(with_them.claims, without.claims, strict=True):
        assert ours.model_copy(update={"on_examples": theirs.on_examples}) == theirs


# ---- all tasks together --------------------------------------------------------------------------------


def two_tasks(other_use="toy_tasks:TOY", **scores):
    other = TaskSpec(name="other", use=other_use, params={})
    found = [*records(), *records(task=other, **scores)]
    return summarise(study([WITHIN], tasks=[TASK, other]), found, META).across


def test_one_task_alone_is_nothing_to_put_together():
    assert summarise(study(), records(), META).across == ()


def test_relative_scores_and_the_share_of_better_pairs_by_hand():
    lora, full = [0.9, 0.8, 0.7, 0.8, 0.6], [0.6, 0.8, 0.6, 0.6, 0.8]
    (row,) = two_tasks(lora=lora, full=full)
    assert (row.method, row.reference) == ("lora", "full")
    ratios = sorted([a / b for a, b in zip([*LORA, *lora], [*FULL, *full], strict=True)])
    assert row.relative.estimate == pytest.approx(scipy.stats.trim_mean(ratios, 0.25))
    assert row.relative.low < row.relative.estimate < row.relative.high
    assert row.improvement == pytest.approx((0.2 + (3 + 0.5) / 5) / 2)
    assert row.pairs == {"toy": 5, "other": 5}
    assert row.left_out == {}
    assert two_tasks(lora=lora, full=full) == (row,)


def test_where_lower_is_better_both_are_turned_over():
    (row,) = two_tasks("toy_tasks:LOSS", lora=[0.5] * 5, full=[1.0] * 5, trivial=3.0)
    assert row.improvement == pytest.approx((0.2 + 1.0) / 2)
    ratios = [*np.divide(LORA, FULL), *[2.0] * 5]  # halving a loss is doubling
    assert row.relative.estimate == pytest.approx(scipy.stats.trim_mean(ratios, 0.25))


def test_scores_of_0_have_no_ratio_and_a_task_without_pairs_is_named():
    (row,) = two_tasks(lora=[0.0, *LORA[1:]])
    assert row.relative is None
    assert row.left_out == {"other": "a ratio needs scores above 0"}
    assert row.improvement == pytest.approx(0.2)
    (row,) = two_tasks(lora=[], lora_drift=[])
    assert row.pairs == {"toy": 5, "other": 0}
    assert row.left_out == {"other": "no pair of valid seeds"}
    assert row.improvement == pytest.approx(0.2)
