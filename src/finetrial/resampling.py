"""Shuffling labels and drawing again: unpaired permutation test, IQM, stratified and crossed bootstrap.

Pure functions of arrays with a generator passed in; paired sign-flips are in `stats.py`. None of these is a
way around few replicates: a percentile bootstrap of the mean of five covers in 84 of 100 studies and not 95,
so intervals of one method's mean are t-intervals (`stats.py`), and rows of a similarity are never drawn
again (a repeated row is alike to itself).

Axes: S seeds (replicates), N examples, R replicates of one task, D draws.

Sources: Pitman 1937 and Phipson and Smyth 2010 (the + 1); the pigeonhole bootstrap, Owen 2007; the
interquartile mean and its stratified bootstrap, Agarwal et al. 2021 (arXiv 2108.13264); percentiles further
out for few values, Hesterberg 2015 (doi 10.1080/00031305.2015.1089789).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetrial.stats import ALPHA, Direction, finite, t_quantile

Array = NDArray[np.float64]

EXACT_SPLITS = 200_000  # two arms of ten have 184,756 splits: a tenth of a second
DRAWS = 9_999  # the least p is then 1 / 10,000
BOOTSTRAP_DRAWS = 2_000  # moves a 95 % bound by a few hundredths of its width
STRATIFIED_DRAWS = 10_000  # of few values, whose bounds lie further out
TRIMMED_SHARE = 0.25  # of the values, from either end: what is left is the middle half
BLOCK_VALUES = 2_000_000  # drawn at once: 16 MB


class PermutationTest(NamedTuple):
    """p of an unpaired permutation test; exact over all `splits`, or else over as many drawn at random."""

    p: float
    exact: bool
    splits: int


class Resampled(NamedTuple):
    """An estimate with its 95 % interval from percentiles of `draws` bootstrap samples."""

    estimate: float
    low: float
    high: float
    draws: int


def permutation_test(
    method: Sequence[float],
    reference: Sequence[float],
    direction: Direction | Literal["two-sided"],
    rng: np.random.Generator,
    *,
    most_splits: int = EXACT_SPLITS,
    draws: int = DRAWS,
) -> PermutationTest:
    """How often a random split of all values gives a mean difference at least as extreme.

    All splits are gone through while there are at most `most_splits`; else `draws` are drawn and the
    observed one is counted in, (b + 1) / (draws + 1), so that p is never 0. Under H0 the arms are
    exchangeable: equal in spread too. The least possible p, two-sided with arms of equal size, is 0.1 for
    three and 0.0079 for five.

    Raises:
        ValueError: no value on a side, or one that is not finite.
    """
    ours, theirs = finite(method), finite(reference)
    values = np.concatenate([ours, theirs])
    values = values - values.mean()  # so that sums tell means apart, and rounding is small
    count, total = len(ours), len(values)
    splits = math.comb(total, count)
    exact = splits <= most_splits
    if exact:
        chosen = np.fromiter(
            (i for split in combinations(range(total), count) for i in split),
            dtype=np.intp,
            count=splits * count,
        ).reshape(splits, count)
        sums_D = values[chosen].sum(axis=1)
    else:
        sums_D = np.concatenate(
            [
                rng.permuted(np.tile(values, (size, 1)), axis=1)[:, :count].sum(axis=1)
                for size in _blocks(draws, total)
            ]
        )
    # With the mean taken off, mean(ours) - mean(theirs) is the sum of ours times 1 / n1 + 1 / n2.
    observed = float((ours - np.concatenate([ours, theirs]).mean()).sum())
    if direction == "two-sided":
        sums_D, observed = np.abs(sums_D), abs(observed)
    elif direction == "less":
        sums_D, observed = -sums_D, -observed
    # Equal sums may differ by rounding; without this slack a tie would count as smaller.
    slack = 1e-12 * float(np.abs(values).sum())
    extreme = int((sums_D >= observed - slack).sum())
    if exact:
        return PermutationTest(extreme / splits, True, splits)
    return PermutationTest((extreme + 1) / (draws + 1), False, draws)


def interquartile_mean(values: ArrayLike) -> Array:
    """The mean of the middle half, over the last axis: floor(n / 4) values are left out at either end.

    Between mean and median: one run that failed does not move it, and it uses more of the values than
    the median does.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=-1)
    cut = int(TRIMMED_SHARE * ordered.shape[-1])
    middle: Array = ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1)
    return middle


