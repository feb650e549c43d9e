"""From run records to the summary: effects, intervals, drift, cost, the ledger, the verdicts.

Pure: the study and its planned runs in, `summary.Summary` out; no files and no torch. Which runs count is
`evidence.py`'s, verdict rules are `claims.py`'s, the ledger `fairness.py`'s, the numbers `stats.py`'s. A
replicate without a valid score is counted and named, never averaged over and never taken as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from finetrial import claims, descriptions, measures
from finetrial.evidence import (
    LEFT_WAITING,
    Arm,
    arm_of,
    best_trial,
    run_of_task,
    searched,
    trained,
    trial_score,
    void_reason,
    why_not_measured,
)
from finetrial.fairness import (
    cost_notes,
    environment,
    environment_notes,
    failure_rows,
    fairness_notes,
    halving_notes,
    input_notes,
    ledger_row,
)
from finetrial.measures import interval
from finetrial.plugins import Metric, metric_of
from finetrial.records import RunRecord, SearchStop, TaskSpec
from finetrial.search import BAD, random_draw
from finetrial.space import Choice, Fixed, Range, Space, edge_of
from finetrial.study import Claim, Study
from finetrial.summary import (
    FROZEN_BASELINE,
    UNTRAINED,
    ArmCost,
    ArmSummary,
    ClaimResult,
    DimensionSummary,
    Meta,
    ReplicatePoint,
    SearchSummary,
    Summary,
    TaskSummary,
    TrialPoint,
    Unit,
)


def summarise(
    study: Study,
    records: Sequence[RunRecord],
    meta: Meta,
    *,
    model_sha256: str | None = None,
    tests: Mapping[str, Mapping[str, float]] | None = None,
    stops: Mapping[str, SearchStop] | None = None,
    notes: Sequence[str] = (),
) -> Summary:
    """Every number of the report.

    Args:
        study: what was asked.
        records: the planned runs that have begun, in any order, and no others; the control probe, the base
            measured against itself, is the probe without a method.
        meta: where and when; copied.
        model_sha256: hash of the base model's weights.
        tests: run id of a replicate -> example id -> the task's metric on that test example alone; of
            replicates that are not in it nothing is said by example.
        stops: task/method -> why that arm's search was ended early.
        notes: on how the study came about, to stand with those on its fairness.

    Equal studies give equal summaries apart from `cost`, `meta` and what was attempted again or failed.

    Raises:
        PluginError: a task's plug-in does not load.
    """
    ordered = sorted(records, key=lambda r: (r.spec.stage, r.spec.arm, r.spec.number))
    metrics = {task.name: metric_of(task) for task in study.tasks}
    arms = [
        arm_of(
            t,
            m,
            metrics[t.name],
            ordered,
            study.train.seeds,
            study.search,
            (stops or {}).get(f"{t.name}/{m.name}"),
        )
        for t, m in study.arms
    ]
    tasks = tuple(_task(task, metrics[task.name], ordered) for task in study.tasks)
    summaries = tuple(_arm_summary(study, arm) for arm in arms)
    ledger = tuple(
        ledger_row(
            study,
            arm,
            [r for other in arms if other.task.name == arm.task.name for r in other.replicates],
            summary.search.dimensions,
        )
        for arm, summary in zip(arms, summaries, strict=True)
    )
    return Summary(
        study=study.study,
        study_hash=study.identity(),
        model=study.model.name,
        model_revision=study.model.revision,
        model_gguf_file=study.model.gguf_file,
        model_changes=study.model.config,
        model_sha256=model_sha256,
        complete=_complete(study, arms, ordered),
        tasks=tasks,
        arms=summaries,
        claims=_claims(study, arms, tasks, tests or {}),
        across=descriptions.across_tasks(arms, _reference(study)),
        ledger=ledger,
        fairness_notes=(
            *notes,
            *fairness_notes(study, tasks, summaries, ledger),
            *input_notes(ordered),
            *environment_notes(ordered),
            *cost_notes(ordered),
            *halving_notes(ordered),
        ),
        failures=failure_rows(ordered),
        environment=environment(ordered),
        meta=meta,
    )


def _complete(study: Study, arms: Sequence[Arm], ordered: Sequence[RunRecord]) -> bool:
    """Whether every run of the study has ended for good. An arm without an optimum stops there."""
    if any(record.outcome in LEFT_WAITING for record in ordered):
        return False
    stages = ["baseline", "probe"] if study.measure else ["baseline"]
    if any(run_of_task(ordered, t.name, stage) is None for t in study.tasks for stage in stages):
        return False
    if any(run_of_task(ordered, t.name, "baseline", trained=True) is None for t in study.tasks):
        return False
    return all(
        searched(arm, study.search)
        and (best_trial(arm.trials, arm.metric) is None or len(arm.replicates) == study.train.seeds)
        and (not study.measure or all(r.spec.number in arm.probes for r in arm.valid))
        for arm in arms
    )


# ---- tasks and arms ------------------------------------------------------------------------------------


def _task(task: TaskSpec, metric: Metric, ordered: Sequence[RunRecord]) -> TaskSummary:
    run = run_of_task(ordered, task.name, "baseline")
    result = run.result if run else None
    baselines: dict[str, dict[str, float]] = {}
    if result:
        baselines |= result.measures.get("baselines", {})
        if "test" in result.scores:
            baselines[UNTRAINED] = result.scores["test"]
    frozen = run_of_task(ordered, task.name, "baseline", trained=True)
    if frozen and frozen.result and void_reason(frozen) is None and "test" in frozen.result.scores:
        baselines[FROZEN_BASELINE] = frozen.result.scores["test"]
    return TaskSummary(
        name=task.name,
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        best_possible=metric.best if math.isfinite(metric.best) else None,
        split_rows=result.split_rows if result else {},
        input_sha256=_inputs(task, ordered, result.input_sha256 if result else {}),
        baselines=baselines,
        baseline_run=run.spec.run_id if run and result else None,
        controls=tuple(measures.controls(run_of_task(ordered, task.name, "probe"), frozen)),
    )


def _inputs(task: TaskSpec, ordered: Sequence[RunRecord], scored: dict[str, str]) -> dict[str, str]:
    """Hashes of what was evaluated, and of what the first replicate with a result was trained on."""
    replicates = (r for r in ordered if r.spec.stage == "replicate" and r.spec.task.name == task.name)
    trained = next((r.result.input_sha256 for r in replicates if r.result), {})
    return {**{split: sha256 for split, sha256 in trained.items() if split == "train"}, **scored}


def _arm_summary(study: Study, arm: Arm) -> ArmSummary:
    tests = [r.result.scores["test"] for r in arm.valid if r.result]
    shared = [name for name in (tests[0] if tests else {}) if all(name in test for test in tests)]
    ended = [r for r in arm.replicates if r.outcome not in LEFT_WAITING]
    costs = [r.result.cost for r in arm.replicates if r.result and r.outcome == "done"]
    return ArmSummary(
        task=arm.task.name,
        method=arm.method.name,
        search=_search(study, arm),
        replicates=tuple(_replicate(r, arm) for r in arm.replicates if r.outcome),
        test={name: interval([test[name] for test in tests]) for name in sorted(shared)},
        failed=sum(r.spec.number in arm.invalid for r in ended),
        planned=study.train.seeds,
        drift=measures.drift(arm),
        spectrum=measures.spectrum(arm),
        forgetting=measures.forgetting(arm),
        own_measures=measures.own(arm),
        trainable_parameters=costs[0].trainable_parameters if costs else None,
        total_parameters=costs[0].total_parameters if costs else None,
        saved_bytes=costs[0].saved_bytes if costs else None,
        cost=_cost(arm),
    )


def _search(study: Study, arm: Arm) -> SearchSummary:
    best = best_trial(arm.trials, arm.metric)
    drawn = _drawn(study, arm)
    at_random = {r.spec.number for r in drawn}
    ended = [r for r in drawn if r.outcome == "done" or r.outcome in BAD]  # no others tell of their settings
    points = [
        TrialPoint(
            run_id=r.spec.run_id,
            number=r.spec.number,
            outcome=r.outcome,
            score=trial_score(r),
            settings=r.spec.settings,
            settings_used=r.result.settings_used if r.result else {},
            startup=r.spec.number in at_random,
            share=1 / r.spec.rung.ends[-1] if r.spec.rung else 1.0,
            loss=r.result.validation_loss if r.result else None,
        )
        for r in arm.trials
        if r.outcome
    ]
    return SearchSummary(
        trials=tuple(points),
        # Of what was stopped nobody knows the score that it would have had.
        curve=None if study.search.ends else descriptions.tuning_curve(ended, arm.metric),
        best=best.spec.run_id if best else None,
        best_score=trial_score(best) if best else None,
        dimensions=_dimensions(study.spaces[arm.method.name], best),
        rows=study.search.rows,
    )


def _drawn(study: Study, arm: Arm) -> list[RunRecord]:
    """The arm's trials that were drawn at random. The number alone does not tell: with more trials than before
    the start-up is longer, and trials that TPE has guided fall into it."""
    rules, space = study.search, study.spaces[arm.method.name]
    count = rules.trials if rules.sampler == "random" else rules.startup_trials
    return [
        r
        for r in arm.trials
        if r.spec.number < count
        and r.spec.settings == random_draw(space, number=r.spec.number, seed=rules.seed)
    ]


def _dimensions(space: Space, best: RunRecord | None) -> tuple[DimensionSummary, ...]:
    found = []
    for name, dimension in space.items():
        optimum = best.spec.settings.get(name) if best else None
        edge = edge_of(name, dimension, optimum) if optimum is not None else None
        match dimension:
            case Range():
                shape: dict[str, Any] = {
                    "low": dimension.low, "high": dimension.high, "log": dimension.log,
                }  # fmt: skip
            case Choice():
                shape = {"choices": dimension.choices}
            case Fixed():
                shape = {"choices": (dimension.value,)}
        found.append(DimensionSummary(name=name, kind=dimension.kind, optimum=optimum, edge=edge, **shape))
    return tuple(found)


def _replicate(record: RunRecord, arm: Arm) -> ReplicatePoint:
    result = record.result
    test = result.scores.get("test", {}) if result else {}
    assert record.outcome is not None
    return ReplicatePoint(
        run_id=record.spec.run_id,
        number=record.spec.number,
        outcome=record.outcome,
        settings=record.spec.settings,
        settings_used=result.settings_used if result else {},
        void=_void(record, arm),
        score=test.get(arm.metric.name),
        validation_score=result.score if result else None,
        test=test,
        weights_sha256=result.weights_sha256 if result else None,
        moved={
            name: group.relative_change
            for name, group in (result.proof.groups.items() if result and result.proof else ())
            if group.relative_change is not None
        },
    )


def _void(record: RunRecord, arm: Arm) -> str | None:
    """Why a replicate that is done does not count."""
    reason = arm.invalid.get(record.spec.number) if record.outcome == "done" else None
    return reason.removeprefix("void, ") if reason else None


def _cost(arm: Arm) -> ArmCost | None:
    """Measured cost of the runs that have a result, None while none has; of one replicate if one is done."""
    search = [r.result.cost for r in trained(arm.search_runs) if r.result]
    train = [r.result.cost for r in arm.replicates if r.result]
    whole = [r.result.cost for r in arm.replicates if r.result and r.outcome == "done"]
    every = [*search, *train]
    if not every:
        return None
    return ArmCost(
        search_seconds=math.fsum(c.wall_seconds for c in search),
        train_seconds=math.fsum(c.wall_seconds for c in train),
        train_seconds_each=interval([c.train_seconds for c in whole]) if whole else None,
        peak_memory_bytes=max((c.peak_memory_bytes for c in whole), default=None),
        cpu_seconds=math.fsum(c.cpu_seconds for c in every),
        device=", ".join(sorted({c.device for c in whole or every})),
    )


# ---- claims --------------------------------------------------------------------------------------------


def _claims(
    study: Study,
    arms: Sequence[Arm],
    tasks: Sequence[TaskSummary],
    tests: Mapping[str, Mapping[str, float]],
) -> tuple[ClaimResult, ...]:
    by_name = {(arm.task.name, arm.method.name): arm for arm in arms}
    cases = [
        claims.Case(
            claim=claim,
            task=task.name,
            method=_side(by_name[task.name, claim.method], claim),
            reference=_side(by_name[task.name, claim.reference], claim),
            higher_is_better=task.higher_is_better,
            # That needs no model: so not the untrained one's score, nor the head's.
            trivial=task.best_baseline(UNTRAINED, FROZEN_BASELINE),
            noise=_noise(task, claim),
            unit=_unit(by_name[task.name, claim.reference], claim),
        )
        for claim in study.claims
        for task in tasks
    ]
    judged = zip(cases, claims.judge(cases), strict=True)
    return tuple(descriptions.described(case, claim, tests, by_name) for case, claim in judged)


def _reference(study: Study) -> str:
    """The method that all others are put beside: the first claim's reference, else the first."""
    return study.claims[0].reference if study.claims else study.methods[0].name


