"""Few replicates, honest numbers: intervals, one-sided tests, exact sign-flips, Holm, power.

Pure functions of short sequences of floats; no files, no verdicts (those are `claims.py`'s). The unit is
one replicate, a whole training run; values are paired by replicate number before they come here. scipy is
imported where it is used and only `scipy.special`, because the command line must start quickly.

Sources: Student's t and the noncentral t for power (Cohen 1988, ch. 2); the sign-flip test (Fisher 1935,
sec. 21); Holm 1979; non-inferiority by a one-sided bound (Schuirmann 1987).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

ALPHA = 0.05
POWER = 0.80
MAX_SEEDS = 1000  # beyond this, "more seeds" is no advice
SIGN_FLIP_LIMIT = 20  # 2^20 sign patterns: 8 MB and a few milliseconds

Direction = Literal["greater", "less"]


class MeanInterval(NamedTuple):
    """A mean with its two-sided 95 % t-interval (None below two values); sd with ddof 1."""

    estimate: float
    low: float | None
    high: float | None
    sd: float | None
    n: int


class OneSidedTest(NamedTuple):
    """A one-sided t-test of mean 0, with the one-sided 95 % bounds on either side.

    `t` and `p` are None where the values do not vary: then t is undefined and both bounds are the mean.
    """

    t: float | None
    p: float | None
    lower: float
    upper: float


class Contrast(NamedTuple):
    """D_i = method_i - factor * reference_i, tested against 0 in the direction that supports a claim."""

    values: tuple[float, ...]
    supports: Direction
    interval: MeanInterval
    test: OneSidedTest
    p_sign_flip: float | None

    @property
    def p(self) -> float:
        """The t-test's p. Without spread t is undefined; then the exact sign-flip's, 2^-n at best."""
        if self.test.p is not None:
            return self.test.p
        mean, n = self.interval.estimate, self.interval.n
        return 2.0**-n if (mean > 0 if self.supports == "greater" else mean < 0) else 1.0


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """Mean, two-sided 95 % t-interval and standard deviation (ddof 1) of at least one value.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    array = _finite(values)
    mean, n = float(array.mean()), len(array)
    if n < 2:
        return MeanInterval(mean, None, None, None, n)
    sd = _sd(array)
    half = _t_quantile(1 - ALPHA / 2, n - 1) * sd / math.sqrt(n)
    return MeanInterval(mean, mean - half, mean + half, sd, n)


def paired_difference(method: Sequence[float], reference: Sequence[float]) -> MeanInterval:
    """The mean of method_i - reference_i with its interval.

    Raises:
        ValueError: unequal lengths, no pair, or a value that is not finite.
    """
    return mean_interval([m - r for m, r in _pairs(method, reference)])


