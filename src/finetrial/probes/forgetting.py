"""Forgetting: what a model lost that it was not trained for.

Two measures, on the same inputs before and after: what a linear classifier still reads from the body on
*other* tasks (encoders and decoders), and, for causal models, the loss on general text under the base's own
language head. Raw measurements of one model as plain JSON; intervals and verdicts are `analyse.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError, field_validator

from finetrial import plugins, readers
from finetrial.data import SPLIT_SEED, cap_rows, locate
from finetrial.errors import DataError, PluginError
from finetrial.frozen import Frozen, canonical_json, short_hash
from finetrial.plugins import ProbeInput
from finetrial.records import TaskSpec

LEAST_ROWS = 50  # below, five folds say nothing
READABLE = 2.0  # standard errors by which the base's accuracy has to lie above the commonest class


class Text(Frozen):
    """A file of general text: one row per text, or SQuAD's form; `column` holds the text."""

    file: str
    column: str = "text"


class Params(Frozen):
    """`tasks`: tasks to read with a linear classifier, name -> {use, and the task's own keys}; the study's own
    tasks come with them, and a model is measured on those that it was not trained for. `text`: general text."""

    tasks: dict[str, dict[str, Any]] = {}
    text: Text | None = None
    task_rows: int = Field(default=1000, ge=LEAST_ROWS, le=100_000)  # of a task's training rows, at most
    text_tokens: int = Field(default=20_000, ge=32)
    text_length: int = Field(default=256, ge=16)  # tokens of a window

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {name: _entry(name, given) for name, given in tasks.items()}


