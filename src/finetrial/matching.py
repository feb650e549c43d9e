"""Two methods at one task score: where on the line from the base to its model each of them reaches it. Pure.

Not for measuring the line (`probes/interpolation.py`). Between two measured points everything is taken to be
linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """A model on the line: its share of the update, its task score, and its drift or forgetting."""

    share: float
    score: float
    value: float


class Matched(NamedTuple):
    score: float
    method: Point
    reference: Point


def reached(line: Sequence[Point], score: float, *, higher_is_better: bool = True) -> Point | None:
    """The first point of a line, from the base on, whose score is at least as good; None if none is.

    `line`: in order of the share. A base that is good enough itself is the point.
    """
    sign = 1 if higher_is_better else -1
    before: Point | None = None
    for point in line:
        gained = sign * (point.score - score)
        if gained >= 0:
            if before is None:
                return point
            missing = sign * (score - before.score)  # above 0, or `before` had been returned
            part = missing / (missing + gained)
            share, value = (
                low + part * (high - low)
                for low, high in ((before.share, point.share), (before.value, point.value))
            )
            return Point(share, score, value)
        before = point
    return None


def at_equal_score(
    method: Sequence[Point], reference: Sequence[Point], *, higher_is_better: bool = True
) -> Matched:
    """Where each of two lines first reaches the worse of their last scores.

    Raises:
        ValueError: a line without points.
    """
    if not method or not reference:
        raise ValueError("a line has at least one point")
    worse = min if higher_is_better else max
    score = worse(method[-1].score, reference[-1].score)
    own, other = (reached(line, score, higher_is_better=higher_is_better) for line in (method, reference))
    assert own is not None  # both lines end at that score, or at a better one
    assert other is not None
    return Matched(score, own, other)
