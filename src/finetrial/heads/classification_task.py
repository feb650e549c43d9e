"""The task around the classification head: which columns are text and label, and how labels get numbers.

Not a plug-in itself: `tasks/classification.py` and the presets beside it are this class with their own
columns, metric and default data (a plug-in never imports another).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from finetrial import data
from finetrial.data import SPLIT_SEED, DataSource
from finetrial.errors import DataError
from finetrial.heads.classification import METRICS, Classification, ClassificationParams
from finetrial.plugins import Example, Metric, Splits
from finetrial.readers import Row

HIDDEN = -1  # what GLUE's test sets hold in place of labels
MAX_CLASSES = 1000
_WHOLE = re.compile(r"0|-?[1-9]\d{0,17}")  # in the one form that a number is written back in

Label = int | str
MetricName = Literal["accuracy", "f1", "matthews"]


class ClassificationTaskParams(ClassificationParams):
    """Data, splits, metric, and the head's length in tokens. Shares are of train's rows."""

    data: DataSource
    metric: MetricName = "accuracy"
    validation_share: float = Field(default=0.1, gt=0, lt=1)  # used where the data names no validation split
    test_share: float | None = Field(default=None, gt=0, lt=1)  # only for data without a test split
    split_seed: int = Field(default=SPLIT_SEED, ge=0)
    validation_rows: int | None = Field(default=None, ge=1)  # at most so many, with the labels' shares kept
    test_rows: int | None = Field(default=None, ge=1)


class ClassificationTask:
    """See `plugins.Task`. `columns` maps text, text_pair and label to the names in the usual data.

    `metric` is that of the default parameters; `metric_for` gives the one that the parameters choose.
    """

    def __init__(self, params: type[ClassificationTaskParams], columns: Mapping[str, str] | None = None):
        self.Params = params
        self.columns = dict(columns or {})
        self.metric = METRICS[params.model_fields["metric"].default]
        self.head = Classification()

    def metric_for(self, params: ClassificationTaskParams) -> Metric:
        return METRICS[params.metric]

    def files(self, params: ClassificationTaskParams, base: Path) -> list[Path]:
        return data.files(params.data, base)

    def splits(self, params: ClassificationTaskParams, base: Path) -> Splits:
        """Rows with `id`, `text`, `text_pair` for pairs, `label` (a number) and `classes` (all names).

        Splits that the data does not name are cut off train, with the labels' shares kept.

        Raises:
            DataError: rows, columns, labels or splits are not as the task needs them.
        """
        data.check_columns(params.data, ("id", "text", "text_pair", "label"))
        columns = {**self.columns, **params.data.columns}
        name = columns.get("label", "label")
        rows = data.load(params.data, base, hidden=lambda values: values.get(name) in (HIDDEN, str(HIDDEN)))
        everything = (row for rows_of_role in rows.values() for row in rows_of_role)
        pair = "text_pair" in columns or any("text_pair" in row.values for row in everything)
        needed = ["text", *(["text_pair"] if pair else []), "label"]
        needed += ["id"] if "id" in params.data.columns else []
        for rows_of_role in rows.values():
            data.require(rows_of_role[0], needed, columns)
        numbers = label_numbers([(row, data.take(row, "label", columns)) for row in rows["train"]])
        classes = tuple(str(label) for label in numbers)
        found = {
            role: [_example(row, role, columns, numbers, classes, pair) for row in rows_of_role]
            for role, rows_of_role in rows.items()
        }
        cut = partial(data.stratified_split, label_key="label", seed=params.split_seed)
        splits = data.fill_splits(
            found, lambda rows, share: cut(rows, share=share), params.validation_share, params.test_share
        )
        data.check_disjoint(splits, cut=[role for role in data.ROLES if role not in found])
        cap = partial(data.cap_rows, label_key="label", seed=params.split_seed)
        return Splits(
            splits.train, cap(splits.validation, params.validation_rows), cap(splits.test, params.test_rows)
        )


def label_numbers(labels: list[tuple[Row, Any]]) -> dict[Label, int]:
    """Label -> number, in sorted order: whole numbers (also as text, as CSV has them) by value, else texts.

    Texts are numbers if all of them are, each as it is usually written: not `01`, and not `60` beside `18-25`.

    Raises:
        DataError: a label is missing or neither, both kinds occur, or there are fewer than two or very many.
    """
    kinds: dict[type, Row] = {}
    found: set[Label] = set()
    read = [(row, _label(row, value)) for row, value in labels]
    whole = all(_WHOLE.fullmatch(label) for _, label in read if isinstance(label, str))
    for row, label in read:
        label = int(label) if whole else label
        kinds.setdefault(type(label), row)
        found.add(label)
    if len(kinds) == 2:
        texts = {label for label in found if isinstance(label, str)}
        numbers = {label for label in found if isinstance(label, int)}
        raise DataError(
            f"{kinds[str].where}: the labels are texts ({sorted(texts)[0]!r}) and numbers "
            f"({sorted(numbers)[0]}); write them all alike"
        )
    if not 2 <= len(found) <= MAX_CLASSES:
        only = f"only the label {next(iter(found))!r}" if len(found) == 1 else f"{len(found)} labels"
        raise DataError(f"train has {only}; classification needs 2 to {MAX_CLASSES}. Check the label column")
    return {label: number for number, label in enumerate(sorted(found))}


def _label(row: Row, value: Any) -> Label:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        raise DataError(f"{row.where}: the label is empty; give it one, or leave the row out")
    raise DataError(
        f"{row.where}: the label is {value!r}; it has to be a whole number or a text (scores that vary without "
        f"steps are not supported)"
    )


def _example(
    row: Row,
    role: str,
    columns: dict[str, str],
    numbers: dict[Label, int],
    classes: tuple[str, ...],
    pair: bool,
) -> Example:
    label = _label(row, data.take(row, "label", columns))
    if isinstance(label, str) and _WHOLE.fullmatch(label) and isinstance(next(iter(numbers)), int):
        label = int(label)
    if label not in numbers:
        if str(label) == str(HIDDEN):
            raise DataError(
                f"{row.where}: the label is -1, which stands for a hidden label; nothing can be scored on it. "
                f"Use the official dev set as test and leave validation out (it is then cut off train)"
            )
        raise DataError(
            f"{row.where} ({role}): the label {label!r} is not in train, which has {', '.join(classes[:10])}; "
            f"mend the label, or add such rows to train"
        )
    example: Example = {
        "id": str(data.take(row, "id", columns)) if "id" in columns else row.where,
        "text": data.take_text(row, "text", columns),
        "label": numbers[label],
        "classes": classes,
    }
    if pair:
        example["text_pair"] = data.take_text(row, "text_pair", columns)
    return example
