"""A study as the exact list of runs: pure functions from a study to run specs.

Nothing is read, written or started here. What a trial's settings are is `search.py`'s; which trial comes
next is `arm_search.py`'s, and which phase `pipeline.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from finetrial.frozen import Setting, stream_seed
from finetrial.records import How, LoopRules, MethodSpec, Rung, RunSpec, Seeds, Stage, TaskSpec, WarmStart
from finetrial.space import largest, middle, smallest
from finetrial.study import MIN_PAIRS, Study

FROZEN_BODY = "frozen-body"
# A head of a few thousand weights on fixed features; not searched, for it is no arm.
FROZEN_BODY_SETTINGS: dict[str, Setting] = {
    "learning_rate": 1e-2, "epochs": 3, "warmup_ratio": 0.1, "weight_decay": 0.0,
}  # fmt: skip

Inputs = Mapping[str, Mapping[str, str]]  # task name -> input name -> SHA-256


class PlannedArm(NamedTuple):
    """How many runs an arm has in each phase."""

    task: str
    method: str
    trials: int  # with halving a run for every end that a trial gets to, at most
    replicates: int
    probes: int


def overview(study: Study) -> list[PlannedArm]:
    """The runs of every arm; each task has its baselines and a control probe besides."""
    probes = study.train.seeds if study.measure else 0
    return [
        PlannedArm(task.name, method.name, sum(study.search.counts), study.train.seeds, probes)
        for task, method in study.arms
    ]


def warnings(study: Study) -> list[str]:
    """What the study as it is planned cannot say, however its runs end."""
    if study.claims and study.train.seeds < MIN_PAIRS:
        seeds = "1 seed" if study.train.seeds == 1 else f"{study.train.seeds} seeds"
        return [
            f"with {seeds} the report describes and gives no verdict: train.seeds of at least {MIN_PAIRS} do, "
            f"better 5 or 10, and may be raised later"
        ]
    return []


def baseline_arms(study: Study) -> list[str]:
    """As what the runs of the baseline stage are counted: each task itself, and its frozen body."""
    return [f"{task.name}{of}" for of in ("", f"/{FROZEN_BODY}") for task in study.tasks]


def seeds(study: Study, stage: str, task: str, number: int) -> Seeds:
    """The random streams of one run: the same for every method, separate from each other.

    All trials share the streams of number 0, so that settings and not luck tell them apart; final
    replicates use streams that no trial has seen.
    """
    phase, number = ("search", 0) if stage == "trial" else ("train", number)
    key = (study.search.seed, phase, task, number)
    return Seeds(
        data_order=stream_seed(*key, "data order"),
        head=stream_seed(*key, "head"),
        adapter=stream_seed(*key, "adapter"),
        dropout=stream_seed(*key, "dropout"),
    )


def how(study: Study, threads: int) -> How:
    """Where and how the study's runs are executed, which changes none of them."""
    run = study.run
    return How(
        base=study.base,
        threads=threads,
        limit_seconds=run.limit_seconds,
        checkpoint_seconds=run.checkpoint_seconds,
        checkpoint_steps=run.checkpoint_steps,
        micro_batch=run.micro_batch,
        memory_bytes=run.memory_bytes,
        gradient_checkpointing=run.gradient_checkpointing,
        parallel=1 if run.parallel == "auto" else run.parallel,
        packed=run.parallel == "auto",
        log_steps=run.log_steps,
    )


def _rules(study: Study) -> LoopRules:
    return LoopRules.model_validate(study.train.model_dump(exclude={"seeds", "rows"}))


def _spec(
    study: Study, stage: Stage, task: TaskSpec, inputs: Inputs, threads: int, number: int = 0, **more: Any
) -> RunSpec:  # fmt: skip
    """What every run of a study is made of, and `more`."""
    more.setdefault("seeds", seeds(study, stage, task.name, number))
    return RunSpec(
        study=study.study, stage=stage, task=task, number=number, model=study.model, rules=_rules(study),
        inputs=dict(inputs[task.name]), how=how(study, threads), **more,
    )  # fmt: skip


