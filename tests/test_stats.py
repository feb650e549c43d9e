"""Intervals, contrasts, exact tests and Holm against worked examples, scipy, statsmodels and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import CompareMeans, ttost_ind, ttost_paired

from finetrial import effects, stats

LORA = [0.80, 0.81, 0.79, 0.805, 0.795]
FULL = [0.81, 0.80, 0.805, 0.815, 0.80]
LORA_DRIFT = [0.10, 0.11, 0.09, 0.105, 0.095]
FULL_DRIFT = [0.15, 0.16, 0.14, 0.155, 0.145]


def test_within_three_percent_as_worked_by_hand():
    contrast = stats.within(LORA, FULL, 0.03)
    assert contrast.supports == "greater"
    assert contrast.interval.estimate == pytest.approx(0.01818, abs=1e-8)
    assert contrast.test.t == pytest.approx(4.2764, abs=5e-5)
    assert contrast.test.p == pytest.approx(0.00644, abs=5e-6)
    assert contrast.p_sign_flip == 1 / 32
    assert contrast.test.lower > 0


def test_drifts_twenty_percent_less_as_worked_by_hand():
    contrast = stats.drifts_less(LORA_DRIFT, FULL_DRIFT, 0.20)
    assert contrast.values == pytest.approx([-0.020, -0.018, -0.022, -0.019, -0.021], abs=1e-12)
    assert contrast.test.p == pytest.approx(4.6e-6, rel=0.02)
    assert contrast.p_sign_flip == 0.03125
    assert contrast.test.upper < 0


def test_a_lower_is_better_metric_is_within_when_it_is_not_much_higher():
    contrast = stats.within([1.02, 1.01, 1.03, 1.02], [1.0, 1.01, 1.0, 1.02], 0.05, higher_is_better=False)
    assert contrast.supports == "less"
    assert contrast.test.upper < 0
    assert stats.within([1.2, 1.21, 1.19], [1.0, 1.01, 1.0], 0.05, higher_is_better=False).test.lower > 0


def test_the_interval_is_student_s_with_ddof_one():
    found = stats.mean_interval(LORA)
    expected = scipy.stats.t.interval(0.95, 4, np.mean(LORA), scipy.stats.sem(LORA))
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-12)
    assert found.sd == pytest.approx(np.std(LORA, ddof=1))
    assert found.n == 5


def test_one_value_has_an_estimate_and_nothing_else():
    assert stats.mean_interval([0.7]) == (0.7, None, None, None, 1)


def test_the_paired_difference_is_that_of_scipy():
    found = stats.paired_difference(LORA, FULL)
    expected = scipy.stats.ttest_rel(LORA, FULL).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.lists(st.floats(-10, 10).map(lambda v: round(v, 3)), min_size=3, max_size=12))
@settings(max_examples=60, deadline=None)
def test_the_one_sided_test_is_that_of_scipy(values):
    if np.ptp(values) == 0:
        return
    for direction in ("greater", "less"):
        found = stats.one_sided_t(values, direction)
        expected = scipy.stats.ttest_1samp(values, 0, alternative=direction)
        assert found.p == pytest.approx(expected.pvalue, abs=1e-9)
        assert found.lower < np.mean(values) < found.upper


def test_the_bounds_and_the_test_agree_at_five_percent():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    edge = stats.one_sided_t(values, "greater").lower
    assert stats.one_sided_t(values - edge, "greater").p == pytest.approx(0.05, abs=1e-9)
    edge = stats.one_sided_t(values, "less").upper
    assert stats.one_sided_t(values - edge, "less").p == pytest.approx(0.05, abs=1e-9)


def test_without_spread_t_is_undefined_and_the_sign_flip_stands_in():
    contrast = stats.within([0.9] * 5, [0.8] * 5, 0.03)
    assert contrast.test == (None, None, contrast.interval.estimate, contrast.interval.estimate)
    assert contrast.p == contrast.p_sign_flip == 1 / 32
    assert stats.within([0.7] * 5, [0.8] * 5, 0.03).p == 1.0


@pytest.mark.parametrize(("n", "smallest"), [(3, 0.25), (4, 0.125), (5, 0.0625), (6, 0.03125)])
def test_the_smallest_two_sided_exact_p(n, smallest):
    assert stats.sign_flip_p([1.0 + i for i in range(n)], "two-sided") == smallest


@given(st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_sign_flip_is_scipy_s_exact_permutation_test_with_ties(values):
    for direction in ("greater", "less", "two-sided"):
        expected = scipy.stats.permutation_test(
            (values,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative=direction
        ).pvalue
        if direction == "two-sided":  # scipy doubles the smaller tail; the null is symmetric
            expected = min(1.0, np.mean([abs(s) >= abs(sum(values)) for s in _all_sums(values)]))
        assert stats.sign_flip_p(values, direction) == pytest.approx(expected, abs=1e-12)


def _all_sums(values):
    sums = [0.0]
    for value in values:
        sums = [s + sign * value for s in sums for sign in (1, -1)]
    return sums


def test_above_twenty_values_there_is_no_exact_p():
    assert stats.sign_flip_p([1.0] * 20, "greater") == 2.0**-20
    assert stats.sign_flip_p([1.0] * 21, "greater") is None


def test_holm_as_published_and_in_the_order_given():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]) == []
    assert stats.holm([0.6, 0.7]) == [1.0, 1.0]
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.holm([1.2])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_holm_is_that_of_statsmodels(p_values):
    assert stats.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-12)


def test_the_interval_covers_the_truth_in_95_of_100_studies_of_five():
    rng = np.random.default_rng(11)
    studies = rng.normal(0.7, 0.02, size=(4000, 5))
    covered = [i.low <= 0.7 <= i.high for i in map(stats.mean_interval, studies)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.011)  # 3 standard errors


def test_at_the_margin_the_test_is_wrong_in_5_of_100_studies():
    """Method exactly at 97 % of the reference: H0's edge. Pairs share their noise, as replicates do."""
    rng = np.random.default_rng(12)
    wrong = []
    for _ in range(3000):
        reference = 0.8 + rng.normal(0, 0.02, 5)
        method = 0.97 * reference + rng.normal(0, 0.01, 5)
        wrong.append(stats.within(method, reference, 0.03).test.lower > 0)
    assert np.mean(wrong) == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize("values", [[], [float("nan")], [float("inf"), 1.0]])