def _entry(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """`{use, ...}` or `{use, params}` as `{use, params}`, complete and checked."""
    given = dict(given)
    use = given.pop("use", name)
    try:
        plugin = plugins.load("tasks", use)
        params = plugin.Params.model_validate(given["params"] if set(given) == {"params"} else given)
    except PluginError as error:
        raise ValueError(f"{name}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, (name, *first['loc'])))}: {first['msg']}") from error
    if plugin.head.kind != "sequence_classification":
        raise ValueError(f"{name}: a linear classifier reads classification tasks only; leave it out")
    return {"use": use, "params": params.model_dump(mode="json")}


class TooFewRows(ValueError):
    """A class has fewer rows than there are folds."""


class Forgetting:
    """See `plugins.Probe`."""

    Params = Params

    def with_tasks(self, params: Params, tasks: Sequence[TaskSpec]) -> Params:
        """The parameters with the study's own classification tasks added.

        Raises:
            ValueError: nothing is left that a model of the study is not trained for.
        """
        own = {task.name: {"use": task.use, "params": task.params} for task in tasks if _is_readable(task)}
        found = params.model_copy(update={"tasks": own | params.tasks})
        for task in tasks:
            if found.text is None and not set(found.tasks) - {task.name}:
                raise ValueError(
                    f"nothing is named that a model trained on {task.name} could forget; name other tasks, "
                    f"tasks: {{name: {{use: classification, data: ...}}}}, or for a causal model general text, "
                    f"text: {{file: ...}}"
                )
        return found

    def files(self, params: Params, base: Path) -> list[Path]:
        """The local files that it reads, for their hashes. Raises DataError."""
        found = [path for plugin, given in _tasks(params).values() for path in plugin.files(given, base)]
        return found + ([locate(params.text.file, base)] if params.text else [])

    def measure(self, given: ProbeInput, params: Params) -> dict[str, Any]:
        """What the classifier reads, and the loss on text, base and tuned; more is worse in every `forgotten`.

        `tasks`: name -> cross-validated accuracy in points, `base` and `tuned`; `forgotten`, their difference;
        `chance`, the commonest class; `readable`, whether the base lies above chance by more than its sampling
        error (else there is nothing to forget); `rows`; `input_sha256`. `left_out`: tasks with a class of too
        few rows, and why. `tasks_forgotten`: the mean over readable tasks, None without one. `text`: mean loss
        per token in nats, with `tokens`; None where no text is given or the model is not causal.

        Raises:
            DataError: rows or text are not as they should be, or there is nothing to measure.
        """
        tasks, left_out = {}, {}
        for name, (plugin, task) in _tasks(params).items():
            if name != given.task:
                try:
                    tasks[name] = _on_task(given, name, plugin, task, params)
                except TooFewRows as error:
                    left_out[name] = str(error)
        text = _on_text(given, params) if params.text and given.causal else None
        if not tasks and text is None:
            reasons = [f"{name}: {why}" for name, why in left_out.items()]
            reasons += ["text is measured of causal models only"] if params.text else []
            raise DataError(
                f"measure.forgetting: a model trained on {given.task} has nothing that it could forget "
                f"({'; '.join(reasons) or 'no other task is named'}); name others, or leave the measure out"
            )
        losses = [task["forgotten"] for task in tasks.values() if task["readable"]]
        return {
            "tasks": tasks,
            "left_out": left_out,
            "tasks_forgotten": sum(losses) / len(losses) if losses else None,
            "text": text,
        }


def _is_readable(task: TaskSpec) -> bool:
    return plugins.load("tasks", task.use).head.kind == "sequence_classification"


def _tasks(params: Params) -> dict[str, tuple[Any, Any]]:
    loaded = {
        name: (plugins.load("tasks", entry["use"]), entry["params"]) for name, entry in params.tasks.items()
    }
    return {
        name: (plugin, plugin.Params.model_validate_json(canonical_json(given)))
        for name, (plugin, given) in loaded.items()
    }


def _on_task(given: ProbeInput, name: str, plugin: Any, task: Any, params: Params) -> dict[str, Any]:
    from finetrial.architecture import check_inputs
    from finetrial.linear_probe import FOLDS, cross_validated, stratified_folds
    from finetrial.reading import features, texts_of

    examples = cap_rows(plugin.splits(task, given.folder).train, params.task_rows, label_key="label")
    labels_N = np.array([example["label"] for example in examples])
    try:
        folds = stratified_folds(labels_N, FOLDS, np.random.default_rng(SPLIT_SEED))
    except ValueError as error:
        raise TooFewRows(str(error)) from error
    texts = texts_of(examples, plugin, task, given.tokenizer, causal=given.causal)
    ids = [feature.input_ids for side in texts.sides for feature in side]
    check_inputs(given.base, ids, f"the max_length of {name}, which measure.forgetting reads,")
    base, tuned = (
        100.0 * float(cross_validated(features(model, texts), labels_N, folds).mean())
        for model in (given.base, given.tuned)
    )
    rows, chance = len(labels_N), 100.0 * float(np.bincount(labels_N).max() / len(labels_N))
    error = math.sqrt(base * (100.0 - base) / rows)
    return {
        "base": base,
        "tuned": tuned,
        "forgotten": base - tuned,
        "chance": chance,
        "readable": base > chance + READABLE * error,
        "rows": rows,
        "input_sha256": texts.sha256,
    }


def _on_text(given: ProbeInput, params: Params) -> dict[str, Any]:
    from finetrial.architecture import check_inputs
    from finetrial.language import token_loss, windows

    assert params.text is not None
    assert given.language_model is not None
    try:
        inputs = windows(
            _texts(params.text, given.folder),
            given.tokenizer,
            length=params.text_length,
            tokens=params.text_tokens,
        )
    except ValueError as error:
        raise DataError(
            f"measure.forgetting.text: {error}; name a longer text, or a lower text_length"
        ) from error
    check_inputs(given.base, inputs, "measure.forgetting.text_length")
    language_model = given.language_model()
    before, after = (token_loss(language_model, model, inputs) for model in (given.base, given.tuned))
    return {
        "base": before.mean,
        "tuned": after.mean,
        "forgotten": after.mean - before.mean,
        "tokens": before.tokens,
        "input_sha256": short_hash(inputs, 64),
    }


def _texts(text: Text, folder: Path) -> Iterator[str]:
    """The file's texts in order, each once: the rows of SQuAD's form repeat their paragraph.

    Raises:
        DataError: a row has no such column, or no text in it.
    """
    path = locate(text.file, folder)
    seen: set[str] = set()
    for row in readers.read(path, path.name):
        value = row.values.get(text.column)
        if not isinstance(value, str):
            there = ", ".join(row.values)
            raise DataError(f"{row.where}: no text in column {text.column!r}; it has {there}: set text.column")
        if value not in seen:
            yield value
        seen.add(value)


PLUGIN = Forgetting()
