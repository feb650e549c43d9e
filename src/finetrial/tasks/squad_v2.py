"""SQuAD v2, and any extractive QA data in its form: a span of the context, or no answer.

Reads SQuAD's nested JSON and flat rows (`id`, `title`, `context`, `question`, `answers`) from files or the
Hub. Splits share no article. Encoding and scoring are `heads/extractive_qa.py`'s.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from finetrial import data
from finetrial.data import SPLIT_SEED, DataSource
from finetrial.errors import DataError
from finetrial.heads.extractive_qa import ExtractiveQa, QaParams
from finetrial.plugins import Example, Metric, Splits
from finetrial.readers import Row

COLUMNS = ("id", "title", "context", "question", "answers")


class Params(QaParams):
    """Data, splits, and the head's lengths in tokens. Shares are of train's questions."""

    data: DataSource = DataSource(hub="rajpurkar/squad_v2")
    validation_share: float = Field(default=0.1, gt=0, lt=1)  # used where the data names no validation split
    test_share: float | None = Field(default=None, gt=0, lt=1)  # only for data without a test split
    split_seed: int = Field(default=SPLIT_SEED, ge=0)
    validation_rows: int | None = Field(default=None, ge=1)  # at most so many, with the no-answer share kept
    test_rows: int | None = Field(default=None, ge=1)


class SquadV2:
    """The task; see `plugins.Task`. Its metric is the official F1 over all questions, in percent."""

    Params = Params
    metric = Metric(name="f1", higher_is_better=True, worst=0.0, best=100.0)
    head = ExtractiveQa()

    def files(self, params: Params, base: Path) -> list[Path]:
        return data.files(params.data, base)

    def splits(self, params: Params, base: Path) -> Splits:
        """Rows with `id`, `title`, `context`, `question`, `answers` and `is_impossible`.

        The official dev set is the test split where a test split is not to be had (as on the Hub), and
        validation is then whole articles of train.
        """
        data.check_columns(params.data, COLUMNS)
        read = data.load(params.data, base)
        for rows in read.values():
            named = [name for name in ("id", "title") if name in params.data.columns]
            data.require(rows[0], ("context", "question", "answers", *named), params.data.columns)
        found = {role: [example(row, params.data.columns) for row in rows] for role, rows in read.items()}
        cut = partial(data.group_split, group_key="title", seed=params.split_seed)
        splits = data.fill_splits(
            found, lambda rows, share: cut(rows, share=share), params.validation_share, params.test_share
        )
        contexts = {row["context"] for rows in found.values() for row in rows}
        cut_off = [role for role in data.ROLES if role not in found]
        data.check_disjoint(
            splits, "title", called=lambda of: "context" if of in contexts else "title", cut=cut_off
        )
        cap = partial(data.cap_rows, label_key="is_impossible", seed=params.split_seed)
        return Splits(
            splits.train, cap(splits.validation, params.validation_rows), cap(splits.test, params.test_rows)
        )


def example(row: Row, columns: dict[str, str]) -> Example:
    """The head's form of a row. Raises DataError where an answer does not stand where it is said to."""
    context = data.take_text(row, "context", columns)
    texts, starts = _answers(row, columns)
    for text, start in zip(texts, starts, strict=True):
        if context[start : start + len(text)] != text:
            at = context.find(text)
            where = f"it stands at {at}" if at >= 0 else "it is not in the context"
            raise DataError(
                f"{row.where}: answer_start {start} does not point at {text!r}; {where}. Mend the row "
                f"(answer_start counts characters from 0)"
            )
    title, own = (
        data.take(row, key, columns) if key in columns else row.values.get(key) for key in ("title", "id")
    )
    return {
        "id": row.where if own is None else str(own),
        "title": title or context,  # without articles, a paragraph is the unit that splits may not share
        "context": context,
        "question": data.take_text(row, "question", columns),
        "answers": {"text": texts, "answer_start": starts},
        "is_impossible": not texts,
    }


def _answers(row: Row, columns: dict[str, str]) -> tuple[list[str], list[int]]:
    """Texts and their character positions, from {text: [...], answer_start: [...]}, a list of objects with
    both, or either as JSON text (a CSV cell)."""
    value: Any = data.take(row, "answers", columns)
    try:
        value = json.loads(value) if isinstance(value, str) else value
        if isinstance(value, dict):
            pairs = list(zip(value["text"], value["answer_start"], strict=True))
        else:
            pairs = [(answer["text"], answer["answer_start"]) for answer in value]
        texts, starts = [text for text, _ in pairs], [int(start) for _, start in pairs]
        if not all(isinstance(text, str) and text.strip() for text in texts) or any(s < 0 for s in starts):
            raise ValueError("an answer is empty or starts before 0")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{row.where}: answers is {str(value)[:80]!r} ({error}); write "
            f"{{text: [...], answer_start: [...]}}, both empty when there is no answer"
        ) from error
    return texts, starts


PLUGIN = SquadV2()
