"""The SQuAD v2 scorer: exact match and F1 of answer texts, written from the official definition.

A pure function of strings (Rajpurkar et al. 2018, arXiv:1806.03822, and the evaluation script published
with it); it knows no model, no logits and no threshold. All scores that leave this file are percentages
(0 .. 100); those of one answer are shares (0 .. 1).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

# ASCII punctuation only: the official scorer keeps “quotes”, dashes – and every other non-ASCII mark.
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise_answer(text: str) -> str:
    """The text in lower case, without ASCII punctuation and English articles, words one space apart.

    The order matters and is the official one: punctuation goes before articles, so that `the-end` becomes
    `theend` and keeps its article.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact(gold: str, predicted: str) -> float:
    """1.0 when both texts are equal once normalised, else 0.0."""
    return float(normalise_answer(gold) == normalise_answer(predicted))


def f1(gold: str, predicted: str) -> float:
    """Harmonic mean of precision and recall over the words of both texts, 0 .. 1.

    Words count as often as they occur. Where either side has no words, it is 1 if neither has, else 0.
    """
    gold_words = normalise_answer(gold).split()
    predicted_words = normalise_answer(predicted).split()
    if not gold_words or not predicted_words:
        return float(gold_words == predicted_words)
    shared = sum((Counter(gold_words) & Counter(predicted_words)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted_words), shared / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def best_over_golds(golds: Sequence[str], predicted: str) -> tuple[float, float]:
    """(exact, F1) of one prediction against its best gold answer, each the best on its own.

    Gold answers that normalise to nothing are left out; with none left the question has no answer, and
    only an empty prediction is right.
    """
    usable = [gold for gold in golds if normalise_answer(gold)] or [""]
    return max(exact(gold, predicted) for gold in usable), max(f1(gold, predicted) for gold in usable)


def aggregate(scores: Mapping[str, tuple[float, float]], has_answer: Mapping[str, bool]) -> dict[str, float]:
    """Percentages over all questions, over those with an answer and over those without.

    Args:
        scores: question id -> (exact, F1), as shares.
        has_answer: question id -> whether the data set gives it any answer.

    Returns:
        `exact`, `f1`; `has_ans_exact`, `has_ans_f1`, `no_ans_exact`, `no_ans_f1` where there are such
        questions; `has_ans_rows`, `no_ans_rows`.

    Raises:
        ValueError: there are no questions.
    """
    result: dict[str, float] = {}
    for prefix, group in (
        ("", list(scores)),
        ("has_ans_", [key for key in scores if has_answer[key]]),
        ("no_ans_", [key for key in scores if not has_answer[key]]),
    ):
        if not group and not prefix:
            raise ValueError("no questions to score")
        if group:
            result[f"{prefix}exact"] = 100.0 * sum(scores[key][0] for key in group) / len(group)
            result[f"{prefix}f1"] = 100.0 * sum(scores[key][1] for key in group) / len(group)
        if prefix:
            result[f"{prefix}rows"] = float(len(group))
    return result
