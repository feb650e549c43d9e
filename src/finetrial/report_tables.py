"""The report's tables: a summary turned into titled rows of text, the same for HTML, Markdown and LaTeX.

Not for layout (the templates) and not for numbers (`analyse.py`): the only arithmetic is the ratio to the
reference method and the largest of a few values that stand side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from finetrial import report_text as text
from finetrial.frozen import Setting
from finetrial.summary import FROZEN_BASELINE, ArmSummary, ClaimResult, DimensionSummary, Summary, TaskSummary

ICONS = {
    "supported": "✓",
    "refuted": "✗",
    "inconclusive": "?",
    "not_assessable": "–",
    "warning": "!",
    "good": "✓",
}


class Badge(NamedTuple):
    """A cell that carries a judgement: shown as icon, word and colour, then a sentence."""

    kind: str  # a verdict, "warning" or "good"
    word: str
    sentence: str = ""

    @property
    def icon(self) -> str:
        return ICONS[self.kind]

    def __str__(self) -> str:
        return f"{self.icon} {self.word}" + (f": {self.sentence}" if self.sentence else "")


Cell = str | Badge


class Column(NamedTuple):
    title: str
    numeric: bool = False


class Table(NamedTuple):
    """Rows of text under titled columns; the first column names the row."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def columns_of(*titles: str) -> tuple[Column, ...]:
    """Columns from their titles; a leading `#` marks a numeric one."""
    return tuple(Column(title.removeprefix("#"), title.startswith("#")) for title in titles)


def verdict_badge(claim: ClaimResult) -> Badge:
    return Badge(claim.verdict, text.VERDICT_WORDS[claim.verdict], claim.reason)


def verdicts(summary: Summary) -> Table:
    """Every claim on every task: the difference with its interval, seeds, verdict."""
    rows = [
        (
            claim.task,
            claim.claim,
            text.difference(claim, text.claim_decimals(summary, claim)),
            text.seeds(claim),
            verdict_badge(claim),
        )
        for claim in summary.claims
    ]
    note = (
        "Difference: method minus reference on test, over paired replicate seeds; for drift, the relative "
        "change of the mean. Brackets: two-sided 95 % interval, by t, or for drift by Fieller."
    )
    columns = columns_of("Task", "Claim", "#Difference (95 % interval)", "#Seeds", "Verdict")
    return Table("verdicts", "Verdicts", columns, tuple(rows), note)


def costs(summary: Summary) -> Table:
    """Memory, time, trained parameters and saved size of every arm, beside the reference method's."""
    rows = []
    for task in summary.tasks:
        arms = text.arms_of(summary, task.name)
        reference = text.reference_of(summary, task.name)
        base = next((arm for arm in arms if arm.method == reference), None)
        for arm in arms:
            seconds = _seconds(arm)
            rows.append(
                (
                    arm.task,
                    arm.method,
                    _against(_memory(arm), _memory(base) if base else None, arm is base, text.size),
                    _against(seconds, _seconds(base) if base else None, arm is base, text.duration),
                    _against(
                        arm.trainable_parameters,
                        base.trainable_parameters if base else None,
                        arm is base,
                        text.count,
                    ),
                    _against(arm.saved_bytes, base.saved_bytes if base else None, arm is base, text.size),
                )
            )
    note = (
        "Brackets: relative to the task's reference method. Memory: highest of any replicate. Time: mean "
        "of the seconds that a replicate's steps took, without evaluations. 1 GB is 10⁹ bytes."
    )
    columns = columns_of(
        "Task", "Method", "#Peak memory", "#Training time", "#Trainable parameters", "#Saved size"
    )
    return Table("cost", "What each method costs", columns, tuple(rows), note)


def _memory(arm: ArmSummary) -> int | None:
    return arm.cost.peak_memory_bytes if arm.cost else None


def _seconds(arm: ArmSummary) -> float | None:
    each = arm.cost.train_seconds_each if arm.cost else None
    return each.estimate if each else None


def _against(
    value: float | None, base: float | None, is_base: bool, show: Callable[[float | None], str]
) -> str:
    if value is None or not base:
        return show(value)
    return f"{show(value)} ({'reference' if is_base else text.times(value / base)})"


