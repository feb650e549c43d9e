"""Few replicates, honest numbers: intervals, t-tests of contrasts, exact sign-flips, McNemar, Holm.

Pure functions of short sequences of floats; no files, no verdicts (those are `claims.py`'s). The unit is
one replicate, a whole training run; values are paired by replicate number before they come here. Power is
in `power.py`, sizes and ratios in `effects.py`, whatever draws at random in `resampling.py`. scipy is
imported where it is used and only `scipy.special`, because the command line must start quickly.

Sources: Student 1908; Welch 1947; the sign-flip test (Fisher 1935, sec. 21); McNemar 1947; Holm 1979;
non-inferiority by a one-sided bound (Schuirmann 1987).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

ALPHA = 0.05
ROUNDING = 1e-13  # of the largest value: what lies closer together is told apart by rounding alone
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


class UnpairedContrast(NamedTuple):
    """mean(method) - factor * mean(reference) of independent replicates, with Welch's degrees of freedom.

    `low` and `high`: two-sided 95 %; `lower` and `upper`: one-sided 95 %. Without any spread `t`, `p` and
    `degrees` are None and all bounds are the estimate.
    """

    estimate: float
    low: float
    high: float
    degrees: float | None
    t: float | None
    p: float | None
    lower: float
    upper: float


class McNemar(NamedTuple):
    """Examples that the one alone and the other alone got right, and the exact two-sided p."""

    method_only: int
    reference_only: int
    p: float


class Contrast(NamedTuple):
    """D_i = method_i - factor * reference_i - offset, tested against 0 in the direction that supports."""

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
        return 2.0**-self.interval.n if self._supported else 1.0

    @property
    def p_against(self) -> float:
        """The same of the opposite direction."""
        if self.test.p is not None:
            return 1.0 - self.test.p
        return 2.0**-self.interval.n if self.interval.estimate != 0 and not self._supported else 1.0

    @property
    def _supported(self) -> bool:
        mean = self.interval.estimate
        return mean > 0 if self.supports == "greater" else mean < 0


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """Mean, two-sided 95 % t-interval and standard deviation (ddof 1) of at least one value.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    array = finite(values)
    mean, n = float(array.mean()), len(array)
    if n < 2:
        return MeanInterval(mean, None, None, None, n)
    sd = standard_deviation(array)
    half = t_quantile(1 - ALPHA / 2, n - 1) * sd / math.sqrt(n)
    return MeanInterval(mean, mean - half, mean + half, sd, n)


def paired_difference(method: Sequence[float], reference: Sequence[float]) -> MeanInterval:
    """The mean of method_i - reference_i with its interval.

    Raises:
        ValueError: unequal lengths, no pair, or a value that is not finite.
    """
    return mean_interval(differences(method, reference))


def one_sided_t(values: Sequence[float], direction: Direction) -> OneSidedTest:
    """t-test of H0 "the mean is not `direction` than 0", with the 95 % bound on either side.

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    from scipy.special import stdtr

    array = finite(values)
    n = len(array)
    if n < 2:
        raise ValueError(f"{n} value; a t-test needs at least two")
    mean, sd = float(array.mean()), standard_deviation(array)
    if sd == 0:
        return OneSidedTest(None, None, mean, mean)
    error = sd / math.sqrt(n)
    t = mean / error
    half = t_quantile(1 - ALPHA, n - 1) * error
    p = float(stdtr(n - 1, -t if direction == "greater" else t))
    return OneSidedTest(t, p, mean - half, mean + half)


def sign_flip_p(values: Sequence[float], direction: Direction | Literal["two-sided"]) -> float | None:
    """Exact p of the mean over all 2^n sign patterns; None above 20 values, where t serves.

    Smallest possible p: 2^-n one-sided, 2^(1-n) two-sided.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    array = finite(values)
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


def mcnemar_exact(method_N: Sequence[bool], reference_N: Sequence[bool]) -> McNemar:
    """Do two models of one replicate get equally many of the same N examples right? Exact, two-sided.

    Of the examples on which they differ, either side is as likely under H0 (McNemar 1947; a binomial test
    at one half). It describes these two trained models on this test set, not two methods: examples are no
    replicates, so no verdict may rest on it.

    Raises:
        ValueError: unequal lengths, or no example.
    """
    from scipy.special import bdtr

    outcomes = pairs(method_N, reference_N)
    if not outcomes:
        raise ValueError("McNemar's test needs at least one example")
    ours = sum(bool(m) and not r for m, r in outcomes)
    theirs = sum(bool(r) and not m for m, r in outcomes)
    p = min(1.0, 2 * float(bdtr(min(ours, theirs), ours + theirs, 0.5)))
    return McNemar(ours, theirs, p)


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
        return contrast(method, reference, "greater", factor=1 - margin)
    return contrast(method, reference, "less", factor=1 + margin)