def test_what_is_no_sample_is_refused(values):
    with pytest.raises(ValueError, match="finite number"):
        stats.mean_interval(values)


def test_unequal_lengths_cannot_be_paired():
    with pytest.raises(ValueError, match="cannot be paired"):
        stats.paired_difference([1.0], [1.0, 2.0])


# ---- contrasts in general --------------------------------------------------------------------------------

SCORES = st.lists(st.integers(-500, 500).map(lambda v: v / 100), min_size=3, max_size=10)
PAIRS = st.lists(
    st.tuples(*[st.integers(-500, 500).map(lambda v: v / 100)] * 2), min_size=3, max_size=10
).filter(lambda pairs: min(np.ptp([m - r for m, r in pairs]), *np.ptp(pairs, axis=0)) > 0)


def test_forgets_less_is_a_plain_difference_that_also_holds_at_and_below_zero():
    forgetting, other = [-0.01, 0.00, 0.02, 0.01, -0.02], [0.05, 0.04, 0.08, 0.06, 0.03]
    contrast = stats.contrast(forgetting, other, "less")
    assert contrast.values == pytest.approx([-0.06, -0.04, -0.06, -0.05, -0.05])
    expected = scipy.stats.ttest_rel(forgetting, other, alternative="less")
    assert (contrast.test.t, contrast.p) == pytest.approx((expected.statistic, expected.pvalue), abs=1e-12)
    assert contrast.test.upper == pytest.approx(expected.confidence_interval(0.95).high)
    assert contrast.p_sign_flip == 1 / 32


@pytest.mark.parametrize("values", [(84.2, 10.2, 33.3, 67.6), (8420.0, 1020.0, 3330.0, 6760.0)])
def test_differences_that_only_rounding_tells_apart_are_equal(values):
    """84.2 - 84.3 and 10.2 - 10.3 differ by 1e-14, of which no t may make a spread."""
    contrast = stats.contrast(values, [value + 0.1 for value in values], "less")
    assert contrast.interval.sd == 0
    assert contrast.test.p is None
    assert contrast.p == contrast.p_sign_flip == 2**-4
    assert effects.hedges_g(values, [value + 0.1 for value in values]).g is None


def test_what_is_zero_but_for_rounding_is_zero():
    none = stats.contrast([0.3] * 4, [0.1 + 0.2] * 4, "less")  # -5.6e-17 each
    assert none.values == (0.0,) * 4
    assert none.p == 1.0
    assert stats.paired_difference([97.0] * 3, [97.0 - 1e-10] * 3).estimate == pytest.approx(1e-10, rel=1e-3)


def test_named_claims_are_contrasts_with_a_factor():
    assert stats.within(LORA, FULL, 0.03) == stats.contrast(LORA, FULL, "greater", factor=0.97)
    assert stats.drifts_less(LORA, FULL, 0.2) == stats.contrast(LORA, FULL, "less", factor=0.8)


