"""Power, the smallest detectable effect and seeds needed, against tables, scipy and statsmodels."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from statsmodels.stats.power import TTestIndPower, TTestPower

from finetrial import power


@pytest.mark.parametrize(("n", "effect"), [(3, 3.26), (5, 1.68), (8, 1.16), (10, 1.00)])
def test_the_smallest_detectable_effect_is_that_of_power_tables(n, effect):
    """Tables are two-sided at 5 %: one-sided at 2.5 %."""
    assert power.smallest_detectable(1.0, n, alpha=0.025) == pytest.approx(effect, abs=0.006)
    assert power.smallest_detectable(0.1, n, alpha=0.025) == pytest.approx(effect / 10, abs=0.0006)


@given(n=st.integers(2, 60), effect=st.floats(0, 3))
@settings(max_examples=80, deadline=None)
def test_power_is_the_noncentral_t_tail(n, effect):
    threshold = scipy.stats.t.ppf(0.95, n - 1)
    expected = scipy.stats.nct.sf(threshold, n - 1, effect * np.sqrt(n))
    assert power.power_of_t(effect, 1.0, n) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("n", [2, 4, 5, 54, 1000])
def test_power_is_one_far_beyond_what_the_distribution_function_can_compute(n):
    assert power.power_of_t(1e4, 1.0, n) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("effect", [0.3, 0.5, 1.0, 2.0])
def test_seeds_needed_is_the_first_n_with_eighty_percent_power(effect):
    n = power.seeds_needed(effect, 1.0)
    assert power.power_of_t(effect, 1.0, n) >= 0.80
    assert n == 2 or power.power_of_t(effect, 1.0, n - 1) < 0.80
    assert power.seeds_needed(-effect, 1.0) == n


def test_half_a_standard_deviation_takes_27_replicates_and_nothing_takes_forever():
    assert power.seeds_needed(0.5, 1.0) == 27  # Cohen 1988: d = 0.5, one-sided 5 %, power 0.8
    assert power.seeds_needed(0.01, 1.0) is None
    assert power.seeds_needed(0.0, 1.0) is None


@pytest.mark.parametrize(("claims", "n"), [(1, 5), (2, 6), (4, 7)])
def test_without_spread_the_sign_flip_test_decides(claims, n):
    """Of n pairs that all lie on one side p is 2**-n, which has to come below 5 % of so many claims."""
    assert power.seeds_needed(0.1, 0.0, 0.05 / claims) == n
    assert power.seeds_needed(0.1, 0.0, 0.05 / claims, sides="two-sided") == n + 1


@pytest.mark.parametrize(
    ("n", "unpaired", "paired"), [(3, 3.07, 3.26), (5, 2.02, 1.68), (8, 1.51, 1.16), (10, 1.32, 1.00)]
)
def test_the_smallest_two_sided_effects(n, unpaired, paired):
    assert power.smallest_detectable(1.0, n, sides="two-sided", paired=False) == pytest.approx(
        unpaired, abs=0.006
    )
    assert power.smallest_detectable(1.0, n, sides="two-sided") == pytest.approx(paired, abs=0.006)


@given(n=st.integers(2, 40), effect=st.floats(0, 3), paired=st.booleans(), two=st.booleans())
@settings(max_examples=80, deadline=None)
def test_power_is_that_of_statsmodels(n, effect, paired, two):
    solver = TTestPower() if paired else TTestIndPower()
    sides = "two-sided" if two else "one-sided"
    expected = solver.power(effect, n, 0.05, alternative="two-sided" if two else "larger")
    assume(not np.isnan(expected))  # scipy's noncentral t far out
    found = power.power_of_t(2 * effect, 2.0, n, sides=sides, paired=paired)
    assert found == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("sides", ["one-sided", "two-sided"])
@pytest.mark.parametrize("paired", [True, False])
def test_without_an_effect_power_is_the_level(sides, paired):
    assert power.power_of_t(0.0, 1.0, 5, 0.05, sides=sides, paired=paired) == pytest.approx(0.05, abs=1e-9)


def test_half_a_standard_deviation_takes_64_in_each_of_two_arms():
    assert power.seeds_needed(0.5, 1.0, sides="two-sided", paired=False) == 64  # Cohen 1988, table 2.4.1
    assert power.seeds_needed(0.5, 1.0, sides="two-sided") == 34


def test_power_needs_two_replicates_and_a_spread():
    with pytest.raises(ValueError, match="n >= 2"):
        power.power_of_t(1.0, 1.0, 1)
    with pytest.raises(ValueError, match="sd > 0"):
        power.power_of_t(1.0, 0.0, 5)
    with pytest.raises(ValueError, match="n >= 2"):
        power.smallest_detectable(1.0, 1)
    assert power.smallest_detectable(0.0, 5) == 0