def drifts_less(method: Sequence[float], reference: Sequence[float], margin: float) -> Contrast:
    """Super-superiority on drift: D = method - (1 - margin) * reference, wanted below 0.

    Raises:
        ValueError: unequal lengths, fewer than two pairs, or a value that is not finite.
    """
    return contrast(method, reference, "less", factor=1 - margin)


def contrast(
    method: Sequence[float],
    reference: Sequence[float],
    supports: Direction,
    *,
    factor: float = 1.0,
    offset: float = 0.0,
) -> Contrast:
    """D = method - factor * reference - offset, paired and tested against 0.

    A relative margin goes into the factor (`within`, `drifts_less`), an absolute one into the offset. With
    neither it is the plain comparison, which also holds where values are 0 or below: "A forgets less than
    B" is `contrast(a, b, "less")`.

    Raises:
        ValueError: unequal lengths, fewer than two pairs, or a value that is not finite.
    """
    values = differences(method, reference, factor, offset)
    return Contrast(
        values=values,
        supports=supports,
        interval=mean_interval(values),
        test=one_sided_t(values, supports),
        p_sign_flip=sign_flip_p(values, supports),
    )


def unpaired_contrast(
    method: Sequence[float],
    reference: Sequence[float],
    supports: Direction,
    *,
    factor: float = 1.0,
    offset: float = 0.0,
) -> UnpairedContrast:
    """mean(method) - factor * mean(reference) - offset for replicates that are not paired.

    Welch's t (1947), with the reference's variance times factor^2, and Satterthwaite's degrees of freedom;
    `p` is one-sided, in the direction `supports`. For runs that share no seeds, or as a check beside the
    paired contrast: it ignores what a pair shares, so it is wider where pairs go together.

    Raises:
        ValueError: fewer than two values on a side, or one that is not finite.
    """
    from scipy.special import stdtr

    ours, theirs = finite(method), factor * finite(reference)
    if min(len(ours), len(theirs)) < 2:
        raise ValueError(f"{len(ours)} and {len(theirs)} values; an unpaired t-test needs two on each side")
    mean = float(ours.mean() - theirs.mean()) - offset
    parts = (standard_deviation(ours) ** 2 / len(ours), standard_deviation(theirs) ** 2 / len(theirs))
    error = math.sqrt(sum(parts))
    if error == 0:
        return UnpairedContrast(mean, mean, mean, None, None, None, mean, mean)
    shares = [part / sum(parts) for part in parts]  # not squared as they are: tiny ones would underflow
    degrees = 1 / sum(s**2 / (len(side) - 1) for s, side in zip(shares, (ours, theirs), strict=True))
    t = mean / error
    both, one = t_quantile(1 - ALPHA / 2, degrees) * error, t_quantile(1 - ALPHA, degrees) * error
    p = float(stdtr(degrees, -t if supports == "greater" else t))
    return UnpairedContrast(mean, mean - both, mean + both, degrees, t, p, mean - one, mean + one)


def pairs(method: Sequence[float], reference: Sequence[float]) -> list[tuple[float, float]]:
    """Value beside value; ValueError if there are not equally many."""
    if len(method) != len(reference):
        raise ValueError(f"{len(method)} and {len(reference)} values cannot be paired")
    return list(zip(method, reference, strict=True))


def differences(
    method: Sequence[float], reference: Sequence[float], factor: float = 1.0, offset: float = 0.0
) -> tuple[float, ...]:
    """method - factor * reference - offset of every pair; all equal where only rounding tells them apart.

    What rounding makes of them is of the size of the values, which may be a thousand times theirs.
    Raises as `pairs`.
    """
    both = pairs(method, reference)
    found = [m - factor * r - offset for m, r in both]
    error = ROUNDING * max((abs(value) for pair in both for value in pair), default=0.0)
    if found and max(found) - min(found) <= error:
        mean = math.fsum(found) / len(found)
        return (0.0 if abs(mean) <= error else mean,) * len(found)
    return tuple(found)


def finite(values: Sequence[float]) -> NDArray[np.float64]:
    """The values as an array; ValueError if there is none or one is not finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"at least one finite number is needed, not {list(values)}")
    return array


def standard_deviation(array: NDArray[np.float64]) -> float:
    """Standard deviation, ddof 1; exactly 0 where the values differ by rounding only."""
    if float(np.ptp(array)) <= ROUNDING * float(np.abs(array).max()):
        return 0.0
    return float(array.std(ddof=1))


def t_quantile(probability: float, degrees: float) -> float:
    """Of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))
