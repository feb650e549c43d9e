"""Run records as a study leaves them, without a study: builders for tests of the analysis.

`toy_tasks` has to be imported as a fixture: it stands in for the task's plug-in.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from finetrial.frozen import Frozen
from finetrial.plugins import Metric
from finetrial.records import (
    Attempt,
    Cost,
    Failure,
    GroupProof,
    MethodSpec,
    ModelSource,
    Proof,
    Result,
    RunRecord,
    RunSpec,
    Seeds,
    TaskSpec,
    Training,
)
from finetrial.search import random_draw
from finetrial.space import COMMON_SPACE, Choice, Range
from finetrial.study import Claim, RunRules, SearchRules, Study, TrainRules
from finetrial.summary import Meta

LORA = [0.80, 0.81, 0.79, 0.805, 0.795]
FULL = [0.81, 0.80, 0.805, 0.815, 0.80]
LORA_DRIFT = [0.10, 0.11, 0.09, 0.105, 0.095]
FULL_DRIFT = [0.15, 0.16, 0.14, 0.155, 0.145]

WITHIN = Claim(text="lora within 3% of full", kind="within", method="lora", reference="full", margin=0.03)
LESS = Claim(
    text="lora drifts 20% less than full",
    kind="drifts_less",
    method="lora",
    reference="full",
    margin=0.2,
)
TASK = TaskSpec(name="toy", use="toy_tasks:TOY", params={})
METHODS = {name: MethodSpec(name=name, use=name, params={}) for name in ("full", "lora")}
META = Meta(
    finetrial_version="0",
    created_at="now",
    home="h",
    wall_seconds=1.0,
    environment={},
    run_rules={},
)


class ToyParams(Frozen):
    metric: str = "f1"


def toy_task(higher_is_better=True):
    return SimpleNamespace(
        Params=ToyParams,
        metric=Metric(
            "f1",
            higher_is_better,
            0.0 if higher_is_better else 9.0,
            1.0 if higher_is_better else 0.0,
        ),
        head=None,
        files=lambda params, base: [],
        splits=lambda params, base: None,
    )


@pytest.fixture(autouse=True)
def toy_tasks(monkeypatch):
    module = ModuleType("toy_tasks")
    module.TOY = toy_task()
    module.LOSS = toy_task(higher_is_better=False)
    module.CHOSEN = SimpleNamespace(
        **vars(toy_task()), metric_for=lambda params: Metric(params.metric, True, 0.0, 1.0)
    )
    monkeypatch.setitem(sys.modules, "toy_tasks", module)


def study(
    claims_=(WITHIN, LESS),
    *,
    trials=3,
    seeds=5,
    spaces=None,
    tasks=(TASK,),
    measure=("drift",),
    **search,
):
    space = {"learning_rate": Range(low=5e-7, high=5e-5, log=True), **COMMON_SPACE}
    lora = {
        **space,
        "learning_rate": Range(low=5e-5, high=5e-3, log=True),
        "rank": Choice(choices=(4, 8)),
    }
    return Study(
        study="s",
        model=ModelSource(name="m"),
        tasks=tuple(tasks),
        methods=tuple(METHODS.values()),
        spaces=spaces or {"full": space, "lora": lora},
        search=SearchRules(trials=trials, **search),
        train=TrainRules(seeds=seeds),
        measure={name: {} for name in measure},
        claims=tuple(claims_),
        run=RunRules(),
        track=(),
        file="f",
        base=".",
    )


def cost(seconds=1.0):
    return Cost(
        wall_seconds=seconds,
        train_seconds=seconds / 2,
        cpu_seconds=seconds,
        peak_memory_bytes=10,
        device="cpu",
        flops=100.0,
        trainable_parameters=7,
        total_parameters=70,
        saved_bytes=28,
    )


TRAINED = Training(
    steps=10,
    planned_steps=10,
    epochs=1.0,
    rows=40,
    examples=40,
    tokens=400,
    padded_tokens=500,
    best_step=10,
    stopped_early=False,
    first_loss=1.0,
    last_loss=0.5,
)


def proof(void=None):
    return Proof(
        groups={"body": GroupProof(tensors=2, moved=2, relative_change=0.1, change_norm=1.0)},
        largest={},
        void=void,
    )


def spec(stage, number, method=None, task=TASK, **more):
    stream = 1000 + number
    return RunSpec(
        study="s",
        stage=stage,
        task=task,
        method=METHODS[method] if method else None,
        number=number,
        model=ModelSource(name="m"),
        seeds=Seeds(data_order=stream, head=stream, adapter=stream, dropout=stream),
        **more,
    )


def ended(spec_, *, attempts=1, **fields):
    fields = {"outcome": "done", "cost": cost(), "training": TRAINED, **fields}
    return RunRecord(
        spec_,
        Result(run_id=spec_.run_id, **fields),
        None,
        tuple(Attempt(number=i + 1, host="h", pid=1, started_at=0.0) for i in range(attempts)),
    )


def failed(spec_, kind="crashed", reason="signal 9", attempts=3):
    record = ended(spec_, attempts=attempts)
    return RunRecord(
        spec_,
        None,
        Failure(run_id=spec_.run_id, kind=kind, reason=reason, attempt=attempts, final=True),
        record.attempts,
    )


def drift_json(drift, neighbour=None):
    layers = [
        {
            "layer": i,
            "cka": value,
            "cosine": value,
            "cka_biased": value,
            "cosine_raw": value,
            "relative_change": 0.0,
        }
        for i, value in enumerate([1.0, 1 - drift, 1 - drift])
    ]
    return {
        "layers": layers,
        "cka_drift_mean": drift,
        "cosine_drift_mean": drift,
        "rows": 8,
        "input_sha256": "x",
        "neighbour": None if neighbour is None else drift_json(neighbour),
    }


def control(drift=0.0, task=TASK):
    return ended(spec("probe", 0, task=task), measures={"drift": drift_json(drift)})


def baseline(trivial=0.5, task=TASK):
    return ended(
        spec("baseline", 0, task=task),
        scores={"test": {"f1": 0.1}},
        split_rows={"train": 40, "validation": 8, "test": 9},
        measures={"baselines": {"majority": {"f1": trivial}, "no_answer": {"f1": trivial - 0.1}}},
    )


def frozen_body(score=0.55, drift=0.0, task=TASK, **fields):
    method = MethodSpec(name="frozen-body", use="frozen", params={})
    made = spec("baseline", 0, task=task).model_copy(update={"method": method})
    fields = {"proof": proof(), "scores": {"test": {"f1": score}}, **fields}
    return ended(made, measures={"drift": drift_json(drift)}, **fields)


def trial(method, number, score, rate, task=TASK, **fields):
    settings = {"learning_rate": rate, "batch_size": 16}
    return ended(
        spec("trial", number, method, task, settings=settings),
        score=score,
        **{"settings_used": settings, **fields},
    )


def drawn(method, number):
    """The settings of a trial that is drawn at random."""
    return random_draw(study().spaces[method], number=number, seed=0)


def trials(method, scores=(0.6, 0.7, 0.65), task=TASK):
    """The first drawn at random, the others guided to one place."""
    rate = {"full": 5e-6, "lora": 5e-4}[method]
    first = ended(
        spec("trial", 0, method, task, settings=drawn(method, 0)),
        score=scores[0], settings_used=drawn(method, 0),
    )  # fmt: skip
    return [first, *(trial(method, n, score, rate, task) for n, score in enumerate(scores) if n)]


def replicate(method, number, score, task=TASK, **fields):
    fields = {
        "proof": proof(),
        "scores": {"test": {"f1": score, "em": score / 2}},
        "score": score,
        **fields,
    }
    return ended(spec("replicate", number, method, task), **fields)


def probe(method, number, drift, task=TASK, neighbour=0.01):
    """Of the first replicate no neighbour is measured."""
    subject = spec("replicate", number, method, task).run_id
    before = spec("replicate", number - 1, method, task).run_id if number else None
    return ended(
        spec("probe", number, method, task, subject=subject, reference=before),
        measures={"drift": drift_json(drift, neighbour if before else None)},
    )


def records(lora=LORA, full=FULL, lora_drift=LORA_DRIFT, full_drift=FULL_DRIFT, **more):
    task = more.get("task", TASK)
    found = [baseline(more.get("trivial", 0.5), task), control(more.get("noise", 0.0), task)]
    found.append(frozen_body(task=task))
    for method, scores, drifts in (("lora", lora, lora_drift), ("full", full, full_drift)):
        found += trials(method, task=task)
        found += [replicate(method, n, score, task) for n, score in enumerate(scores)]
        found += [probe(method, n, drift, task) for n, drift in enumerate(drifts)]
    return found


def replaced(found, *news):
    """The records with those of the same stage, arm and number as `news` taken out for them."""
    key = lambda r: (r.spec.stage, r.spec.arm, r.spec.number)  # noqa: E731 - used twice, right here
    return [r for r in found if key(r) not in {key(new) for new in news}] + list(news)


def without(found, stage, method, number):
    gone = (stage, f"toy/{method}", number)
    return [r for r in found if (r.spec.stage, r.spec.arm, r.spec.number) != gone]


def claim_of(summary, kind):
    return next(c for c in summary.claims if c.kind == kind)


def arm_of(summary, method):
    return next(a for a in summary.arms if a.method == method)
