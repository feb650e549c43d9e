"""The SQuAD v2 scorer against published totals and cases worked by hand from the official definition."""

from __future__ import annotations

import pytest

from finetrial.heads.squad_metrics import (
    aggregate,
    best_over_golds,
    exact,
    f1,
    normalise_answer,
)


def test_published_groups_combine_to_the_published_total():
    # A published evaluation of the SQuAD v2.0 dev set: 5,928 questions with an answer, 5,945 without.
    scores = [(0.7793522, 0.8402838)] * 5928 + [(0.8179983, 0.8179983)] * 5945
    names = list(map(str, range(len(scores))))
    has_answer = {name: number < 5928 for number, name in enumerate(names)}
    totals = aggregate(dict(zip(names, scores, strict=True)), has_answer)
    assert (totals["exact"], totals["f1"]) == pytest.approx((79.870294, 82.912512), abs=5e-6)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Normans", "normans"),
        ("an apple, a pear and the plum.", "apple pear and plum"),
        ("Theatre", "theatre"),  # an article only as a whole word
        ("U.S.A.", "usa"),
        ("the-end", "theend"),  # punctuation goes first, so the article is none any more
        ("a.b", "ab"),
        ("  10   –  12 ", "10 – 12"),  # a dash outside ASCII stays
        ("“the quote”", "“ quote”"),  # so do typographic quotes, and the article beside one is a word
        ("$1,000,000", "1000000"),
        ("caf\u00e9\u00a0noir", "café noir"),  # a no-break space is white space
        ("ÉCOLE", "école"),
        ("a", ""),
        ("!?", ""),
        ("", ""),
    ],
)
def test_normalisation(text, normalised):
    assert normalise_answer(text) == normalised


def test_normal_forms_are_compared_byte_by_byte():
    # The official scorer does no Unicode normalisation: e + combining accent is not é.
    assert exact("caf\u00e9", "cafe\u0301") == 0.0


@pytest.mark.parametrize(
    ("gold", "predicted", "expected_exact", "expected_f1"),
    [
        ("France", "France", 1.0, 1.0),
        ("the France", "france!", 1.0, 1.0),
        # 2 of 3 predicted words, 2 of 2 gold words: 2 * (2/3 * 1) / (2/3 + 1) = 0.8
        ("10th centuries", "the 10th and centuries", 0.0, 0.8),
        # words count as often as they occur: one shared "new", precision 1/2, recall 1/3
        ("new old older", "new new", 0.0, 0.4),
        ("France", "Germany", 0.0, 0.0),
        ("France", "", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("", "France", 0.0, 0.0),
        ("the", "a", 1.0, 1.0),  # both are nothing once normalised
    ],
)
def test_one_pair(gold, predicted, expected_exact, expected_f1):
    assert exact(gold, predicted) == expected_exact
    assert f1(gold, predicted) == pytest.approx(expected_f1)


def test_the_best_gold_counts_for_each_score_on_its_own():
    assert best_over_golds(["Denmark, Iceland", "Iceland and Norway"], "Iceland") == (0.0, pytest.approx(2 / 3))
    assert best_over_golds(["north", "in the north"], "In North") == (1.0, 1.0)


def test_golds_that_normalise_to_nothing_are_left_out():
    assert best_over_golds(["the", "Paris"], "") == (0.0, 0.0)
    assert best_over_golds(["the", "Paris"], "a") == (0.0, 0.0)
    assert best_over_golds(["the"], "") == (1.0, 1.0)  # none left: no answer is right
    assert best_over_golds(["the"], "Paris") == (0.0, 0.0)
    assert best_over_golds([], "") == (1.0, 1.0)
    assert best_over_golds([], "Paris") == (0.0, 0.0)


def test_totals_split_by_answerability():
    scores = {"a": (1.0, 1.0), "b": (0.0, 0.5), "c": (1.0, 1.0), "d": (0.0, 0.0), "e": (1.0, 1.0)}
    has_answer = {"a": True, "b": True, "c": False, "d": False, "e": False}
    assert aggregate(scores, has_answer) == pytest.approx(
        {
            "exact": 60.0,
            "f1": 70.0,
            "has_ans_exact": 50.0,
            "has_ans_f1": 75.0,
            "has_ans_rows": 2,
            "no_ans_exact": 200 / 3,
            "no_ans_f1": 200 / 3,
            "no_ans_rows": 3,
        }
    )


def test_a_group_without_questions_has_no_score():
    totals = aggregate({"a": (1.0, 1.0)}, {"a": True})
    assert "no_ans_f1" not in totals
    assert totals["no_ans_rows"] == 0
    with pytest.raises(ValueError, match="no questions"):
        aggregate({}, {})
