"""What the best of n trials is expected to score: tuning curves of a random search, with a band.

Pure functions of the scores of N trials that were drawn independently from one space, such as a random
search or the start-up trials of a guided one. Not for guided (TPE) trials, which depend on one another. A
trial that failed counts in the budget: the caller gives it the metric's worst value.

Sources: Dodge et al. 2019 (arXiv 1909.03004: with replacement); Tang et al. 2020 (arXiv 2004.13705: without,
unbiased); the band as in Lourie et al. 2024 (arXiv 2311.09480), from Learned-Miller and DeStefano 2008.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetrial.stats import ALPHA, finite

Array = NDArray[np.float64]

BAND_DRAWS = 20_000  # leaves the band's level uncertain by 0.0015


class TuningBand(NamedTuple):
    """Lower and upper 95 % band of the expected best of n trials; infinite where the metric has no bound."""

    low: tuple[float, ...]
    high: tuple[float, ...]


def expected_best(scores: Sequence[float], n: int, *, higher_is_better: bool = True) -> float:
    """The expected best of n of N trials, unbiased (Tang et al. 2020): the mean over all subsets of n.

    sum over the sorted scores v_(i) of v_(i) C(i-1, n-1) / C(N, n).

    Raises:
        ValueError: n below 1 or above N, no score, or one that is not finite.
    """
    ordered = _best_last(scores, higher_is_better)
    total = len(ordered)
    if not 1 <= n <= total:
        raise ValueError(f"the best of {n} cannot be known without bias from {total} trials")
    subsets = math.comb(total, n)
    weights = [math.comb(i, n - 1) / subsets for i in range(total)]
    return _signed(float(np.dot(weights, ordered)), higher_is_better)


def expected_best_replaced(scores: Sequence[float], n: int, *, higher_is_better: bool = True) -> float:
    """The expected best of n trials drawn with replacement from the N (Dodge et al. 2019): a V-statistic.

    sum of v_(i) [(i/N)^n - ((i-1)/N)^n]. Too low for n near N, as the best may not be drawn; defined
    beyond N, where it can only approach the best score seen.

    Raises:
        ValueError: n below 1, no score, or one that is not finite.
    """
    ordered = _best_last(scores, higher_is_better)
    if n < 1:
        raise ValueError(f"the best of {n} trials is nothing")
    below = (np.arange(len(ordered) + 1) / len(ordered)) ** n
    return _signed(float(np.diff(below) @ ordered), higher_is_better)


def tuning_band(
    scores: Sequence[float],
    budgets: Sequence[int],
    rng: np.random.Generator,
    *,
    worst: float,
    best: float,
) -> TuningBand:
    """A simultaneous 95 % band of the expected best of n, for each n of `budgets` and all at once.

    Follows from a band of the scores' distribution (Learned-Miller and DeStefano 2008, equal tails), whose
    level is exact for continuous scores, up to simulation, and conservative with ties. No bootstrap: that
    cannot see above the best score. `worst` and `best` bound the metric (best below worst where lower is
    better); they may be infinite, and then so is the band on that side.

    Raises:
        ValueError: a score outside the bounds or not finite, none at all, or a budget below 1.
    """
    higher = best > worst
    ordered = _best_last(scores, higher)
    bottom, top = (worst, best) if higher else (-worst, -best)
    if ordered[0] < bottom or ordered[-1] > top or min(budgets, default=0) < 1:
        raise ValueError(f"scores lie between {worst} and {best}, and budgets are at least 1")
    below, above = _order_statistics_band(len(ordered), rng)
    lows, highs = [], []
    for n in budgets:
        # E[best of n] = top - integral of F^n. F is at most `above` of the next score, at least `below` of
        # the last one.
        steps = np.diff(ordered)
        lows.append(ordered[-1] - steps @ above[1:] ** n - _area(ordered[0] - bottom, above[0] ** n))
        highs.append(ordered[-1] - steps @ below[:-1] ** n + _area(top - ordered[-1], 1 - below[-1] ** n))
    low = tuple(_signed(float(value), higher) for value in lows)
    high = tuple(_signed(float(value), higher) for value in highs)
    return TuningBand(low, high) if higher else TuningBand(high, low)


def _order_statistics_band(count: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Limits between which all `count` ordered uniform values lie in 95 of 100 samples, equally often left."""
    from scipy.special import betainc, betaincinv

    rank = np.arange(1, count + 1)
    uniform = np.sort(rng.random((BAND_DRAWS, count)), axis=1)
    below = betainc(rank, count + 1 - rank, uniform)
    tail = float(np.quantile(np.minimum(below, 1 - below).min(axis=1), ALPHA))
    return (
        betaincinv(rank, count + 1 - rank, tail),
        betaincinv(rank, count + 1 - rank, 1 - tail),
    )


def _area(width: float, height: float) -> float:
    """width x height; nothing where either is 0, though the other be infinite."""
    return width * height if width and height else 0.0


def _best_last(scores: Sequence[float], higher_is_better: bool) -> Array:
    return np.sort(finite(scores) if higher_is_better else -finite(scores))


def _signed(value: float, higher_is_better: bool) -> float:
    return value if higher_is_better else 0.0 - value  # 0, never -0
