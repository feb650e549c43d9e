"""What a comparison of so many replicates can find: power, the smallest detectable effect, seeds needed.

Pure functions of numbers, all from the noncentral t (Cohen 1988, ch. 2), for paired replicates (the
default) or two independent arms of n each with equal spread. For planning, and for the line under a verdict
that says what it could not have seen; never a reason for a verdict (observed power says nothing that p
does not).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

from finetrial.stats import ALPHA, t_quantile

POWER = 0.80
MAX_SEEDS = 1000  # beyond this, "more seeds" is no advice

Sides = Literal["one-sided", "two-sided"]


def power_of_t(
    effect: float,
    sd: float,
    n: int,
    alpha: float = ALPHA,
    *,
    sides: Sides = "one-sided",
    paired: bool = True,
) -> float:
    """How often a t-test finds a true mean difference `effect`, in the unit of `sd`.

    `sd` is that of the paired differences, or, unpaired, that of the values within either arm of n.

    Raises:
        ValueError: n below 2 or sd not above 0.
    """
    from scipy.special import nctdtr

    if n < 2 or not sd > 0:
        raise ValueError(f"power needs n >= 2 and sd > 0, not n = {n}, sd = {sd}")
    degrees = n - 1 if paired else 2 * n - 2
    noncentrality = effect / sd * math.sqrt(n if paired else n / 2)
    threshold = t_quantile(1 - (alpha if sides == "one-sided" else alpha / 2), degrees)
    missed = float(nctdtr(degrees, noncentrality, threshold))
    if sides == "two-sided":  # found on the wrong side too, as two-sided power is defined
        wrong = float(nctdtr(degrees, noncentrality, -threshold))
        missed -= 0.0 if math.isnan(wrong) else wrong
    # nctdtr gives NaN only far out, where the share missed is below 1e-90.
    return 1.0 if math.isnan(missed) else 1.0 - missed


def smallest_detectable(
    sd: float,
    n: int,
    alpha: float = ALPHA,
    power: float = POWER,
    *,
    sides: Sides = "one-sided",
    paired: bool = True,
) -> float:
    """The true difference that a t-test at this n and sd finds with 80 % power.

    In the unit of `sd`; 0 where sd is 0.

    Raises:
        ValueError: n below 2 or sd below 0.
    """
    if n < 2 or sd < 0:
        raise ValueError(f"the smallest detectable effect needs n >= 2 and sd >= 0, not {n}, {sd}")
    return sd * _detectable_in_sd(n, alpha, power, sides, paired)


@cache  # a report asks for the same few n again and again
def _detectable_in_sd(n: int, alpha: float, power: float, sides: Sides, paired: bool) -> float:
    def found(effect: float) -> bool:
        return power_of_t(effect, 1.0, n, alpha, sides=sides, paired=paired) >= power

    low, high = 0.0, 1.0
    while not found(high):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def seeds_needed(
    effect: float,
    sd: float,
    alpha: float = ALPHA,
    power: float = POWER,
    *,
    sides: Sides = "one-sided",
    paired: bool = True,
) -> int | None:
    """The fewest replicates (of each arm) that find a true difference of that size with 80 % power.

    At least 2; None when 1,000 are too few (an effect of 0 always). Where sd is 0 there is no t, and the
    sign-flip test decides, whose p is at least 2**-n (two-sided twice that).
    """
    size = abs(effect)
    if size == 0:
        return None
    if sd == 0:
        return max(2, math.ceil(-math.log2(alpha)) + (sides == "two-sided"))

    def enough(n: int) -> bool:
        return power_of_t(size, sd, n, alpha, sides=sides, paired=paired) >= power

    if not enough(MAX_SEEDS):
        return None
    low, high = 1, MAX_SEEDS  # power grows with n, so halving finds the first n that suffices
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