def _noise(task: TaskSummary, claim: Claim) -> float | None:
    """The largest value of a model whose body is the base's."""
    drifts = claim.kind == "drifts_less"
    found = [control.drift if drifts else control.forgotten.values() for control in task.controls]
    return max((abs(value) for values in found for value in values), default=None)


def _unit(arm: Arm, claim: Claim) -> Unit:
    if claim.kind == "within":
        return "score"
    if claim.kind == "drifts_less":
        return "share"
    found = measures.forgetting(arm)
    return "nats" if found and found.judged_by == "text" else "points"


def _side(arm: Arm, claim: Claim) -> claims.Side:
    absent, valid = dict(arm.invalid), [record.spec.number for record in arm.valid]
    if claim.kind == "within":
        scored = [(record.spec, record.result.scores["test"]) for record in arm.valid if record.result]
        found = {spec.number: (spec.run_id, scores[arm.metric.name]) for spec, scores in scored}
    elif claim.kind == "drifts_less":
        found = measures.drift_per_replicate(arm)
        absent |= {n: why_not_measured(arm, n, "drift") for n in valid if n not in found}
    else:
        found = measures.forgetting_per_replicate(arm)
        absent |= {n: why_not_measured(arm, n, "forgetting") for n in valid if n not in found}
    return claims.Side(
        name=arm.method.name,
        values={number: value for number, (_, value) in found.items()},
        run_ids={number: (run_id,) for number, (run_id, _) in found.items()},
        absent=absent,
    )