def test_an_absolute_margin_is_the_equivalence_test_of_statsmodels():
    p, (t_low, p_low, _), (t_high, p_high, _) = ttost_paired(np.array(LORA), np.array(FULL), -0.03, 0.03)
    above = stats.contrast(LORA, FULL, "greater", offset=-0.03)
    below = stats.contrast(LORA, FULL, "less", offset=0.03)
    assert (above.test.t, above.p) == pytest.approx((t_low, p_low))
    assert (below.test.t, below.p) == pytest.approx((t_high, p_high))
    assert max(above.p, below.p) == pytest.approx(p)
    assert p == pytest.approx(0.00253, abs=5e-6)


def test_unpaired_worked_examples():
    assert stats.unpaired_contrast(LORA, FULL, "greater", factor=0.97).p == pytest.approx(0.00213, abs=5e-6)
    found = stats.unpaired_contrast(LORA_DRIFT, FULL_DRIFT, "less", factor=0.80)
    assert found.p == pytest.approx(0.00125, abs=5e-6)
    assert found.estimate == pytest.approx(-0.020)


@given(method=SCORES, reference=SCORES)
@settings(max_examples=80, deadline=None)
def test_the_unpaired_contrast_is_welch_s(method, reference):
    if np.ptp(method) == 0 and np.ptp(reference) == 0:
        return
    for direction in ("greater", "less"):
        found = stats.unpaired_contrast(method, reference, direction)
        expected = scipy.stats.ttest_ind(method, reference, equal_var=False, alternative=direction)
        assert (found.t, found.p) == pytest.approx((expected.statistic, expected.pvalue), abs=1e-9)
        assert found.degrees == pytest.approx(expected.df)
    interval = CompareMeans.from_data(method, reference).tconfint_diff(0.05, usevar="unequal")
    assert (found.low, found.high) == pytest.approx(interval, abs=1e-9)


def test_the_unpaired_bounds_and_the_test_agree_at_five_percent():
    edge = stats.unpaired_contrast(LORA, FULL, "greater").lower
    assert stats.unpaired_contrast(LORA, FULL, "greater", offset=edge).p == pytest.approx(0.05, abs=1e-9)
    edge = stats.unpaired_contrast(LORA, FULL, "less").upper
    assert stats.unpaired_contrast(LORA, FULL, "less", offset=edge).p == pytest.approx(0.05, abs=1e-9)


def test_the_unpaired_equivalence_is_that_of_statsmodels():
    p, *_ = ttost_ind(np.array(LORA), np.array(FULL), -0.03, 0.03, usevar="unequal")
    above = stats.unpaired_contrast(LORA, FULL, "greater", offset=-0.03)
    below = stats.unpaired_contrast(LORA, FULL, "less", offset=0.03)
    assert p == pytest.approx(np.max([above.p, below.p]))


def test_unpaired_without_spread_has_no_t():
    assert stats.unpaired_contrast([0.5, 0.5], [0.25, 0.25], "greater") == (
        0.25, 0.25, 0.25, None, None, None, 0.25, 0.25,
    )  # fmt: skip
    with pytest.raises(ValueError, match="two on each side"):
        stats.unpaired_contrast([0.5], [0.2, 0.3], "greater")


@given(
    pairs=PAIRS, shift=st.integers(-50, 50), scale=st.sampled_from([0.25, 2.0, 64.0]), seed=st.integers(0, 9)
)
@settings(max_examples=60, deadline=None)
def test_a_difference_does_not_care_for_shift_unit_or_order(pairs, shift, scale, seed):
    method, reference = (np.array(side) for side in zip(*pairs, strict=True))
    order = np.random.default_rng(seed).permutation(len(method))
    for test in (stats.contrast, stats.unpaired_contrast):
        here = test(method, reference, "greater")
        there = test(scale * (method[order] + shift), scale * (reference[order] + shift), "greater")
        assert there.p == pytest.approx(here.p, abs=1e-9)
        if test is stats.contrast:
            assert there.interval.low == pytest.approx(scale * here.interval.low, abs=1e-9)
            assert there.p_sign_flip == here.p_sign_flip
        else:
            assert there.low == pytest.approx(scale * here.low, abs=1e-9)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_that_of_statsmodels_and_a_binomial_test(outcomes):
    ours, theirs = zip(*outcomes, strict=True)
    found = stats.mcnemar_exact(ours, theirs)
    table = [[sum((m, r) == cell for m, r in outcomes) for cell in row] for row in
             [[(True, True), (True, False)], [(False, True), (False, False)]]]  # fmt: skip
    assert (found.method_only, found.reference_only) == (table[0][1], table[1][0])
    differing = found.method_only + found.reference_only
    expected = scipy.stats.binomtest(found.method_only, differing).pvalue if differing else 1.0
    assert found.p == pytest.approx(expected, abs=1e-12)
    if differing:
        assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-12)


def test_mcnemar_needs_the_same_examples():
    with pytest.raises(ValueError, match="at least one example"):
        stats.mcnemar_exact([], [])
    with pytest.raises(ValueError, match="cannot be paired"):
        stats.mcnemar_exact([True], [True, False])
