"""Tuning curves against published values, brute force over subsets, and opda (Lourie et al. 2024)."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opda.nonparametric import EmpiricalDistribution

from finetrial import tuning_curves

ONE_TO_TEN = [float(i) for i in range(1, 11)]
SCORES = st.lists(st.integers(-50, 50).map(float), min_size=1, max_size=7)


@pytest.mark.parametrize(
    ("n", "unbiased", "replaced"), [(1, 5.5, 5.5), (2, 7.3333, 7.15), (5, 9.1667, 8.79175), (10, 10, 9.5086)]
)
def test_the_expected_best_of_one_to_ten(n, unbiased, replaced):
    shuffled = np.random.default_rng(n).permutation(ONE_TO_TEN)
    assert tuning_curves.expected_best(shuffled, n) == pytest.approx(unbiased, abs=5e-5)
    assert tuning_curves.expected_best(shuffled, n) == pytest.approx(n * 11 / (n + 1))
    assert tuning_curves.expected_best_replaced(shuffled, n) == pytest.approx(replaced, abs=5e-5)


@given(SCORES, st.integers(1, 7), st.booleans())
@settings(max_examples=60, deadline=None)
def test_unbiased_is_the_mean_over_all_subsets(scores, n, higher):
    best = max if higher else min
    if n > len(scores):
        with pytest.raises(ValueError, match="cannot be known"):
            tuning_curves.expected_best(scores, n, higher_is_better=higher)
        return
    expected = np.mean([best(subset) for subset in combinations(scores, n)])
    assert tuning_curves.expected_best(scores, n, higher_is_better=higher) == pytest.approx(expected)


@given(SCORES.filter(lambda scores: len(scores) < 6), st.integers(1, 4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_replaced_is_the_mean_over_all_draws(scores, n, higher):
    best = max if higher else min
    expected = np.mean([best(draw) for draw in product(scores, repeat=n)])
    assert tuning_curves.expected_best_replaced(scores, n, higher_is_better=higher) == pytest.approx(expected)


@given(SCORES, st.integers(1, 30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_replaced_is_opda_s_average_tuning_curve(scores, n, higher):
    expected = EmpiricalDistribution(scores).average_tuning_curve(n, minimize=not higher)
    found = tuning_curves.expected_best_replaced(scores, n, higher_is_better=higher)
    assert found == pytest.approx(float(expected))


@pytest.mark.parametrize("count", [1, 5, 15, 40])
def test_the_band_is_opda_s(count):
    scores = np.random.default_rng(count).beta(4, 2, count)
    budgets = [1, 2, 5, 10, 30]
    for minimize in (False, True):
        worst, best = (1.0, 0.0) if minimize else (0.0, 1.0)
        found = tuning_curves.tuning_band(scores, budgets, np.random.default_rng(0), worst=worst, best=best)
        lower, _, upper = EmpiricalDistribution.confidence_bands(
            scores, 0.95, a=0.0, b=1.0, method="ld_equal_tailed", generator=np.random.default_rng(1)
        )
        # Where the distribution function is highest, scores are lowest.
        low, high = (cdf.average_tuning_curve(budgets, minimize=minimize) for cdf in (upper, lower))
        assert found.low == pytest.approx(low, abs=0.01)
        assert found.high == pytest.approx(high, abs=0.01)


def test_the_band_holds_the_whole_curve_in_95_of_100_searches(monkeypatch):
    monkeypatch.setattr(tuning_curves, "BAND_DRAWS", 2_000)
    rng = np.random.default_rng(41)
    budgets = [1, 2, 5, 10, 15]
    truth = [n / (n + 1) for n in budgets]  # of uniform scores
    inside = []
    for _ in range(300):
        band = tuning_curves.tuning_band(rng.random(15), budgets, np.random.default_rng(2), worst=0, best=1)
        inside.append(all(low <= t <= high for low, t, high in zip(band.low, truth, band.high, strict=True)))
    assert 0.95 - 0.038 <= np.mean(inside) <= 1  # the curve may stay in though the distribution leaves its band


def test_a_metric_without_a_bound_has_no_bound_on_that_side():
    scores = [3.0, 2.5, 2.0, 4.0]
    band = tuning_curves.tuning_band(scores, [1, 4], np.random.default_rng(3), worst=math.inf, best=0.0)
    assert band.high == (math.inf, math.inf)
    assert all(0 <= low < 4 for low in band.low)
    band = tuning_curves.tuning_band(scores, [1], np.random.default_rng(3), worst=-math.inf, best=math.inf)
    assert band == ((-math.inf,), (math.inf,))


@given(SCORES, st.integers(-9, 9), st.sampled_from([0.5, 4.0]))
@settings(max_examples=20, deadline=None)
def test_the_curve_and_band_follow_shift_and_unit(scores, shift, scale):
    moved = [scale * (score + shift) for score in scores]
    n = len(scores)
    assert tuning_curves.expected_best(moved, n) == scale * (max(scores) + shift)
    here = tuning_curves.tuning_band(scores, [1, 3], np.random.default_rng(4), worst=-50, best=50)
    there = tuning_curves.tuning_band(
        moved, [1, 3], np.random.default_rng(4), worst=scale * (shift - 50), best=scale * (shift + 50)
    )
    for before, after in zip((*here.low, *here.high), (*there.low, *there.high), strict=True):
        assert after == pytest.approx(scale * (before + shift), abs=1e-9)


def test_a_band_refuses_scores_outside_the_bounds_and_no_trials():
    rng = np.random.default_rng(5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        tuning_curves.tuning_band([1.5], [1], rng, worst=0, best=1)
    with pytest.raises(ValueError, match="budgets"):
        tuning_curves.tuning_band([0.5], [0], rng, worst=0, best=1)
    with pytest.raises(ValueError, match="finite number"):
        tuning_curves.expected_best([], 1)
    with pytest.raises(ValueError, match="nothing"):
        tuning_curves.expected_best_replaced([1.0], 0)
