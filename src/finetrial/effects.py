"""How large a difference is, beside whether there is one: ratios, Hedges' g, the probability of being better.

Pure functions of short sequences of floats over replicates; tests are in `stats.py`, verdicts in
`claims.py`. None of these decides a claim: a claim is tested as a contrast, which is linear and needs no
ratio. A number that the data cannot give is None, never a guess.

Sources: Fieller 1954; Hedges 1981 (eq. 6e for the correction); noncentral-t intervals, Cumming and Finch
2001; the probability of superiority, Mann and Whitney 1947; Bouthillier et al. 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from finetrial.stats import ALPHA, differences, finite, mean_interval, pairs, standard_deviation, t_quantile

FAR_OUT = 1000.0  # beyond such a t nctdtr loses its digits, and the limit is right to four of them


class RatioInterval(NamedTuple):
    """A ratio with a two-sided 95 % interval.

    `bounded` False: the data do not tell the reference's mean from 0 at this level, so that no finite
    interval holds the ratio in 95 of 100 studies; then `low` and `high` are None. They are None too for a
    single pair, and `estimate` where the reference's mean is 0.
    """

    estimate: float | None
    low: float | None
    high: float | None
    bounded: bool
    n: int


class StandardisedEffect(NamedTuple):
    """Hedges' g with a 95 % interval for the true standardised difference; None without any spread."""

    g: float | None
    low: float | None
    high: float | None


def fieller_ratio(method: Sequence[float], reference: Sequence[float]) -> RatioInterval:
    """mean(method) / mean(reference) over pairs, by Fieller (1954), with the pairs' covariance.

    All ratios r at which the paired t-test of method - r * reference = 0 is not rejected at 5 %. Exact for
    values that are jointly normal; the values may have any sign.

    Raises:
        ValueError: unequal lengths, no pair, or a value that is not finite.
    """
    both = finite([value for pair in pairs(method, reference) for value in pair]).reshape(-1, 2)
    n = len(both)
    above, below = (float(mean) for mean in both.mean(axis=0))
    estimate = above / below if below else None
    if n < 2:
        return RatioInterval(estimate, None, None, False, n)
    (var_above, covariance), (_, var_below) = np.cov(both, rowvar=False).tolist()
    # (above - r below)^2 <= t^2 (var_above - 2 r covariance + r^2 var_below) / n is a quadratic in r.
    share = t_quantile(1 - ALPHA / 2, n - 1) ** 2 / n
    a = below**2 - share * var_below
    b = above * below - share * covariance
    c = above**2 - share * var_above
    if a <= 0:  # the set is everything, or everything outside an interval
        return RatioInterval(estimate, None, None, False, n)
    root = math.sqrt(max(0.0, b * b - a * c))  # below 0 by rounding only: the estimate is in the set
    return RatioInterval(estimate, (b - root) / a, (b + root) / a, True, n)


def log_ratio(method: Sequence[float], reference: Sequence[float]) -> RatioInterval:
    """The typical ratio: exp of the mean of log(method_i / reference_i), with its t-interval.

    The ratio of geometric means. For positive values whose spread grows with their size (times, losses,
    drifts); where some are 0 or below use `fieller_ratio`.

    Raises:
        ValueError: unequal lengths, no pair, or a value that is not finite and above 0.
    """
    ours, theirs = (finite(side) for side in zip(*pairs(method, reference), strict=True))
    if min(ours.min(), theirs.min()) <= 0:
        raise ValueError("a ratio on the log scale needs values above 0")
    found = mean_interval(list(np.log(ours) - np.log(theirs)))
    bounded = found.low is not None
    low, high = (None if bound is None else math.exp(bound) for bound in (found.low, found.high))
    return RatioInterval(math.exp(found.estimate), low, high, bounded, found.n)


def hedges_correction(degrees: int) -> float:
    """J: what a standardised difference is multiplied with to be unbiased (Hedges 1981, eq. 6e, exact).

    Raises:
        ValueError: fewer than 2 degrees of freedom, where the mean does not exist.
    """
    if degrees < 2:
        raise ValueError(f"Hedges' correction needs at least 2 degrees of freedom, not {degrees}")
    return math.exp(math.lgamma(degrees / 2) - math.lgamma((degrees - 1) / 2)) / math.sqrt(degrees / 2)


def hedges_g(method: Sequence[float], reference: Sequence[float], *, paired: bool = True) -> StandardisedEffect:
    """The mean difference in standard deviations, corrected for few replicates.

    Paired: in those of the differences (d_z), n - 1 degrees of freedom. Unpaired: in the pooled ones of the
    values, n1 + n2 - 2. The interval is that of the noncentral t, for the true value, and is not
    multiplied by J. The two kinds are on different scales and must not be compared.

    Raises:
        ValueError: unequal lengths (paired), fewer than three pairs or two values on a side, or a value
            that is not finite.
    """
    if paired:
        gaps = finite(differences(method, reference))
        mean, spread = float(gaps.mean()), standard_deviation(gaps)
        degrees, weight = len(gaps) - 1, float(len(gaps))
    else:
        ours, theirs = finite(method), finite(reference)
        counts = len(ours), len(theirs)
        if min(counts) < 2:
            raise ValueError(f"{counts[0]} and {counts[1]} values; a pooled spread needs two on each side")
        mean, degrees = float(ours.mean() - theirs.mean()), sum(counts) - 2
        squares = sum((len(side) - 1) * standard_deviation(side) ** 2 for side in (ours, theirs))
        spread, weight = math.sqrt(squares / degrees), counts[0] * counts[1] / sum(counts)
    correction = hedges_correction(degrees)
    if spread == 0:
        return StandardisedEffect(None, None, None)
    d = mean / spread
    low, high = (
        _noncentrality(d * math.sqrt(weight), degrees, share) / math.sqrt(weight)
        for share in (1 - ALPHA / 2, ALPHA / 2)
    )
    return StandardisedEffect(correction * d, low, high)


def probability_better(method: Sequence[float], reference: Sequence[float], *, paired: bool = True) -> float:
    """The share of pairs in which method is above reference, a tie counting half.

    Paired: over the n replicates. Unpaired: over all pairs of one value from each side, Mann and Whitney's
    U / (n1 n2). Swap the sides where lower is better. A share of five pairs moves in fifths.

    Raises:
        ValueError: unequal lengths (paired), no value, or one that is not finite.
    """
    if paired:
        pairs(method, reference)
        signs = np.sign(finite(method) - finite(reference))
    else:
        signs = np.sign(np.subtract.outer(finite(method), finite(reference)))
    return float(0.5 + 0.5 * signs.mean())


def _noncentrality(t: float, degrees: int, share: float) -> float:
    """The noncentrality at which `share` of the noncentral t lies below t."""
    from scipy.special import chdtri, nctdtr

    if t < 0:  # nctdtr is at its best where both are positive
        return -_noncentrality(-t, degrees, 1 - share)
    if (
        t > FAR_OUT
    ):  # the normal part of t is nothing beside the rest: noncentrality / t is a chi / sqrt(degrees)
        return t * math.sqrt(float(chdtri(degrees, share)) / degrees)

    def below(noncentrality: float) -> float:
        value = float(nctdtr(degrees, noncentrality, t))
        return (0.0 if noncentrality > t else 1.0) if math.isnan(value) else value

    reach = 10.0 + 2 * t
    low, high = t - reach, t + reach  # falls as noncentrality grows
    while below(high) > share:
        high += reach
    while below(low) < share:
        low -= reach
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if below(middle) > share else (low, middle)
    return (low + high) / 2