def stratified_bootstrap(
    tasks_R: Sequence[Sequence[float]],
    rng: np.random.Generator,
    statistic: Callable[[Array], Array] = interquartile_mean,
    *,
    draws: int = STRATIFIED_DRAWS,
) -> Resampled:
    """A statistic of all tasks' values together, replicates drawn again within each task (Agarwal et al.).

    Scores have to be on one scale over tasks (differences from the reference, say). `statistic` reduces
    the last axis of draws x values. The tasks stay as they are: the interval is for these tasks and new
    seeds. Its ends lie further out than the 2.5th percentiles by as much as drawing n values again varies less
    than they do (n of the smallest task with two or more) and as t's are, of the degrees of all tasks together.

    Raises:
        ValueError: no task, a task without values, or a value that is not finite.
    """
    strata = [finite(values) for values in tasks_R]
    if not strata:
        raise ValueError("a bootstrap over tasks needs at least one task")
    drawn = [stratum[rng.integers(len(stratum), size=(draws, len(stratum)))] for stratum in strata]
    found_D = statistic(np.concatenate(drawn, axis=1))
    several = [len(stratum) for stratum in strata if len(stratum) > 1]
    tail = ALPHA / 2
    if several:
        least, degrees = min(several), sum(several) - len(several)
        tail = statistics.NormalDist().cdf(-math.sqrt(least / (least - 1)) * t_quantile(1 - ALPHA / 2, degrees))
    return _percentiles(float(statistic(np.concatenate(strata))), found_D, tail)


def crossed_bootstrap(
    values_SN: ArrayLike, rng: np.random.Generator, *, draws: int = BOOTSTRAP_DRAWS
) -> Resampled:
    """The mean over seeds and examples, both drawn again, independently (pigeonhole bootstrap, Owen 2007).

    `values_SN`: per seed and example, most often method minus reference. The interval is for new seeds
    and new examples. Its variance counts the noise of single cells three times and the seeds' own part
    (S - 1) / S times (Owen 2007): wide where examples matter, too narrow where few seeds differ much.
    `bench/calibration.py` shows both, and how far off drawing the examples alone is.

    Raises:
        ValueError: not a matrix with at least two seeds and two examples, or a value that is not finite.
    """
    values_SN = np.asarray(values_SN, dtype=np.float64)
    if values_SN.ndim != 2 or min(values_SN.shape) < 2 or not np.isfinite(values_SN).all():
        raise ValueError("a crossed bootstrap needs finite values of at least two seeds x two examples")
    seeds, examples = values_SN.shape
    found = []
    for size in _blocks(draws, examples):
        times_DS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=size)
        times_DN = rng.multinomial(examples, np.full(examples, 1 / examples), size=size)
        found.append(((times_DS @ values_SN) * times_DN).sum(axis=1) / (seeds * examples))
    return _percentiles(float(values_SN.mean()), np.concatenate(found))


def _percentiles(estimate: float, found_D: Array, tail: float = ALPHA / 2) -> Resampled:
    low, high = np.quantile(found_D, [tail, 1 - tail])
    return Resampled(estimate, float(low), float(high), len(found_D))


def _blocks(draws: int, width: int) -> list[int]:
    """How many rows of `width` values to draw at a time, `draws` in all."""
    most = max(1, BLOCK_VALUES // width)
    return [min(most, draws - start) for start in range(0, draws, most)]
