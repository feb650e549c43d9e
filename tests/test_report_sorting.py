"""What a table cell is sorted by: read back from its text, in one unit for a whole column."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from finetrial import report_text as text
from finetrial.report_sorting import sort_key
from finetrial.report_tables import Badge


@pytest.mark.parametrize(
    ("shown", "key"),
    [
        ("57.9 (57.1 to 58.7)", "57.9"),
        ("−2.5 points (−3.5 to −1.4)", "-2.5"),
        ("+0.021 nats (0.01 to 0.03)", "0.021"),
        ("−44\u00a0% (−49 to −40)", "-44"),
        ("12.5 min", "750"),
        ("3.1 h (reference)", "11160"),
        ("42 s (0.63×)", "42"),
        ("90.3 MB (reference)", "90300000"),
        ("1.24 GB", "1240000000"),
        ("612 kB (1/147)", "612000"),
        ("22.6 M", "22600000"),
        ("650 T", "650000000000000"),
        ("4,350", "4350"),
        ("1.9e-5", "1.9e-05"),
        ("−2e-3", "-0.002"),
        ("4 of 5", "4"),
        ("< 0.001", "0"),
        ("– (not measured)", ""),
        ("57.9", None),  # the text itself will do
        ("12", None),
        ("linear", None),
        ("all", None),
        ("2.13.0", None),  # a version, not a number
        ("3f9c21aa", None),
        ("", None),
    ],
)
def test_a_number_is_read_back_with_its_unit(shown: str, key: str | None) -> None:
    assert sort_key(shown, numeric=True) == key


def test_outside_of_numeric_columns_only_missing_values_have_a_key() -> None:
    assert sort_key("2026-11-01", numeric=False) is None
    assert sort_key("– (no run)", numeric=False) == ""


def test_a_judgement_is_sorted_by_its_word_whatever_its_icon() -> None:
    assert str(Badge("not_assessable", "not assessable")).startswith("–")
    assert sort_key(Badge("not_assessable", "not assessable"), numeric=False) is None


@given(some.floats(0, 1e19))
def test_counts_sizes_and_times_sort_as_their_values_do(value: float) -> None:
    for show in (text.count, text.size, text.duration):
        shown = show(value)
        key = float(sort_key(shown, numeric=True) or shown)
        assert key == pytest.approx(value, rel=6e-3, abs=0.51), shown


@given(some.floats(-1e9, 1e9))
def test_signed_numbers_sort_as_their_values_do(value: float) -> None:
    for shown in (text.fixed(value, 3, signed=True), text.significant(value)):
        key = float(sort_key(shown, numeric=True) or shown)
        assert key == pytest.approx(value, rel=6e-3, abs=6e-4), shown
