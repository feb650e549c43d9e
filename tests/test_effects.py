"""Ratios, Hedges' g and the probability of being better, against definitions, scipy and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetrial import effects, stats

LORA_DRIFT = [0.10, 0.11, 0.09, 0.105, 0.095]
FULL_DRIFT = [0.15, 0.16, 0.14, 0.155, 0.145]
VALUES = st.lists(st.integers(-500, 500).map(lambda v: v / 100), min_size=3, max_size=10)
POSITIVE = st.lists(
    st.tuples(*[st.integers(1, 500).map(lambda v: v / 100)] * 2), min_size=3, max_size=10
).filter(lambda pairs: np.ptp([m - r for m, r in pairs]) > 0)


def sides(pairs):
    method, reference = zip(*pairs, strict=True)
    return list(method), list(reference)


# ---- ratios ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Precision loss")  # scipy's, of values that are nearly equal
@given(POSITIVE)
@settings(max_examples=80, deadline=None)
def test_fieller_s_bounds_are_the_ratios_that_the_t_test_just_does_not_reject(pairs):
    method, reference = sides(pairs)
    found = effects.fieller_ratio(method, reference)
    tested = scipy.stats.ttest_1samp(reference, 0).pvalue
    assume(abs(tested - 0.05) > 1e-6)  # where the quadratic loses its leading term
    assert found.bounded == (tested < 0.05)
    if not found.bounded:
        assert (found.low, found.high) == (None, None)
        return
    assert found.low <= found.estimate <= found.high
    for bound in (found.low, found.high):
        contrast = np.array(method) - bound * np.array(reference)
        if np.ptp(contrast) > 1e-6:
            assert scipy.stats.ttest_1samp(contrast, 0).pvalue == pytest.approx(0.05, abs=1e-5)


def test_a_reference_that_may_be_zero_has_no_bounded_ratio():
    found = effects.fieller_ratio([1.0, 1.2, 0.9], [0.1, -0.1, 0.05])
    assert (found.low, found.high, found.bounded) == (None, None, False)
    assert found.estimate == pytest.approx(62)
    assert effects.fieller_ratio([1.0, 2.0], [-1.0, 1.0]) == (None, None, None, False, 2)
    assert effects.fieller_ratio([1.0], [2.0]) == (0.5, None, None, False, 1)


def test_a_constant_ratio_is_known_exactly():
    found = effects.fieller_ratio([0.5, 1.0, 1.5, 1.0, 0.5], [1.0, 2.0, 3.0, 2.0, 1.0])
    assert (found.low, found.estimate, found.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-7)
    found = effects.log_ratio([0.5, 1.0, 1.5], [1.0, 2.0, 3.0])
    assert (found.low, found.estimate, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_log_ratio_is_a_t_interval_of_logs():
    found = effects.log_ratio(LORA_DRIFT, FULL_DRIFT)
    logs = np.log(LORA_DRIFT) - np.log(FULL_DRIFT)
    expected = scipy.stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    assert found.estimate == pytest.approx(scipy.stats.gmean(LORA_DRIFT) / scipy.stats.gmean(FULL_DRIFT))
    assert effects.log_ratio([1.0], [2.0]) == (0.5, None, None, False, 1)


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_a_log_ratio_needs_values_above_zero(bad):
    with pytest.raises(ValueError, match="above 0"):
        effects.log_ratio([bad, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="finite number"):
        effects.log_ratio([math.inf, 1.0], [1.0, 1.0])


@given(POSITIVE, st.sampled_from([0.25, 2.0, 64.0]), st.sampled_from([0.5, 8.0]), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_ratios_follow_the_units_and_ignore_the_order(pairs, above, below, seed):
    method, reference = (np.array(side) for side in sides(pairs))
    order = np.random.default_rng(seed).permutation(len(method))
    for ratio in (effects.fieller_ratio, effects.log_ratio):
        here = ratio(method, reference)
        there = ratio(above * method[order], below * reference[order])
        assert there.estimate == pytest.approx(here.estimate * above / below)
        if here.bounded and here.high < 1e3:  # far out the quadratic is nearly linear, and rounding shows
            assert there.low == pytest.approx(here.low * above / below, abs=1e-6)
            assert there.high == pytest.approx(here.high * above / below, rel=1e-6)


def test_both_ratio_intervals_cover_the_truth_in_95_of_100_studies():
    rng = np.random.default_rng(21)
    fieller, logs = [], []
    for _ in range(2000):
        shared = rng.normal(0, 0.02, 5)
        method, reference = 0.7 + shared + rng.normal(0, 0.03, 5), 1.0 + shared + rng.normal(0, 0.03, 5)
        found = effects.fieller_ratio(method, reference)
        fieller.append(found.low <= 0.7 <= found.high)
        found = effects.log_ratio(0.7 * np.exp(rng.normal(0, 0.1, 5)), np.exp(rng.normal(0, 0.1, 5)))
        logs.append(found.low <= 0.7 <= found.high)
    assert np.mean(fieller) == pytest.approx(0.95, abs=0.015)  # 3 standard errors
    assert np.mean(logs) == pytest.approx(0.95, abs=0.015)


# ---- Hedges' g -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("degrees", "factor"), [(4, 0.798), (8, 0.903), (18, 0.958)])
def test_hedges_correction_as_published(degrees, factor):
    assert effects.hedges_correction(degrees) == pytest.approx(factor, abs=5e-4)


def test_g_by_hand():
    # Differences 1, 2, 3: mean 2, sd 1, J(2) = 0.5642 (1 / sqrt(pi)).
    assert effects.hedges_g([1, 2, 3], [0, 0, 0]).g == pytest.approx(2 / math.sqrt(math.pi))
    # Means 2 and 4, pooled sd 1, J(4) = 0.7979.
    assert effects.hedges_g([1, 2, 3], [3, 4, 5], paired=False).g == pytest.approx(-2 * 0.797885, abs=1e-5)


@pytest.mark.filterwarnings("ignore:Precision loss")
@given(VALUES, VALUES, st.booleans())
@settings(max_examples=60, deadline=None)
def test_g_s_interval_inverts_the_noncentral_t(method, reference, paired):
    if paired:
        method = method[: len(reference)]
        reference = reference[: len(method)]
        t = scipy.stats.ttest_rel(method, reference).statistic if method != reference else np.nan
        degrees, weight = len(method) - 1, len(method)
    else:
        t = scipy.stats.ttest_ind(method, reference).statistic
        degrees = len(method) + len(reference) - 2
        weight = 1 / (1 / len(method) + 1 / len(reference))
    found = effects.hedges_g(method, reference, paired=paired)
    if not np.isfinite(t) or abs(t) > 100:  # without spread, or nearly so
        return
    assert found.low < found.high
    low, high = found.low * math.sqrt(weight), found.high * math.sqrt(weight)
    assert scipy.stats.nct.sf(t, degrees, low) == pytest.approx(0.025, abs=1e-4)
    assert scipy.stats.nct.cdf(t, degrees, high) == pytest.approx(0.025, abs=1e-4)
    assert found.g == pytest.approx(effects.hedges_correction(degrees) * t / math.sqrt(weight))


def test_g_is_unbiased_and_its_interval_covers_in_95_of_100_studies():
    rng = np.random.default_rng(22)
    found = [effects.hedges_g(rng.normal(1.5, 1, 5), np.zeros(5)) for _ in range(2000)]
    assert np.mean([e.g for e in found]) == pytest.approx(1.5, abs=0.06)
    assert np.mean([e.low <= 1.5 <= e.high for e in found]) == pytest.approx(0.95, abs=0.015)


def test_g_s_interval_goes_on_smoothly_where_there_is_next_to_no_spread():
    """Far out both limits are g's d times roots of chi-squared quantiles over the degrees of freedom."""
    found = effects.hedges_g([1, 1.0000001, 1], [0, 0, 0])
    d = found.g / effects.hedges_correction(2)
    expected = [d * math.sqrt(scipy.stats.chi2.ppf(share, 2) / 2) for share in (0.025, 0.975)]
    assert (found.low, found.high) == pytest.approx(expected)
    for n in (3, 10, 60):
        noise = np.tile([1.0, -1.0, 0.0], n // 3 + 1)[:n]
        noise = (noise - noise.mean()) / noise.std(ddof=1)
        edge = effects.FAR_OUT / math.sqrt(n)
        near = effects.hedges_g(list(0.999 * edge + noise), [0] * n)
        far = effects.hedges_g(list(1.001 * edge + noise), [0] * n)
        assert (far.low, far.high) == pytest.approx(
            (near.low * 1.001 / 0.999, near.high * 1.001 / 0.999), rel=5e-4
        )


def test_g_swaps_sign_with_the_sides_and_is_none_without_spread():
    here, there = effects.hedges_g(LORA_DRIFT, [0.2, 0.1, 0.3, 0.1, 0.2]), None
    there = effects.hedges_g([0.2, 0.1, 0.3, 0.1, 0.2], LORA_DRIFT)
    assert (there.g, there.low, there.high) == pytest.approx((-here.g, -here.high, -here.low))
    assert effects.hedges_g([1.0] * 3, [0.5] * 3) == (None, None, None)
    with pytest.raises(ValueError, match="2 degrees of freedom"):
        effects.hedges_g([1.0, 2.0], [0.0, 0.0])
    with pytest.raises(ValueError, match="two on each side"):
        effects.hedges_g([1.0], [0.0, 0.0], paired=False)


# ---- the probability of being better -----------------------------------------------------------------------


@given(VALUES, VALUES)
@settings(max_examples=60, deadline=None)
def test_unpaired_it_is_mann_and_whitney_s(method, reference):
    expected = scipy.stats.mannwhitneyu(method, reference).statistic / (len(method) * len(reference))
    assert effects.probability_better(method, reference, paired=False) == pytest.approx(expected)


def test_paired_a_tie_counts_half():
    assert effects.probability_better([1, 2, 3, 4], [0, 2, 5, 1]) == 0.625
    assert effects.probability_better(LORA_DRIFT, FULL_DRIFT) == 0.0
    with pytest.raises(ValueError, match="cannot be paired"):
        effects.probability_better([1.0], [1.0, 2.0])


@given(VALUES, st.booleans())
@settings(max_examples=30, deadline=None)
def test_better_and_worse_add_up_to_one_and_oneself_is_half(values, paired):
    other = stats.finite(values)[::-1]
    assert effects.probability_better(values, values, paired=paired) == 0.5
    both = (
        effects.probability_better(values, other, paired=paired),
        effects.probability_better(other, values, paired=paired),
    )
    assert sum(both) == pytest.approx(1.0)
