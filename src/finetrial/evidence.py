"""Which of a study's planned runs count, and what each of them stands for.

Pure: run records in, arms out. Not for numbers over several runs (`analyse.py`, `stats.py`).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetrial.plugins import Metric
from finetrial.records import MethodSpec, RunRecord, SearchStop, TaskSpec
from finetrial.study import SearchRules

ENDED_WELL = ("done", "diverged")
LEFT_WAITING = (None, "cancelled")  # outcomes of runs that the same command would go on with
NOT_FINISHED = "not finished"
NO_OPTIMUM = "no trial gave a score"
UNDEFINED = {  # what was measured and gives no number
    "drift": "a layer that does not vary over the inputs",
    "forgetting": "nothing forgettable: the base reads no task above chance",
}


@dataclass(frozen=True)
class Arm:
    """One arm's runs, each stage by number, and which planned replicates have no valid score and why."""

    task: TaskSpec
    method: MethodSpec
    metric: Metric
    trials: Sequence[RunRecord]  # one a number: with halving its run to the furthest end so far
    search_runs: Sequence[RunRecord]  # all of them
    replicates: Sequence[RunRecord]
    probes: Mapping[int, RunRecord]  # by the replicate number that is measured
    control: RunRecord | None  # the base measured against itself
    stop: SearchStop | None  # why its search was ended early
    invalid: Mapping[int, str]

    @property
    def valid(self) -> list[RunRecord]:
        return [r for r in self.replicates if r.spec.number not in self.invalid]


def best_trial(trials: Sequence[RunRecord], metric: Metric) -> RunRecord | None:
    """The finished trial with the best validation score; among equals the lowest number.

    With halving only those count that got as far as any: by score at the last end, before it by their loss.
    """
    sign = -1.0 if metric.higher_is_better else 1.0
    scored = [
        (-_end(r), value if r.spec.may_go_on else sign * value, r)
        for r in trials
        if (value := standing_value(r)) is not None
    ]
    return min(scored, key=lambda item: (*item[:2], item[2].spec.number), default=(0, 0, None))[2]


