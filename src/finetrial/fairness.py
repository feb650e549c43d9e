"""The fairness ledger: what every arm was given and used, which rules were broken, what failed.

Pure: run records and summaries in, rows and sentences out. Not for verdicts (`claims.py`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from finetrial import halving
from finetrial.evidence import ENDED_WELL, LEFT_WAITING, Arm, trained
from finetrial.frozen import Setting
from finetrial.records import RunRecord
from finetrial.space import Choice, Dimension, Range
from finetrial.study import Study
from finetrial.summary import (
    FROZEN_BASELINE,
    ArmSummary,
    DimensionSummary,
    FailureRow,
    LedgerRow,
    TaskSummary,
)


def ledger_row(
    study: Study, arm: Arm, task_replicates: Sequence[RunRecord], dimensions: Sequence[DimensionSummary]
) -> LedgerRow:
    """One arm's row. `task_replicates` are those of all the task's arms, to compare their streams."""
    seeds_of: dict[int, set[str]] = {}
    for record in task_replicates:
        seeds_of.setdefault(record.spec.number, set()).add(record.spec.seeds.model_dump_json())
    trials, replicates, searched = arm.trials, arm.replicates, trained(arm.search_runs)
    ends = study.search.ends
    return LedgerRow(
        task=arm.task.name,
        method=arm.method.name,
        trials_planned=study.search.trials,
        trials_done=_count(trials, "done"),
        trials_diverged=_count(trials, "diverged"),
        trials_failed=_failed(trials),
        replicates_planned=study.train.seeds,
        replicates_done=_count(replicates, "done"),
        replicates_diverged=_count(replicates, "diverged"),
        replicates_failed=_failed(replicates),
        attempts=sum(len(record.attempts) for record in (*arm.search_runs, *replicates)),
        warm_start=next((run.spec.warm_start for run in arm.search_runs if run.spec.warm_start), None),
        search_stop=arm.stop,
        search_ends=ends,
        search_counts=tuple(_trained_to(arm.search_runs, rung) for rung in range(1, len(ends) + 1)),
        search_tokens_whole=_tokens_whole(searched) if ends else None,
        search_steps=_trained(searched, "steps"),
        search_tokens=_trained(searched, "tokens"),
        search_flops=_flops(searched),
        train_steps=_trained(replicates, "steps"),
        train_tokens=_trained(replicates, "tokens"),
        train_flops=_flops(replicates),
        train_rows=_rows(replicates, study.train.rows),
        learning_rate_decades=decades(study.spaces[arm.method.name].get("learning_rate")),
        edge_flags=tuple(f"{d.name}: {d.edge}" for d in dimensions if d.edge),
        shared_streams=all(len(seeds_of[record.spec.number]) == 1 for record in replicates),
    )


def failure_rows(records: Sequence[RunRecord]) -> tuple[FailureRow, ...]:
    """Every run that ended and is not done, with its reason; in the order of the records."""
    rows = []
    for record in records:
        if record.outcome in (None, "done"):
            continue
        reason = record.failure.reason if record.failure else None
        if record.result:
            reason = record.result.reason
        rows.append(
            FailureRow(
                run_id=record.spec.run_id,
                arm=record.spec.arm,
                kind=record.outcome,
                reason=reason or "no reason was recorded",
                attempts=len(record.attempts),
            )
        )
    return tuple(rows)


def decades(dimension: Dimension | None) -> float | None:
    """How many powers of ten a searched learning rate spans; None where it is not searched."""
    if isinstance(dimension, Range):
        return math.log10(dimension.high / dimension.low) if dimension.low > 0 else None
    if isinstance(dimension, Choice):
        numbers = [float(c) for c in dimension.choices if isinstance(c, int | float)]
        if len(numbers) == len(dimension.choices) and min(numbers) > 0:
            return math.log10(max(numbers) / min(numbers))
    return None


def fairness_notes(
    study: Study,
    tasks: Sequence[TaskSummary],
    arms: Sequence[ArmSummary],
    ledger: Sequence[LedgerRow],
) -> tuple[str, ...]:
    """Rules that were broken and what a reader should know, one sentence each."""
    notes = _study_notes(study, ledger)
    for task in tasks:
        mine = [arm for arm in arms if arm.task == task.name]
        rows = [row for row in ledger if row.task == task.name]
        notes += _task_notes(task, rows)
        for arm, row in zip(mine, rows, strict=True):
            notes += _arm_notes(task, arm, row)
    return tuple(notes)


def environment(records: Sequence[RunRecord]) -> dict[str, str]:
    """With what the runs were made: versions, machine, device; where they differ, how many had which."""
    return {what: _shares(values) for what, values in _facts(records).items()}


def environment_notes(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """One sentence for everything about machine and versions in which the study's runs differ."""
    return tuple(
        f"runs were not all made with the same {what}: {_shares(values)}; equal settings may then give unequal "
        f"numbers"
        for what, values in _facts(records).items()
        if len(values) > 1
    )


