"""Permutation test, interquartile mean and the two bootstraps, against scipy, brute force and simulation."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from finetrial import resampling

INTEGERS = st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=6)


@pytest.fixture
def rng():
    return np.random.default_rng(31)


# ---- permutation test ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "splits", "two_sided"), [(3, 20, 0.1), (4, 70, 0.0286), (5, 252, 0.0079), (6, 924, 0.0022)]
)
def test_the_smallest_exact_p(n, splits, two_sided, rng):
    high, low = [1.0 + i / 10 for i in range(n)], [i / 100 for i in range(n)]
    found = resampling.permutation_test(high, low, "two-sided", rng)
    assert found == (2 / splits, True, splits)
    assert found.p == pytest.approx(two_sided, abs=5e-5)
    assert resampling.permutation_test(high, low, "greater", rng).p == 1 / splits
    assert resampling.permutation_test(high, low, "less", rng).p == 1.0


@given(INTEGERS, INTEGERS)
@settings(max_examples=60, deadline=None)
def test_the_exact_test_is_scipy_s_with_ties_and_unequal_arms(method, reference):
    rng = np.random.default_rng(0)
    for direction in ("greater", "less"):
        expected = scipy.stats.permutation_test(
            (method, reference),
            lambda a, b, axis: np.mean(a, axis=axis) - np.mean(b, axis=axis),
            n_resamples=np.inf,
            alternative=direction,
            vectorized=True,
        ).pvalue
        found = resampling.permutation_test(method, reference, direction, rng)
        assert found.exact
        assert found.p == pytest.approx(expected, abs=1e-12)
    values = [*method, *reference]  # scipy doubles the smaller tail; ours is the share of |difference|
    differences = []
    for split in combinations(range(len(values)), len(method)):
        rest = [v for i, v in enumerate(values) if i not in split]
        differences.append(abs(np.mean([values[i] for i in split]) - np.mean(rest)))
    observed = abs(np.mean(method) - np.mean(reference))
    expected = np.mean(np.array(differences) >= observed - 1e-9)
    found = resampling.permutation_test(method, reference, "two-sided", rng)
    assert found.p == pytest.approx(expected, abs=1e-12)


def test_too_many_splits_are_sampled_and_the_observed_one_is_counted_in(rng):
    method, reference = rng.normal(0.6, 1, 8), rng.normal(0, 1, 8)
    exact = resampling.permutation_test(method, reference, "greater", rng)
    drawn = resampling.permutation_test(method, reference, "greater", rng, most_splits=100)
    assert exact.exact
    assert not drawn.exact
    assert drawn.splits == resampling.DRAWS
    assert drawn.p == pytest.approx(exact.p, abs=4 * np.sqrt(exact.p / resampling.DRAWS))
    far = resampling.permutation_test(method + 100, reference, "greater", rng, most_splits=100, draws=49)
    assert far == (pytest.approx(1 / 50, abs=0.03), False, 49)
    assert far.p > 0


def test_the_same_generator_gives_the_same_p():
    ours, theirs = np.random.default_rng(1).normal(size=(2, 30))
    first, second = (
        resampling.permutation_test(ours, theirs, "two-sided", np.random.default_rng(5)) for _ in range(2)
    )
    assert first == second
    assert not first.exact


@given(INTEGERS, INTEGERS, st.integers(-9, 9), st.sampled_from([0.25, 8.0]), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_the_permutation_test_does_not_care_for_shift_unit_or_order(method, reference, shift, scale, seed):
    rng = np.random.default_rng(seed)
    here = resampling.permutation_test(method, reference, "two-sided", rng)
    ours, theirs = (scale * (rng.permutation(side) + shift) for side in (method, reference))
    assert resampling.permutation_test(ours, theirs, "two-sided", rng).p == pytest.approx(here.p, abs=1e-12)


# ---- interquartile mean and its bootstrap ------------------------------------------------------------------


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=25))
@settings(max_examples=80, deadline=None)
def test_the_interquartile_mean_is_scipy_s_trimmed_mean(values):
    expected = scipy.stats.trim_mean(values, 0.25)
    assert float(resampling.interquartile_mean(values)) == pytest.approx(expected, abs=1e-9)


def test_one_failed_run_does_not_move_the_interquartile_mean():
    assert float(resampling.interquartile_mean([0.8, 0.81, 0.79, 0.8, 0.0])) == pytest.approx(0.79667, abs=1e-5)


def test_replicates_are_drawn_within_their_task(rng):
    """Tasks without any spread leave nothing to draw, however far apart they are."""
    found = resampling.stratified_bootstrap([[0.0] * 5, [1.0] * 5, [50.0] * 5], rng)
    middle = (5 * 1.0 + 2 * 50.0) / 9  # of 15 values, three are left out at either end
    assert found == (*[pytest.approx(middle)] * 3, resampling.STRATIFIED_DRAWS)


def test_a_bootstrap_of_one_task_s_mean_is_that_of_scipy(rng):
    values = rng.normal(size=30)
    found = resampling.stratified_bootstrap([values], rng, lambda drawn: drawn.mean(axis=-1), draws=20_000)
    # Hesterberg 2015: percentiles of the t of n - 1 degrees, widened by n / (n - 1) of the variance.
    tail = scipy.stats.norm.cdf(scipy.stats.t.ppf(0.025, 29) * (30 / 29) ** 0.5)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=rng, confidence_level=1 - 2 * tail
    ).confidence_interval
    assert found.estimate == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_two_tasks_of_five_seeds_are_covered_as_often_as_is_said(rng):
    """Plain percentiles cover in 90 of 100 such studies."""
    covered = []
    for _ in range(800):
        tasks = [rng.normal(loc, 0.02, 5) for loc in (0.98, 1.02)]
        found = resampling.stratified_bootstrap(tasks, rng, draws=1000)
        covered.append(found.low <= 1.0 <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.98  # standard error 0.008


def test_a_bootstrap_needs_tasks_with_values(rng):
    with pytest.raises(ValueError, match="at least one task"):
        resampling.stratified_bootstrap([], rng)
    with pytest.raises(ValueError, match="finite number"):
        resampling.stratified_bootstrap([[1.0], []], rng)


# ---- crossed bootstrap -------------------------------------------------------------------------------------


def test_the_crossed_bootstrap_s_variance_is_owen_s():
    """Rows and columns of pure effects: (S-1)/S of the seeds' part and (N-1)/N of the examples'."""
    rng = np.random.default_rng(32)
    seeds_S, examples_N = rng.normal(size=6), rng.normal(size=40)
    values_SN = seeds_S[:, None] + examples_N
    found = resampling.crossed_bootstrap(values_SN, rng, draws=20_000)
    sd = np.sqrt(seeds_S.var() / 6 + examples_N.var() / 40)
    assert found.estimate == pytest.approx(values_SN.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * sd, rel=0.05)


def test_pure_noise_of_cells_counts_three_times():
    rng = np.random.default_rng(33)
    widths = []
    for _ in range(40):
        found = resampling.crossed_bootstrap(rng.normal(size=(30, 50)), rng, draws=1000)
        widths.append(((found.high - found.low) / 2 / 1.96) ** 2)
    assert np.mean(widths) == pytest.approx(3 / (30 * 50), rel=0.15)


def test_many_examples_are_drawn_in_blocks_with_the_same_meaning(monkeypatch):
    values_SN = np.random.default_rng(34).normal(size=(5, 200))
    whole = resampling.crossed_bootstrap(values_SN, np.random.default_rng(1), draws=4000)
    monkeypatch.setattr(resampling, "BLOCK_VALUES", 200 * 7)
    blocks = resampling.crossed_bootstrap(values_SN, np.random.default_rng(1), draws=4000)
    assert blocks.draws == 4000
    assert (blocks.low, blocks.high) == pytest.approx((whole.low, whole.high), abs=0.01)


@pytest.mark.parametrize("values", [[1.0, 2.0], [[1.0, 2.0]], [[1.0], [2.0]], [[1.0, np.nan], [0.0, 1.0]]])
def test_a_crossed_bootstrap_needs_seeds_and_examples(values, rng):
    with pytest.raises(ValueError, match="two seeds x two examples"):
        resampling.crossed_bootstrap(values, rng)