def scores(summary: Summary, task: TaskSummary) -> Table:
    """Test scores of the baselines and of every arm, all metrics."""
    arms = text.arms_of(summary, task.name)
    named = [metric for base in task.baselines.values() for metric in base]
    named += [metric for arm in arms for metric in arm.test]
    counts = {metric for metric in named if metric.endswith("rows")}  # sizes of groups, not scores
    metrics = [task.metric, *sorted(set(named) - {task.metric} - counts)]
    places = {metric: text.metric_decimals(summary, task, metric) for metric in metrics}
    rows: list[tuple[Cell, ...]] = [
        (
            arm.method,
            str(arm.planned) if arm.scored == arm.planned else f"{arm.scored} of {arm.planned}",
            *(text.interval(arm.test.get(m), places[m], reason=_why_no_score(summary, arm)) for m in metrics),
        )
        for arm in arms
    ]
    for name, base in task.baselines.items():
        cells = (text.fixed(base[m], places[m]) if m in base else text.missing("not defined") for m in metrics)
        rows.append((f"{name} (baseline)", text.missing("no seeds"), *cells))
    note = (
        f"Mean over replicates with its 95 % t-interval; Seeds: those that have a valid score, which it is of. "
        f"{task.metric} is the task's metric "
        f"({'higher' if task.higher_is_better else 'lower'} is better)."
    )
    if FROZEN_BASELINE in task.baselines:
        note += " Frozen body: the head alone, at settings that were not searched, once, on the search's rows."
    base = next(iter(task.baselines.values()), {})
    if sizes := {metric: int(base[metric]) for metric in sorted(counts) if metric in base}:
        note += f" Groups of the test split: {text.mapping_text(sizes)}."
    columns = columns_of("Method", "#Seeds", *(f"#{metric}" for metric in metrics))
    return Table(f"scores.{task.name}", f"Test scores on {task.name}", columns, tuple(rows), note)


def _why_no_score(summary: Summary, arm: ArmSummary) -> str:
    if arm.failed == arm.planned:
        return "no valid replicate"
    if arm.search.best is None:
        return "no trial gave a score" if summary.complete else "not trained yet"
    return "not reported"


def replicates(summary: Summary, task: TaskSummary) -> Table:
    """Every replicate of a task: its scores, what moved, how it ended."""
    places = text.metric_decimals(summary, task, task.metric)
    rows = []
    for arm in text.arms_of(summary, task.name):
        for run in arm.replicates:
            outcome: Cell = text.outcome_word(run.outcome)
            if run.void:
                outcome = Badge("warning", "void", run.void)
            elif run.outcome != "done":
                outcome = Badge("warning", text.outcome_word(run.outcome))
            absent = text.missing("void" if run.void else "no score")
            rows.append(
                (
                    run.run_id,
                    text.fixed(run.score, places) if run.score is not None else absent,
                    text.fixed(run.validation_score, places) if run.validation_score is not None else absent,
                    ", ".join(f"{group} {text.percent(change)}" for group, change in run.moved.items())
                    or text.missing("not recorded"),
                    run.weights_sha256[:12] if run.weights_sha256 else text.missing("no weights"),
                    outcome,
                )
            )
    columns = columns_of("Run", f"#{task.metric}, test", "#validation", "Moved", "Weights (SHA-256)", "Outcome")
    note = "Moved: relative change of each group of trained parameters, ‖W − W₀‖ / ‖W₀‖."
    return Table(f"replicates.{task.name}", f"Every replicate on {task.name}", columns, tuple(rows), note)


