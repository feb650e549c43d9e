"""The exported optimum of an arm: `best/<task>.<method>.yaml`, written by the search, read by the training.

Typed and versioned, with the range that was searched and a flag where the optimum lies on its edge.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import ValidationError

from finetrial import files, strict_yaml
from finetrial.frozen import SCHEMA_VERSION, Frozen, SchemaVersion, Setting
from finetrial.records import RunRecord
from finetrial.sealed import Damaged, digest
from finetrial.space import Space, edge_of
from finetrial.store import Home

HEADER = """\
# The optimum of this arm: the best trial on validation. Written by `finetrial run`; the training
# phase reads `settings` from here. A change is seen by its SHA-256 and undone by the next `finetrial run`.
# `edges` names settings within 5 % of the end of their range: the optimum may lie outside it, so widen the
# range and search again.
"""


class Optimum(Frozen):
    """What the search found for one arm."""

    schema_version: SchemaVersion = SCHEMA_VERSION
    study: str
    task: str
    method: str
    settings: dict[str, Setting]
    metric: str
    score: float  # on validation
    trial: int
    run_id: str
    trials: int
    rows: int | None  # training rows per trial; None: all
    searched: dict[str, Any]  # setting -> the range or choices it was drawn from
    edges: dict[str, Literal["low", "high"]]


def optimum(record: RunRecord, space: Space, *, metric: str, trials: int) -> Optimum:
    """The export of an arm's best trial."""
    assert record.result is not None
    assert record.result.score is not None
    assert record.spec.method is not None
    spec = record.spec
    edges = {name: edge for name in space if (edge := edge_of(name, space[name], spec.settings[name]))}
    return Optimum(
        study=spec.study, task=spec.task.name, method=record.spec.method.name, settings=spec.settings,
        metric=metric, score=record.result.score, trial=spec.number, run_id=spec.run_id, trials=trials,
        rows=spec.rows, edges=edges,
        searched={name: space[name].model_dump(mode="json") for name in space if space[name].kind != "fixed"},
    )  # fmt: skip


def write(home: Home, found: Optimum) -> None:
    content = found.model_dump(mode="json")
    content = {**content, "sha256": digest(content)}
    body = strict_yaml.dump(content)
    path = home.best_file(found.task, found.method)
    if not path.exists() or path.read_text(encoding="utf-8") != HEADER + body:
        files.write_text(path, HEADER + body)


def read(home: Home, task: str, method: str) -> Optimum:
    """The optimum that the training phase uses.

    Raises:
        Damaged: the file is not what the search wrote.
    """
    path = home.best_file(task, method)
    text = path.read_text(encoding="utf-8", errors="replace")
    value, _, problems = strict_yaml.parse(text)
    stated = value.pop("sha256", None) if isinstance(value, dict) else None
    try:
        found = Optimum.model_validate(value)
    except ValidationError as error:
        raise Damaged(path, str(problems[0] if problems else error.errors()[0]["msg"])) from None
    if stated is None:
        raise Damaged(path, "it states no SHA-256; an earlier version of finetrial wrote it")
    if stated != digest(found.model_dump(mode="json")):
        raise Damaged(path, "its SHA-256 is not the one that it states")
    if (found.task, found.method) != (task, method):  # copied here, or a disk on which case tells nothing apart
        raise Damaged(path, f"it is of another arm, {found.task}/{found.method}")
    return found


def drop_damaged(home: Home, arms: Iterable[tuple[str, str]]) -> list[str]:
    """Delete every optimum that is not what the search wrote, for it is exported anew; a sentence each."""
    said = []
    for task, method in arms:
        path = home.best_file(task, method)
        try:
            if path.exists():
                read(home, task, method)
        except Damaged as damaged:
            path.unlink()
            said.append(f"{path} is damaged: {damaged.why}; it is exported anew")
    return said
