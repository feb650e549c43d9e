"""What `finetrial check` found, as a record, as rows of one table, and as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from finetrial.forecast import Forecast
from finetrial.frozen import SCHEMA_VERSION, Frozen, SchemaVersion
from finetrial.progress import duration_text as duration
from finetrial.rehearsed import Rehearsal
from finetrial.report_text import size
from finetrial.summary import FROZEN_BASELINE

NOTHING = "-"


class Pilot(Frozen):
    """A real trial that was run before the study."""

    learning_rate: float
    outcome: str
    score: float | None  # on validation
    measured_memory_bytes: int | None


class ArmCheck(Frozen):
    """An arm's rehearsal and pilots."""

    rehearsal: Rehearsal | None
    failure: str | None  # why there is no rehearsal
    learning_rate: dict[str, Any]  # its range, as in study.lock.json
    pilots: tuple[Pilot, ...]


class TaskCheck(Frozen):
    """What no training, or none of the body, reaches."""

    metric: str
    higher_is_better: bool
    rows: dict[str, int]  # split -> rows
    test: dict[str, float]  # baseline -> score on test: what needs no model
    validation: dict[str, float]  # likewise on validation; and untrained, frozen body

    @property
    def best(self) -> float:
        """Of what needs no training, on validation, where pilots are scored."""
        scores = [score for name, score in self.validation.items() if name != FROZEN_BASELINE]
        return max(scores) if self.higher_is_better else min(scores)

    def beaten_by(self, scores: Sequence[float]) -> bool:
        """Whether one of the scores is better than the best without training."""
        return any(score > self.best if self.higher_is_better else score < self.best for score in scores)


class Checked(Frozen):
    """`check.json`: everything that was found."""

    schema_version: SchemaVersion = SCHEMA_VERSION
    study: str
    home: str
    tasks: dict[str, TaskCheck]
    arms: dict[str, ArmCheck]  # task/method
    forecast: Forecast | None  # None: an arm does not fit or does not learn
    runs: int
    ended_well: int
    killed: int  # attempts that crashed, were lost or took too long
    out_of_memory: int  # attempts
    retries: int
    faults: tuple[str, ...]  # why the study cannot run as it is, each with what to do
    notes: tuple[str, ...]


def arm_rows(checked: Checked) -> list[tuple[str, ...]]:
    """A header and rows: a fact each, a column for every arm."""
    rows: list[tuple[str, ...]] = [("", *checked.arms)]

    def add(name: str, tell: Callable[[Rehearsal], str]) -> None:
        cells = [tell(arm.rehearsal) if arm.rehearsal else NOTHING for arm in checked.arms.values()]
        rows.append((name, *cells))

    add("memory, predicted peak", lambda r: size(r.predicted_memory_bytes))
    add("memory, measured peak", lambda r: size(r.measured_memory_bytes))
    add(
        "budget, headroom",
        lambda r: f"{size(r.budget_bytes)}, {1 - r.measured_memory_bytes / r.budget_bytes:.0%}",
    )
    add(
        "batch size, parts",
        lambda r: f"{r.batch_size} in {r.micro_batches}" + ", recomputed" * r.gradient_checkpointing,
    )
    add("tokens per second", lambda r: f"{r.tokens_per_second:,.0f}")
    add("ten samples", _ten_samples)
    rows.append(("learning rates", *(_range(arm.learning_rate) for arm in checked.arms.values())))
    for name, scores in _baselines(checked).items():
        rows.append((name, *scores))
    rows.append(("pilots, validation", *(_pilots(arm) for arm in checked.arms.values())))
    rows.append(("pilots, measured peak", *(_pilot_peak(arm) for arm in checked.arms.values())))
    if checked.forecast is not None:
        arms = checked.forecast.arms
        rows.append(("a trial", *(duration(arms[name].trial_seconds) for name in checked.arms)))
        rows.append(("a replicate", *(duration(arms[name].replicate_seconds) for name in checked.arms)))
    return rows


def study_rows(checked: Checked) -> list[tuple[str, ...]]:
    """A header and rows about the study as a whole."""
    rows: list[tuple[str, ...]] = [
        ("", checked.study),
        ("runs of the check", f"{checked.ended_well} of {checked.runs} ended well"),
        ("kills, out of memory, retries", f"{checked.killed}, {checked.out_of_memory}, {checked.retries}"),
    ]
    if checked.forecast is not None:
        phases = checked.forecast.phases.items()
        rows += [(f"{name}, predicted", duration(seconds)) for name, seconds in phases if seconds]
        rows.append(("the whole study, predicted", duration(checked.forecast.seconds)))
        rows.append(("disk, predicted", size(checked.forecast.disk_bytes)))
    return rows


def markdown(checked: Checked) -> str:
    """`check.md`: both tables, the faults and the notes."""
    said = [f"# Check of {checked.study}\n", _table(arm_rows(checked)), _table(study_rows(checked))]
    if checked.faults:
        said.append("It cannot run as it is:\n\n" + "".join(f"- {fault}\n" for fault in checked.faults))
    if checked.notes:
        said.append("Notes:\n\n" + "".join(f"- {note}\n" for note in checked.notes))
    return "\n".join(said)


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def _baselines(checked: Checked) -> dict[str, list[str]]:
    tasks = [checked.tasks[arm.partition("/")[0]] for arm in checked.arms]
    rows: dict[str, list[str]] = {}
    for split in ("test", "validation"):
        for name in dict.fromkeys(name for task in tasks for name in getattr(task, split)):
            scores = [getattr(task, split).get(name) for task in tasks]
            rows[f"{name.replace('_', ' ')}, {split}"] = [
                NOTHING if score is None else f"{task.metric} {score:.1f}"
                for score, task in zip(scores, tasks, strict=True)
            ]
    return rows


def _ten_samples(rehearsal: Rehearsal) -> str:
    last = rehearsal.overfit.tries[-1]
    if rehearsal.overfit.fault is not None:
        return "not learnt"
    return f"loss {last.first_loss:.2g} to {last.loss:.2g} in {last.steps} steps at {last.learning_rate:.1e}"


def _range(dimension: dict[str, Any]) -> str:
    match dimension.get("kind"):
        case "range":
            return f"{dimension['low']:g} .. {dimension['high']:g}"
        case "choice":
            return ", ".join(f"{value:g}" for value in dimension["choices"])
        case "fixed":
            return f"{dimension['value']:g}"
    return NOTHING


def _pilots(arm: ArmCheck) -> str:
    told = [
        f"{pilot.outcome if pilot.score is None else format(pilot.score, '.1f')} at {pilot.learning_rate:.1e}"
        for pilot in arm.pilots
    ]
    return ", ".join(told) or NOTHING


def _pilot_peak(arm: ArmCheck) -> str:
    peaks = [pilot.measured_memory_bytes for pilot in arm.pilots if pilot.measured_memory_bytes is not None]
    return size(max(peaks)) if peaks else NOTHING