def optima(summary: Summary, task: TaskSummary) -> Table:
    """The best setting of every searched dimension, with its range and an edge flag."""
    rows: list[tuple[Cell, ...]] = []
    for arm in text.arms_of(summary, task.name):
        best = next((trial for trial in arm.search.trials if trial.run_id == arm.search.best), None)
        for dimension in arm.search.dimensions:
            used = best.settings_used.get(dimension.name) if best else None
            rows.append(
                (
                    arm.method,
                    dimension.name,
                    _searched(dimension),
                    text.setting(dimension.optimum) if best else text.missing("no trial gave a score"),
                    _used(dimension.optimum, used),
                    _edge(dimension),
                )
            )
    note = "Used: the value read back from the optimiser, the schedule or the modules during the best trial."
    if any(row.search_ends for row in summary.ledger):
        note += " There is no tuning curve: halving has stopped most trials before their end."
    elif few := [why for arm in text.arms_of(summary, task.name) if (why := _no_curve(arm))]:
        note += f" A tuning curve needs {text.LEAST_CURVE} trials drawn at random; {text.listed(few)}."
    columns = columns_of("Method", "Setting", "Searched", "#Optimum", "Used", "Edge")
    return Table(f"search.{task.name}", f"Search optimum on {task.name}", columns, tuple(rows), note)


def _no_curve(arm: ArmSummary) -> str | None:
    curve = arm.search.curve
    drawn = len(curve.run_ids) if curve else sum(trial.startup for trial in arm.search.trials)
    if drawn < text.LEAST_CURVE:
        return f"{arm.method} has {drawn}"
    return None if curve else f"{arm.method} has one that failed, which no score can stand for"


def _searched(dimension: DimensionSummary) -> str:
    if dimension.kind == "choice":
        return "one of " + ", ".join(text.setting(choice) for choice in dimension.choices)
    if dimension.kind == "range" and dimension.low is not None and dimension.high is not None:
        scale = ", log" if dimension.log else ""
        return f"{text.significant(dimension.low)} to {text.significant(dimension.high)}{scale}"
    return "fixed"


def _used(asked: Setting | None, used: Setting | None) -> Cell:
    if used is None:
        return text.missing("not read back")
    if asked is None or _same(asked, used):
        return Badge("good", "as asked")
    return Badge("warning", f"used {text.setting(used)}", f"asked {text.setting(asked)}")


def _same(asked: Setting, used: Setting) -> bool:
    if isinstance(asked, str) or isinstance(used, str):
        return str(asked) == str(used)
    return math.isclose(asked, used, rel_tol=1e-6, abs_tol=1e-12)


def _edge(dimension: DimensionSummary) -> Cell:
    if dimension.kind != "range":
        return text.missing("no range")
    if dimension.edge is None:
        return "none" if dimension.optimum is not None else text.missing("no optimum")
    return Badge("warning", f"at the {dimension.edge} end", "the true optimum may lie outside; widen the range")


def trials(summary: Summary, task: TaskSummary) -> Table:
    """Every trial of a task: its settings, score and outcome."""
    places = text.metric_decimals(summary, task, task.metric)
    arms = text.arms_of(summary, task.name)
    names = list(dict.fromkeys(d.name for arm in arms for d in arm.search.dimensions if d.kind != "fixed"))
    rows: list[tuple[Cell, ...]] = []
    for arm in arms:
        for trial in arm.search.trials:
            best = trial.run_id == arm.search.best
            outcome: Cell = "best" if best else text.outcome_word(trial.outcome)
            if trial.outcome != "done":
                outcome = Badge("warning", text.outcome_word(trial.outcome))
            score = text.missing("no score") if trial.score is None else text.fixed(trial.score, places)
            if trial.share < 1 and trial.outcome == "done":
                loss = "" if trial.loss is None else f", loss {trial.loss:.3f}"
                so_far = "stopped" if summary.complete else "so far"
                outcome = f"{'best, ' if best else ''}{so_far} at 1/{round(1 / trial.share)}{loss}"
            shown = (
                text.setting(trial.settings[n]) if n in trial.settings else text.missing("no such setting")
                for n in names
            )
            kind = "start-up" if trial.startup else "guided"
            rows.append((f"{arm.method} trial_{trial.number}", score, kind, *shown, outcome))
    columns = columns_of(
        "Trial", f"#{task.metric}, validation", "Drawn", *(f"#{name}" for name in names), "Outcome"
    )
    halved = any(row.search_ends for row in summary.ledger)
    note = "Until the last end halving compares trials by their loss on validation." if halved else ""
    return Table(f"trials.{task.name}", f"Every trial on {task.name}", columns, tuple(rows), note)
