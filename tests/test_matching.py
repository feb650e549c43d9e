"""Two lines at one score: by hand, and by what has to hold for any."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetrial.matching import Point, at_equal_score, reached


def line(*points: tuple[float, float, float]) -> list[Point]:
    return [Point(*point) for point in points]


FULL = line((0, 50, 0.0), (0.5, 80, 0.2), (1, 90, 0.6))
LORA = line((0, 50, 0.0), (0.5, 60, 0.05), (1, 80, 0.1))


def test_the_better_method_is_taken_back_to_the_score_of_the_worse():
    """LoRA ends at 80; full fine-tuning has 80 half-way, where it has drifted 0.2 and not 0.6."""
    found = at_equal_score(LORA, FULL)
    assert found == (80, Point(1, 80, 0.1), Point(0.5, 80, 0.2))


def test_between_two_points_the_line_is_linear():
    """85 is half-way from 80 to 90: so are the share and the drift."""
    found = reached(FULL, 85)
    assert found == pytest.approx((0.75, 85, 0.4))


def test_where_lower_is_better_everything_is_turned_over():
    def turned(points):
        return [Point(p.share, -p.score, p.value) for p in points]

    found = at_equal_score(turned(LORA), turned(FULL), higher_is_better=False)
    assert (found.score, found.reference) == (-80, Point(0.5, -80, 0.2))


def test_a_base_that_is_good_enough_is_the_point_and_the_first_crossing_counts():
    assert reached(FULL, 40) == FULL[0]
    there_and_back = line((0, 50, 0.0), (0.25, 90, 0.1), (0.5, 70, 0.2), (1, 90, 0.4))
    assert reached(there_and_back, 90) == there_and_back[1]
    assert reached(FULL, 91) is None


def test_a_line_without_points_is_refused():
    with pytest.raises(ValueError, match="at least one point"):
        at_equal_score([], FULL)


scores = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6)


@given(scores, scores, st.booleans())
def test_both_are_found_at_the_worse_last_score_or_better_and_never_beyond_their_ends(own, other, higher):
    lines = [
        [Point(n / max(1, len(values) - 1), score, float(n)) for n, score in enumerate(values)]
        for values in (own, other)
    ]
    found = at_equal_score(*lines, higher_is_better=higher)
    sign = 1 if higher else -1
    assert sign * found.score == min(sign * own[-1], sign * other[-1])
    for point, whole in zip(found[1:], lines, strict=True):
        assert sign * point.score >= sign * found.score
        assert whole[0].share <= point.share <= whole[-1].share
        assert 0 <= point.value <= len(whole) - 1