def baseline(study: Study, task: TaskSpec, inputs: Inputs, threads: int) -> RunSpec:
    """The task's trivial baselines and the untrained model, scored on test."""
    return _spec(study, "baseline", task, inputs, threads)


def trial(
    study: Study, task: TaskSpec, method: MethodSpec, number: int, settings: Mapping[str, Setting],
    inputs: Inputs, threads: int, warm_start: WarmStart | None = None,
) -> RunSpec:  # fmt: skip
    """Phase 1: train with proposed settings on `search.rows` (to the first end), score on validation."""
    ends = study.search.ends
    return _spec(
        study, "trial", task, inputs, threads, number, method=method, settings=dict(settings),
        rows=study.search.rows, rung=Rung(ends=ends[:1]) if ends else None, warm_start=warm_start,
    )  # fmt: skip


def further(study: Study, before: RunSpec, threads: int) -> RunSpec:
    """The same trial to the next end, going on from where its run `before` has left it."""
    assert before.rung is not None
    rung = Rung(ends=study.search.ends[: before.rung.number + 1], after=before.run_id)
    return before.model_copy(update={"rung": rung, "how": how(study, threads)})


def replicate(
    study: Study, task: TaskSpec, method: MethodSpec, number: int, settings: Mapping[str, Setting],
    inputs: Inputs, threads: int,
) -> RunSpec:  # fmt: skip
    """Phase 2: train with the arm's optimum on `train.rows`, score once on test, keep the model."""
    return _spec(
        study, "replicate", task, inputs, threads, number, method=method, settings=dict(settings),
        rows=study.train.rows,
    )  # fmt: skip


def probe(study: Study, subject: RunSpec, reference: RunSpec | None) -> RunSpec:
    """Phase 3: measure one replicate against the base, and against its neighbour for seed-to-seed drift."""
    return subject.model_copy(
        update={
            "stage": "probe",
            "measures": study.measure,
            "subject": subject.run_id,
            "reference": reference.run_id if reference else None,
        }
    )


def control(baseline_spec: RunSpec, study: Study) -> RunSpec:
    """Phase 3's negative control: the base model measured against itself in a second pass."""
    return baseline_spec.model_copy(update={"stage": "probe", "measures": study.measure})


def rehearsal(study: Study, task: TaskSpec, method: MethodSpec, inputs: Inputs, threads: int) -> RunSpec:
    """Part of `finetrial check`: an arm with the largest settings of its space, as a trial would be."""
    space = study.spaces[method.name]
    rate, sizes = space["learning_rate"], space["batch_size"]
    params = {
        "search_rows": study.search.rows,
        "batch_sizes": sorted({int(smallest(sizes)), int(largest(sizes))}),
        "learning_rates": list(dict.fromkeys(float(value(rate)) for value in (middle, largest, smallest))),
        "measure": dict(study.measure),
    }
    settings = {name: largest(space[name]) for name in space} | {"learning_rate": middle(rate)}
    return _spec(
        study, "check", task, inputs, threads, method=method, settings=settings, rows=study.train.rows,
        measures={"rehearsal": {"use": "rehearsal", "params": params}},
    )  # fmt: skip


def frozen_body(study: Study, task: TaskSpec, inputs: Inputs, threads: int) -> RunSpec:
    """What the head alone learns on `search.rows`, scored on test. Measured, too: the body has not moved."""
    sizes = study.spaces[study.methods[0].name]["batch_size"]
    settings = FROZEN_BODY_SETTINGS | {"batch_size": smallest(sizes)}
    return _spec(
        study, "baseline", task, inputs, threads, settings=settings, rows=study.search.rows,
        method=MethodSpec(name=FROZEN_BODY, use="frozen", params={}), measures=study.measure,
        seeds=seeds(study, "trial", task.name, 0),
    )  # fmt: skip
