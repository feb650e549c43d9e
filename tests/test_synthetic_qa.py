"""The made-up questions: the same everywhere, answerable as they say, and fair to the splits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetrial.frozen import short_hash
from finetrial.plugins import load
from finetrial.tasks.synthetic_qa import ANSWERS, PEOPLE, RELATIONS, make_row

TASK = load("tasks", "synthetic_qa")


@pytest.fixture(scope="module")
def splits():
    return TASK.splits(TASK.Params(), Path())


def test_rows_never_change():
    # Written down when the generator was calibrated: another hash means other data under the same name.
    assert short_hash([make_row(0, "train", number) for number in range(50)]) == "ee2b8835"
    assert make_row(0, "train", 7) != make_row(1, "train", 7)


def test_more_rows_only_add_rows(splits):
    more = TASK.splits(TASK.Params(rows=900), Path())
    assert more.train[:800] == splits.train
    assert more.test == splits.test


def test_answers_stand_where_they_are_said_to_and_a_third_has_none(splits):
    for rows in (splits.train, splits.validation, splits.test):
        unanswerable = 0
        for row in rows:
            texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
            unanswerable += not texts
            assert row["is_impossible"] == (not texts)
            for text, start in zip(texts, starts, strict=True):
                assert row["context"][start : start + len(text)] == text
        assert unanswerable == len(rows) // 3


def facts_of(context: str) -> dict[tuple[str, str], str]:
    """(person, kind of fact) -> what the passage says, read back from its sentences."""
    found = {}
    for sentence in re.findall(r"[^.]+\.", context):
        for relation in RELATIONS:
            for form in relation.facts:
                pattern = (
                    re.escape(form).replace(r"\{who\}", "(?P<who>.+)").replace(r"\{what\}", "(?P<what>.+)")
                )
                match = re.fullmatch(pattern, sentence.strip())
                if match and match["what"] in ANSWERS[relation.kind]:
                    found[match["who"], relation.kind] = match["what"]
    return found


def test_a_reader_of_the_passage_answers_every_question(splits):
    rivals = 0
    for row in splits.test:
        facts = facts_of(row["context"])
        assert len(facts) == 2
        ((who, kind),) = [
            (person, relation.kind)
            for relation in RELATIONS
            for person in PEOPLE["test"]
            if row["question"] in [form.replace("{who}", person) for form in relation.questions]
        ]
        assert facts.get((who, kind)) == (row["answers"]["text"] or [None])[0]
        rivals += any(person != who and k == kind for person, k in facts)
    assert 0.3 < rivals / len(splits.test) < 0.5


def test_splits_share_no_person():
    names = [set(people) for people in PEOPLE.values()]
    assert sum(map(len, names)) == len(set.union(*names))
    assert all(len(set(answers)) == len(answers) for answers in ANSWERS.values())


def test_rows_fit_the_model_input_in_one_window(splits, tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    features = TASK.head.encode(splits.train, tokenizer, TASK.Params(), causal=False)
    assert len(features) == len(splits.train)
    assert max(len(feature.input_ids) for feature in features) <= 64
    unknown = tokenizer.unk_token_id
    assert not any(unknown in feature.input_ids for feature in features)


def test_never_answering_scores_a_third(splits):
    scores = TASK.head.baselines(splits, TASK.Params())["no_answer"]
    assert scores["f1"] == pytest.approx(33.25)  # 133 of 400
    assert scores["has_ans_f1"] == 0.0