def cost_notes(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """A sentence for every way of running replicates that changes what they cost and that not all had."""
    runs = [
        (record.spec.arm, record.result.training, record.result.cost)
        for record in records
        if record.spec.stage == "replicate" and record.result and record.result.training
    ]
    notes = []
    stacked: dict[str, int] = {}
    for arm, training, _ in runs:
        stacked[arm] = max(stacked.get(arm, 1), training.stacked)
    several = ", ".join(f"{arm} (up to {count})" for arm, count in sorted(stacked.items()) if count > 1)
    if several:
        notes.append(
            f"replicates trained several in a process: {several}; their peak memory is the whole process's and "
            f"their seconds a share of it, which do not compare with those of replicates trained alone"
        )
    twice = [(arm, training.gradient_checkpointing) for arm, training, _ in runs]
    back = [(arm, cost.gives_back) for arm, _, cost in runs]
    for found, what in (
        (twice, "computed activations twice (gradient checkpointing)"),
        (back, "gave large blocks of memory back to the system at once"),
    ):
        with_it = sorted({arm for arm, did in found if did})
        without = sorted({arm for arm, did in found if not did})
        if with_it and without:
            notes.append(
                f"replicates of {', '.join(with_it)} {what} to fit into their memory, those of "
                f"{', '.join(without)} did not: that takes less memory and more time, whatever the method"
            )
    return tuple(notes)


def halving_notes(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """A sentence for every arm whose trials were first compared after few steps."""
    early: dict[str, list[int]] = {}
    for record in records:
        training, rung = record.result.training if record.result else None, record.spec.rung
        if training is None or record.outcome != "done" or rung is None or rung.number > 1:
            continue
        if training.steps < training.planned_steps:
            early.setdefault(record.spec.arm, []).append(training.steps)
    told = {arm: halving.said_of(statistics.fmean(steps)) for arm, steps in early.items()}
    return tuple(f"{arm}: {said}" for arm, said in told.items() if said)


def input_notes(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """One sentence for every task whose runs were not all evaluated on the same inputs."""
    seen: dict[tuple[str, str], dict[str, list[str]]] = {}  # task, split -> hash -> run ids
    for record in records:
        for split, digest in record.result.input_sha256.items() if record.result else ():
            if split != "train":
                seen.setdefault((record.spec.task.name, split), {}).setdefault(digest[:12], []).append(
                    record.spec.run_id
                )
    return tuple(
        f"{task}: runs were not all evaluated on the same {split} inputs: {_shares(hashes)}"
        for (task, split), hashes in seen.items()
        if len(hashes) > 1
    )


def _facts(records: Sequence[RunRecord]) -> dict[str, dict[str, list[str]]]:
    """What -> value -> the ids of the runs that had it."""
    runs: dict[str, dict[str, list[str]]] = {}
    for record in records:
        if record.result:
            facts = {**record.result.environment, "device": record.result.cost.device}
            for what, value in facts.items():
                runs.setdefault(what, {}).setdefault(value, []).append(record.spec.run_id)
    return runs


def _shares(values: Mapping[str, Sequence[str]]) -> str:
    """`2.13.0 (19 runs), 2.14.0 (1 run: replicate.sst2.lora.003-1f2e3d4c)`, the most common first."""
    if len(values) == 1:
        return next(iter(values))
    ordered = sorted(values.items(), key=lambda item: -len(item[1]))
    parts = []
    for value, run_ids in ordered:
        count = f"{len(run_ids)} run{'s' if len(run_ids) > 1 else ''}"
        parts.append(f"{value} ({count}{f': {run_ids[0]}' if len(run_ids) == 1 else ''})")
    return ", ".join(parts)


def _study_notes(study: Study, ledger: Sequence[LedgerRow]) -> list[str]:
    notes = []
    widths = {row.method: row.learning_rate_decades for row in ledger}
    known = [width for width in widths.values() if width is not None]
    if known and (len(known) < len(widths) or max(known) - min(known) > 0.01):
        said = ", ".join(
            f"{name} {f'{width:.3g} decades' if width is not None else 'not searched'}"
            for name, width in widths.items()
        )
        notes.append(f"learning-rate ranges are not equally wide: {said}")
    told = [f"{row.method} by {row.warm_start.method}" for row in ledger if row.warm_start]
    if told:
        notes.append(
            f"searches were told where to begin (search.warm_start), so that they depend on each other: "
            f"{', '.join(dict.fromkeys(told))}"
        )
    if study.search.rows is not None and study.search.rows != study.train.rows:
        full = "all" if study.train.rows is None else f"{study.train.rows:,}"
        notes.append(
            f"trials trained on {study.search.rows:,} rows and replicates on {full}; the best "
            f"settings may differ between the two"
        )
    return notes


def _task_notes(task: TaskSummary, rows: Sequence[LedgerRow]) -> list[str]:
    notes = []
    lengths = {row.method: row.search_stop.after if row.search_stop else row.trials_planned for row in rows}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} after {count}" for name, count in lengths.items())
        notes.append(f"{task.name}: early_stop ended searches at different lengths, in trials: {said}")
    for what, counts, planned in (
        ("trials", {row.method: row.trials_done for row in rows}, rows[0].trials_planned),
        (
            "replicates",
            {row.method: row.replicates_done for row in rows},
            rows[0].replicates_planned,
        ),
    ):
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{name} {count}" for name, count in counts.items())
            notes.append(f"{task.name}: unequal numbers of {what} done, of {planned} each: {said}")
    if not all(row.shared_streams for row in rows):
        notes.append(
            f"{task.name}: replicates of the same number did not share their random streams, so "
            f"pairing removes less noise than it should"
        )
    for control in task.controls:
        drifted = [abs(value) for value in control.drift if value != 0]
        if drifted:
            what = (
                "the base measured against itself" if control.name == "base against base" else "a frozen body"
            )
            notes.append(
                f"{task.name}: {what} drifts by up to {max(drifted):.2g} instead of 0; differences of that "
                f"size are numeric noise"
            )
    return notes


def _arm_notes(task: TaskSummary, arm: ArmSummary, row: LedgerRow) -> list[str]:
    name = f"{arm.task}/{arm.method}"
    notes = [
        f"{name}: the best {d.name}, {float(d.optimum):.3g}, lies within 5 % of the {d.edge} end "
        f"of its range ({d.low:.3g} to {d.high:.3g}); widen the range and search again"
        for d in arm.search.dimensions
        if d.edge and d.low is not None and d.high is not None and d.optimum is not None
    ]
    if arm.search.best_score is not None and arm.search.best_score == task.best_possible:
        notes.append(
            f"{name}: the best trial reaches the best possible {task.metric} ({task.best_possible:g}); a "
            f"saturated metric cannot tell settings or methods apart"
        )
    best = next((trial for trial in arm.search.trials if trial.run_id == arm.search.best), None)
    if best is not None and best.share < 1 and arm.replicates:
        notes.append(
            f"{name}: no trial at full length gave a score; the best is one that was stopped at "
            f"1/{round(1 / best.share)} and is compared by its loss"
        )
    unmoved = sum(trial.outcome == "done" and trial.score is None for trial in arm.search.trials)
    if unmoved:
        notes.append(
            f"{name}: {unmoved} of its trials are void (nothing moved that should have) and have no score"
        )
    notes += _learnt_nothing(task, arm, name)
    for what, points in (("trials", arm.search.trials), ("replicates", arm.replicates)):
        ignored = {
            key
            for point in points
            for key in set(point.settings) & set(point.settings_used)
            if not _same(point.settings[key], point.settings_used[key])
        }
        if ignored:
            notes.append(f"{name}: {what} did not use the {', '.join(sorted(ignored))} that they were given")
    void = [f"{point.number} ({point.void})" for point in arm.replicates if point.void]
    if void:
        notes.append(f"{name}: void replicates: {', '.join(void)}")
    lost = row.replicates_diverged + row.replicates_failed
    if lost:
        rest = "; means are over the rest" if arm.test else ""
        notes.append(
            f"{name}: {lost} of {row.replicates_planned} replicates gave no score "
            f"({row.replicates_diverged} diverged, {row.replicates_failed} failed){rest}"
        )
    return notes


def _learnt_nothing(task: TaskSummary, arm: ArmSummary, name: str) -> list[str]:
    """A sentence where the arm's mean is not told to be better than the best answer without training."""
    known = task.best_baseline(FROZEN_BASELINE)
    mean, sign = arm.test.get(task.metric), 1 if task.higher_is_better else -1
    if mean is None or mean.low is None or mean.high is None or not known:
        return []
    base, best = known
    worst_end, best_end = (mean.low, mean.high) if task.higher_is_better else (mean.high, mean.low)
    if sign * worst_end > sign * best:
        return []
    stands = "is worse than" if sign * best_end < sign * best else "is not told from"
    return [
        f"{name}: its mean {task.metric} on test, {mean.estimate:.4g} ({mean.low:.4g} to {mean.high:.4g}), "
        f"{stands} the best answer without training ({base}, {best:.4g}): it may have learnt nothing of "
        f"the task"
    ]


def _same(wanted: Setting, used: Setting) -> bool:
    if isinstance(wanted, int | float) and isinstance(used, int | float):
        return math.isclose(wanted, used, rel_tol=1e-6, abs_tol=1e-12)
    return wanted == used


def _count(records: Sequence[RunRecord], outcome: str) -> int:
    return sum(record.outcome == outcome for record in records)


def _failed(records: Sequence[RunRecord]) -> int:
    return sum(record.outcome not in (*ENDED_WELL, *LEFT_WAITING) for record in records)


def _trained(records: Sequence[RunRecord], field: str) -> int:
    trainings = [record.result.training for record in records if record.result]
    return sum(getattr(training, field) for training in trainings if training)


def _trained_to(runs: Sequence[RunRecord], rung: int) -> int:
    """How many trials have a result at one end."""
    return sum(
        run.outcome == "done" and run.spec.rung is not None and run.spec.rung.number == rung for run in runs
    )


def _tokens_whole(searched: Sequence[RunRecord]) -> int:
    """The tokens of the same trials had none been stopped by halving; one that diverged ends where it did."""
    whole = 0.0
    for record in searched:
        training = record.result.training if record.result else None
        if training is None:
            continue
        stopped = record.spec.may_go_on and record.outcome == "done" and not training.stopped_early
        whole += training.tokens * (training.planned_steps / training.steps if stopped else 1.0)
    return round(whole)


def _flops(records: Sequence[RunRecord]) -> float:
    return math.fsum(record.result.cost.flops for record in records if record.result)


def _rows(replicates: Sequence[RunRecord], planned: int | None) -> int | None:
    """Training rows of a replicate as counted in its run, or as planned (None: all)."""
    for record in replicates:
        if record.result and record.result.training:
            return record.result.training.rows
    return planned
