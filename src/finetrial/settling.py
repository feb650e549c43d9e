"""Whether a search is over early: more trials can be expected to gain less than the scores' noise. Pure.

`search: {early_stop: true}`; the same rule for every method. Nothing is read or started here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from finetrial.halving import Standing
from finetrial.plugins import Metric
from finetrial.records import SearchStop
from finetrial.stats import mean_interval


def expected_gain(scores: Sequence[float], planned: int, *, higher_is_better: bool = True) -> float:
    """How much the best of all `planned` trials is expected to beat the best of these.

    By the spacings of the best third, as of an exponential tail (Renyi 1953): the i-th best lies above the next
    by scale / i in the mean, and the best of N above the best of n by scale x (1/(n+1) + ... + 1/N). Tails that
    end, as those of a bounded score, gain less, so it errs towards going on.

    Raises:
        ValueError: fewer than two scores.
    """
    if len(scores) < 2:
        raise ValueError(f"{len(scores)} score tells of no spacing")
    ordered = sorted(scores if higher_is_better else [-score for score in scores], reverse=True)
    top = _top(len(ordered))
    scale = math.fsum(ordered[:top]) / top - ordered[top]
    return scale * math.fsum(1 / n for n in range(len(ordered) + 1, planned + 1))


def _top(count: int) -> int:
    """How many of so many are the best third; fewer than all."""
    return min(math.ceil(count / 3), count - 1)


def noise(standings: Sequence[Standing], metric: Metric) -> float | None:
    """The standard error of the difference between the best and the first below the best third.

    As the gain's scale is of these; if the two differ on no example, of the best and the next below. Over the
    validation examples that both have, of their own scores; where the task's score is no mean of them (F1,
    Matthews), theirs stands in. None: no two are known to differ.
    """
    sign = -1.0 if metric.higher_is_better else 1.0
    scored = [standing for standing in standings if standing.score is not None]
    ranked = sorted(scored, key=lambda each: (sign * (each.score or 0.0), each.number))
    for other in ranked[_top(len(ranked)) :]:
        best = ranked[0]
        shared = sorted(best.examples.keys() & other.examples.keys())
        apart = [best.examples[name] - other.examples[name] for name in shared]
        if any(apart) and len(apart) > 1:
            return (mean_interval(apart).sd or 0.0) / math.sqrt(len(apart))
    return None


def settled(standings: Sequence[Standing], planned: int, metric: Metric) -> SearchStop | None:
    """Why the rest of the planned trials is not worth making; None if it is, or the noise is not known."""
    scores = [standing.score for standing in standings if standing.score is not None]
    error = noise(standings, metric)
    if error is None or len(scores) < 2:
        return None
    gain = expected_gain(scores, planned, higher_is_better=metric.higher_is_better)
    return SearchStop(after=len(standings), planned=planned, gain=gain, noise=error) if gain < error else None
