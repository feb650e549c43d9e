"""Successive halving: which trials of an arm go on after each end; one rule for all methods. Pure functions.

Before the last end trials are compared by their loss on validation: it moves from the first steps on, where a
metric that counts right answers may not have begun to.

Synchronous (Jamieson and Talwalkar 2016, arXiv:1502.07943): all trials are compared after the same share of
their own steps, under the schedule of all of them, so that going on trains no token twice. Nothing is read,
written or started here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from finetrial.plugins import Metric
from finetrial.stats import ALPHA, one_sided_t

# Steps up to the first end, on the average of an arm's trials, below which halving is much of a lottery.
FEW_STEPS = 30
LOSS = Metric(name="validation loss", higher_is_better=False, worst=math.inf, best=0.0)


class Standing(NamedTuple):
    """A trial at one end: its score or loss there and, where they are known, its validation examples' own."""

    number: int
    score: float | None  # None: it diverged, failed or is void
    examples: Mapping[str, float] = {}


def chosen(standings: Sequence[Standing], most: int, metric: Metric, *, final: bool) -> list[int]:
    """The numbers of the trials that go on, the best first; the lower number first among equals.

    The best `most` of those with a score. Before the last end (`final`) only the ones that the validation
    examples do not tell from the best: a whole trial is dear, and what is told apart here will hardly turn.
    Earlier nothing is left out, as learning curves still cross.
    """
    sign = 1.0 if metric.higher_is_better else -1.0
    scored = [s for s in standings if s.score is not None and math.isfinite(s.score)]
    ranked = sorted(scored, key=lambda s: (-sign * (s.score or 0.0), s.number))[:most]
    if final:
        ranked = [s for s in ranked if not is_worse(s, ranked[0], sign)]
    return [s.number for s in ranked]


def said_of(steps: float) -> str | None:
    """What is to be said of trials that are first compared after so many steps, on the average, if anything."""
    if steps >= FEW_STEPS:
        return None
    count = max(1, math.floor(steps))
    after = "1 step" if count == 1 else f"{count} steps"
    return (
        f"its trials are first compared after {after} on the average, where losses tell "
        "little of what settings come to (measured with 16: docs/benchmarks.md); "
        "leave halving out of so short a search, or give it more rows"
    )


def is_worse(one: Standing, best: Standing, sign: float = 1.0) -> bool:
    """Whether a trial is told from a better one by the examples that both have: paired t, one-sided, at 5 %."""
    shared = sorted(one.examples.keys() & best.examples.keys())
    if one.number == best.number or len(shared) < 2:
        return False
    test = one_sided_t([sign * (best.examples[name] - one.examples[name]) for name in shared], "greater")
    return test.p < ALPHA if test.p is not None else test.lower > 0.0