def furthest(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Of every trial its run to the furthest end that has ended, or else that has begun; by number."""
    found: dict[int, RunRecord] = {}
    for record in sorted(runs, key=lambda r: (r.outcome not in LEFT_WAITING, _end(r))):
        found[record.spec.number] = record
    return [found[number] for number in sorted(found)]


def trained(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Of every trial the run whose result counts all of its training: the furthest that has one; by number."""
    return furthest([record for record in runs if record.result])


def _end(record: RunRecord) -> int:
    return record.spec.rung.number if record.spec.rung else 0


def trial_score(record: RunRecord) -> float | None:
    """A finished trial's score on validation; none if what should have trained did not move."""
    if record.outcome != "done" or record.result is None or record.result.score is None:
        return None
    if record.result.proof is not None and record.result.proof.void:
        return None
    return record.result.score if math.isfinite(record.result.score) else None


def standing_value(record: RunRecord) -> float | None:
    """What a finished trial is compared by: its score, or where halving may end it its loss on validation."""
    score = trial_score(record)
    if score is None or not record.spec.may_go_on:
        return score
    return record.result.validation_loss if record.result else None


def searched(arm: Arm, rules: SearchRules) -> bool:
    """Whether every trial of an arm has begun, and with halving of the later ends as many as must."""
    if len(arm.trials) < (arm.stop.after if arm.stop else rules.trials):
        return False
    reached = [
        [r for r in arm.search_runs if r.spec.rung and r.spec.rung.number == end]
        for end in range(1, len(rules.ends) + 1)
    ]
    mosts = rules.counts
    for end, (before, after) in enumerate(itertools.pairwise(reached), start=1):
        scored = sum(standing_value(run) is not None for run in before)
        least = 1 if end == len(reached) - 1 else mosts[end]  # before the last what is told apart is left out
        if len(after) < min(scored, least):
            return False
    return True


def arm_of(
    task: TaskSpec,
    method: MethodSpec,
    metric: Metric,
    records: Sequence[RunRecord],
    seeds: int,
    rules: SearchRules,
    stop: SearchStop | None = None,
) -> Arm:
    """The arm's runs among `records` (in order of number), with `seeds` replicates planned."""
    inputs = _expected_inputs(records, task.name)
    mine = [r for r in records if r.spec.method and r.spec.arm == f"{task.name}/{method.name}"]
    replicates = [r for r in mine if r.spec.stage == "replicate"]
    reasons: dict[int, str | None] = dict.fromkeys(range(seeds), NOT_FINISHED)
    reasons |= {r.spec.number: _why_invalid(r, metric, inputs) for r in replicates}
    search_runs = [r for r in mine if r.spec.stage == "trial"]
    arm = Arm(
        task=task,
        method=method,
        metric=metric,
        trials=furthest(search_runs),
        search_runs=search_runs,
        replicates=replicates,
        probes={r.spec.number: r for r in mine if r.spec.stage == "probe"},
        control=run_of_task(records, task.name, "probe"),
        stop=stop,
        invalid={number: why for number, why in reasons.items() if why},
    )
    over = searched(arm, rules) and all(run.outcome not in LEFT_WAITING for run in search_runs)
    if over and not replicates and best_trial(arm.trials, metric) is None:
        return replace(arm, invalid=dict.fromkeys(reasons, NO_OPTIMUM))
    return arm


def _why_invalid(record: RunRecord, metric: Metric, inputs: Mapping[str, str | None]) -> str | None:
    """Why a replicate has no valid score on test, or None. `inputs`: what they should have been, by split."""
    if record.outcome != "done" or record.result is None:
        return (record.outcome or NOT_FINISHED).replace("_", " ")
    if void := void_reason(record):
        return f"void, {void}"
    if metric.name not in record.result.scores.get("test", {}):
        return f"no {metric.name} on test"
    return _other_inputs(record, inputs)


def _expected_inputs(records: Sequence[RunRecord], task: str) -> dict[str, str | None]:
    """Split -> hash of the inputs that a task's replicates should have had, as far as anything tells.

    Those to be judged on are the baseline's. To train on, all replicates of all methods have the same: those
    that most of them had; None where as many had others.
    """
    baseline = run_of_task(records, task, "baseline")
    expected: dict[str, str | None] = dict(baseline.result.input_sha256) if baseline and baseline.result else {}
    replicates = [r for r in records if r.spec.stage == "replicate" and r.spec.task.name == task and r.result]
    trained = Counter(sha256 for r in replicates if (sha256 := _trained_on(r)) is not None).most_common(2)
    if trained:
        tied = len(trained) == 2 and trained[0][1] == trained[1][1]
        expected["train"] = None if tied else trained[0][0]
    return expected


def _trained_on(record: RunRecord) -> str | None:
    """The hash of the inputs that a run trained on, if it says."""
    return record.result.input_sha256.get("train") if record.result else None


def _other_inputs(record: RunRecord, expected: Mapping[str, str | None]) -> str | None:
    """Whether a replicate had other inputs than it should have had: in words, or None."""
    for split, digest in record.result.input_sha256.items() if record.result else ():
        if expected.get(split, digest) == digest:
            continue
        if split != "train":
            return f"other {split} inputs than the baseline's"
        most = expected[split] is not None
        return f"other train inputs than {'most' if most else 'as many'} replicates of the task"
    return None


def void_reason(record: RunRecord) -> str | None:
    """Why a finished run does not count as trained; a run without proof has proven nothing."""
    if record.outcome != "done" or record.result is None:
        return None
    return record.result.proof.void if record.result.proof else "no proof of training"


def run_of_task(
    ordered: Sequence[RunRecord], task: str, stage: str, *, trained: bool = False
) -> RunRecord | None:
    """The task's one run without a method: its baseline run, or its control probe. `trained`: with one, so of
    the baseline stage the frozen body's."""
    for r in ordered:
        if (r.spec.method is not None) == trained and r.spec.task.name == task and r.spec.stage == stage:
            return r
    return None


def measured(probe: RunRecord | None, name: str) -> dict[str, Any] | None:
    """What a probe's run measured under that name, if it did."""
    return probe.result.measures.get(name) if probe and probe.result else None


def measures_of(arm: Arm, name: str) -> dict[int, tuple[RunRecord, dict[str, Any]]]:
    """Replicate number -> its probe's run and what it measured; of valid ones, on the control's inputs."""
    found = {}
    for replicate in arm.valid:
        number = replicate.spec.number
        values = measured(arm.probes.get(number), name)
        if values is not None and same_inputs(arm, name, values):
            found[number] = (arm.probes[number], values)
    return found


def same_inputs(arm: Arm, name: str, values: Mapping[str, Any]) -> bool:
    """Whether a probe measured on the inputs that the task's control measured on."""
    control = _hashes(measured(arm.control, name))
    return all(control.get(where, digest) == digest for where, digest in _hashes(values).items())


def _hashes(values: Any, path: str = "") -> dict[str, str]:
    """Every `input_sha256` in what a probe measured, by where it stands."""
    found: dict[str, str] = {}
    if isinstance(values, dict):
        for key, value in values.items():
            if key == "input_sha256":
                found[path] = value
            else:
                found |= _hashes(value, f"{path}/{key}")
    return found


def why_not_measured(arm: Arm, number: int, name: str) -> str:
    """Why a valid replicate has nothing measured under that name."""
    probe = arm.probes.get(number)
    outcome = probe.outcome if probe else None
    if outcome not in (*LEFT_WAITING, "done"):
        return f"probe {outcome}".replace("_", " ")
    values = measured(probe, name)
    if values is None:
        return f"{name} not measured"
    return UNDEFINED.get(name, f"no {name}") if same_inputs(arm, name, values) else "probe on other inputs"