def one_sided_t(values: Sequence[float], direction: Direction) -> OneSidedTest:
    """t-test of H0 "the mean is not `direction` than 0", with the 95 % bound on either side.

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    from scipy.special import stdtr

    array = _finite(values)
    n = len(array)
    if n < 2:
        raise ValueError(f"{n} value; a t-test needs at least two")
    mean, sd = float(array.mean()), _sd(array)
    if sd == 0:
        return OneSidedTest(None, None, mean, mean)
    error = sd / math.sqrt(n)
    t = mean / error
    half = _t_quantile(1 - ALPHA, n - 1) * error
    p = float(stdtr(n - 1, -t if direction == "greater" else t))
    return OneSidedTest(t, p, mean - half, mean + half)


def sign_flip_p(values: Sequence[float], direction: Direction | Literal["two-sided"]) -> float | None:
    """Exact p of the mean over all 2^n sign patterns; None above 20 values, where t serves.

    Smallest possible p: 2^-n one-sided, 2^(1-n) two-sided.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    array = _finite(values)
    if len(array) > SIGN_FLIP_LIMIT:
        return None
    sums = np.zeros(1)
    for value in array:
        sums = np.concatenate([sums + value, sums - value])
    observed = float(sums[0])  # the pattern with every sign kept
    if direction == "two-sided":
        sums, observed = np.abs(sums), abs(observed)
    elif direction == "less":
        sums, observed = -sums, -observed
    # Equal sums may differ by rounding; without this slack a tie would count as smaller.
    slack = 1e-12 * float(np.abs(array).sum())
    return float((sums >= observed - slack).mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given.

    Raises:
        ValueError: a value outside 0 .. 1.
    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values lie between 0 and 1, not {list(p_values)}")
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def power_one_sided(effect: float, sd: float, n: int, alpha: float = ALPHA) -> float:
    """Power of a one-sided paired t-test at a true mean difference `effect` (in units of `sd`'s scale).

    Raises:
        ValueError: n below 2 or sd not above 0.
    """
    from scipy.special import nctdtr

    if n < 2 or not sd > 0:
        raise ValueError(f"power needs n >= 2 and sd > 0, not n = {n}, sd = {sd}")
    missed = float(nctdtr(n - 1, effect / sd * math.sqrt(n), _t_quantile(1 - alpha, n - 1)))
    # nctdtr gives NaN only far out, where the share missed is below 1e-90.
    return 1.0 if math.isnan(missed) else 1.0 - missed


def smallest_detectable(sd: float, n: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """The true difference that a one-sided paired t-test at this n and sd finds with 80 % power.

    In the unit of `sd`; 0 where sd is 0.

    Raises:
        ValueError: n below 2 or sd below 0.
    """
    if n < 2 or sd < 0:
        raise ValueError(f"the smallest detectable effect needs n >= 2 and sd >= 0, not {n}, {sd}")
    low, high = 0.0, 1.0
    while power_one_sided(high, 1.0, n, alpha) < power:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if power_one_sided(middle, 1.0, n, alpha) >= power else (middle, high)
    return sd * high


def seeds_needed(effect: float, sd: float, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """The fewest replicates that find a true difference of `effect` (its size counts) with 80 % power.

    At least 2; None when 1,000 are too few (an effect of 0 always).
    """
    size = abs(effect)
    if size == 0:
        return None
    if sd == 0:
        return 2
    if power_one_sided(size, sd, MAX_SEEDS, alpha) < power:
        return None
    low, high = 1, MAX_SEEDS  # power grows with n, so halving finds the first n that suffices
    while high - low > 1:
        middle = (low + high) // 2
        if power_one_sided(size, sd, middle, alpha) >= power:
            high = middle
        else:
            low = middle
    return high


def within(
    method: Sequence[float],
    reference: Sequence[float],
    margin: float,
    *,
    higher_is_better: bool = True,
) -> Contrast:
    """Non-inferiority with a relative margin: D = method - (1 - margin) * reference, wanted above 0.

    For a metric where lower is better, D = method - (1 + margin) * reference, wanted below 0.

    Raises:
        ValueError: unequal lengths, fewer than two pairs, or a value that is not finite.
    """
    if higher_is_better:
        return _contrast(method, reference, 1 - margin, "greater")
    return _contrast(method, reference, 1 + margin, "less")


def drifts_less(method: Sequence[float], reference: Sequence[float], margin: float) -> Contrast:
    """Super-superiority on drift: D = method - (1 - margin) * reference, wanted below 0.

    Raises:
        ValueError: unequal lengths, fewer than two pairs, or a value that is not finite.
    """
    return _contrast(method, reference, 1 - margin, "less")


def _contrast(
    method: Sequence[float], reference: Sequence[float], factor: float, supports: Direction
) -> Contrast:
    values = tuple(m - factor * r for m, r in _pairs(method, reference))
    return Contrast(
        values=values,
        supports=supports,
        interval=mean_interval(values),
        test=one_sided_t(values, supports),
        p_sign_flip=sign_flip_p(values, supports),
    )


def _pairs(method: Sequence[float], reference: Sequence[float]) -> list[tuple[float, float]]:
    if len(method) != len(reference):
        raise ValueError(f"{len(method)} and {len(reference)} values cannot be paired")
    return list(zip(method, reference, strict=True))


def _finite(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"at least one finite number is needed, not {list(values)}")
    return array


def _sd(array: NDArray[np.float64]) -> float:
    """Standard deviation, ddof 1; exactly 0 where the values differ by rounding only."""
    if float(np.ptp(array)) <= 1e-13 * float(np.abs(array).max()):
        return 0.0
    return float(array.std(ddof=1))


def _t_quantile(probability: float, degrees: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))
