"""How long a study takes and how much room it needs, from what `finetrial check` ran. Pure functions.

A run is its start, its set-up, its steps and its evaluations; a phase is its lanes on so many places, as the
scheduler fills them; where settings are searched, the mean over the space stands for what is not known yet.
"""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

from finetrial import search
from finetrial.frozen import Frozen, canonical_json
from finetrial.records import RunRecord
from finetrial.rehearsed import Pace, Phase, Rehearsal
from finetrial.space import Fixed, Space, spread
from finetrial.study import Study

# Analysis and report of a study of two arms (docs/log.md); small beside any study.
REPORT_SECONDS = 8.0
# A run's records without its checkpoints, and the report with its figures (docs/log.md).
RECORD_BYTES, REPORT_BYTES = 100_000, 3_000_000
# How far the pilots may correct the rehearsals' pace: beyond that one of the two was disturbed.
LEAST_CORRECTION, MOST_CORRECTION = 0.5, 2.0


class ArmForecast(Frozen):
    """Seconds that a run of an arm takes in each phase."""

    trial_seconds: float  # a whole one
    search_seconds: float  # all of them; with halving most are stopped
    replicate_seconds: float
    probe_seconds: float  # of a replicate that has a neighbour; the first has none, and takes less


class Forecast(Frozen):
    """Seconds and bytes of the whole study, from nothing to its report."""

    arms: dict[str, ArmForecast]  # task/method
    phases: dict[str, float]  # baseline, control, search, train, measure, report
    seconds: float
    disk_bytes: int
    correction: float  # the pilots' pace over the rehearsals'


class Evidence(NamedTuple):
    """The ended runs that a forecast is made from."""

    baselines: dict[str, RunRecord]  # task
    rehearsals: dict[str, RunRecord]  # task/method
    frozen: dict[str, RunRecord]  # task
    pilots: Sequence[RunRecord] = ()
    controls: dict[str, RunRecord] = {}  # task


def forecast(study: Study, found: Evidence, most: int) -> Forecast:
    """What the whole study takes, for a machine that is as busy as it was during the check.

    `most`: runs that may go side by side; fewer where memory does not suffice for as many.
    """
    start = statistics.median(_start_seconds(record) for record in _all(found))
    correction = _correction(study, found)
    arms: dict[str, ArmForecast] = {}
    searches: dict[str, list[list[float]]] = {}
    for task, method in study.arms:
        name = f"{task.name}/{method.name}"
        space, given = study.spaces[method.name], rehearsal_of(found.rehearsals[name])
        ends = study.search.ends or (1,)
        up_to = [
            _training(study, space, given, given.search, correction, ends[:count])
            for count in range(1, len(ends) + 1)
        ]
        parts = [now - before for before, now in itertools.pairwise([given.search.setup_seconds, *up_to])]
        searches[name] = _search(study, [start + given.search.setup_seconds + part for part in parts])
        arms[name] = ArmForecast(
            trial_seconds=start + _training(study, space, given, given.search, correction),
            search_seconds=math.fsum(map(math.fsum, searches[name])),
            replicate_seconds=start
            + _training(study, space, given, given.train, correction)
            + given.test_seconds * correction
            + given.save_seconds,
            probe_seconds=start + given.probe_seconds if study.measure else 0.0,
        )
    for task, method in study.arms:
        source = study.search.warm_start
        if search.told_factor(method, source) is not None:  # what is guided waits for the other's search
            waits = searches[f"{task.name}/{method.name}"]
            searches[f"{task.name}/{source}"] += waits[1:]
            del waits[1:]
    parallel, seeds = _side_by_side(study, found, most), study.train.seeds
    baselines = [span(record) for found_of in (found.baselines, found.frozen) for record in found_of.values()]
    phases = {
        "baseline": makespan(baselines, parallel),
        "control": makespan([span(record) for record in found.controls.values()], parallel),
        "search": makespan(searches.values(), parallel),
        "train": makespan([arm.replicate_seconds for arm in arms.values() for _ in range(seeds)], parallel),
        "measure": makespan([arm.probe_seconds for arm in arms.values() for _ in range(seeds)], parallel),
        "report": REPORT_SECONDS,
    }
    return Forecast(
        arms=arms, phases=phases, seconds=math.fsum(phases.values()),
        disk_bytes=_disk_bytes(study, found, parallel), correction=correction,
    )  # fmt: skip


def _search(study: Study, each: Sequence[float]) -> list[list[float]]:
    """Seconds of an arm's trials, in groups one after the other. `each`: of a trial's run to each end."""
    rules = study.search
    at_random = rules.trials if rules.sampler == "random" else rules.startup_trials
    groups = [[each[0]] * at_random, *([each[0]] for _ in range(rules.trials - at_random))]
    return groups + [[seconds] * count for count, seconds in zip(rules.counts[1:], each[1:], strict=True)]


def _side_by_side(study: Study, found: Evidence, most: int) -> int:
    """How many runs go on at a time: as many as there are places, or as memory suffices for."""
    if study.run.parallel != "auto":
        return most
    arms = [rehearsal_of(record) for record in found.rehearsals.values()]
    room = min(arm.budget_bytes for arm in arms) // max(arm.predicted_memory_bytes for arm in arms)
    return max(1, min(most, room))


def makespan(lanes: Iterable[float | Sequence[Sequence[float]]], places: int) -> float:
    """Seconds until the last lane has ended, each begun in order as soon as a place is free.

    A lane is one run, or groups of runs: the next group begins when the last has ended.
    """
    queues = [[[lane]] if isinstance(lane, int | float) else [list(group) for group in lane] for lane in lanes]
    under_way, now = [0] * len(queues), 0.0
    going: list[tuple[float, int]] = []  # end, lane
    while any(queues) or going:
        for index, groups in enumerate(queues):
            while groups and not groups[0] and not under_way[index]:
                groups.pop(0)
        ready = [index for index, groups in enumerate(queues) if groups and groups[0]]
        if ready and len(going) < max(1, places):
            index = min(ready, key=under_way.__getitem__)  # of the lane with the fewest
            heapq.heappush(going, (now + queues[index][0].pop(0), index))
            under_way[index] += 1
        elif going:
            now, index = heapq.heappop(going)
            under_way[index] -= 1
    return now


def epoch_seconds(paces: Sequence[Pace], batch_size: float) -> float:
    """Going once over a phase's rows: a cost per row and one per step, so linear in 1 / batch size."""
    first, last = paces[0], paces[-1]
    if first.batch_size == last.batch_size:
        return first.seconds
    share = (1 / batch_size - 1 / first.batch_size) / (1 / last.batch_size - 1 / first.batch_size)
    return first.seconds + min(max(share, 0.0), 1.0) * (last.seconds - first.seconds)


def rehearsal_of(record: RunRecord) -> Rehearsal:
    """What a rehearsal that ended well has found."""
    assert record.result is not None
    return Rehearsal.model_validate_json(canonical_json(record.result.measures["rehearsal"]))


def span(record: RunRecord) -> float:
    """Seconds from the first attempt's start to the last one's end, pauses between them left out."""
    return math.fsum(a.ended_at - a.started_at for a in record.attempts if a.ended_at is not None)


def _evaluations(epochs: float, per_epoch: int, ends: Sequence[int]) -> int:
    """How many evaluations there are up to the last of these ends: the regular ones, and one at every end."""
    regular = math.ceil(epochs) * per_epoch
    places = {Fraction(number, regular) for number in range(1, regular + 1)} | {
        Fraction(1, end) for end in ends
    }
    return sum(place <= Fraction(1, ends[-1]) for place in places)


def _training(
    study: Study, space: Space, given: Rehearsal, phase: Phase, correction: float, ends: Sequence[int] = (1,)
) -> float:
    """Seconds of a run whose settings are drawn from the space, without its start and its test.

    `ends`: those of a halved trial so far; up to the last of them.
    """
    epochs = [float(value) for value in spread(space["epochs"])]
    sizes = [float(value) for value in spread(space["batch_size"])]
    steps = statistics.fmean(epochs) * statistics.fmean(epoch_seconds(phase.paces, size) for size in sizes)
    evaluations = statistics.fmean(
        _evaluations(value, study.train.evaluations_per_epoch, ends) for value in epochs
    )
    seconds = (steps / ends[-1] + evaluations * given.validation_seconds) * correction
    every = study.run.checkpoint_seconds
    checkpoints = math.floor(seconds / every) * given.checkpoint_seconds if every else 0.0
    if study.run.checkpoint_steps is not None:
        mean_steps = statistics.fmean(epochs) * statistics.fmean(pace.steps for pace in phase.paces)
        checkpoints += mean_steps / ends[-1] / study.run.checkpoint_steps * given.checkpoint_seconds
    return phase.setup_seconds + seconds + checkpoints


def first_end_steps(space: Space, given: Rehearsal, factor: int) -> float:
    """Steps after which halving by this factor first compares an arm's trials, on the mean over their space."""
    rows = given.search.paces[0].steps * given.search.paces[0].batch_size
    epochs = statistics.fmean(float(value) for value in spread(space["epochs"]))
    return epochs * statistics.fmean(rows / float(size) for size in spread(space["batch_size"])) / factor**2


def _correction(study: Study, found: Evidence) -> float:
    """How much longer the pilots' steps and evaluations took than their rehearsal foretold."""
    took = foretold = 0.0
    for record in found.pilots:
        if record.outcome != "done" or record.result is None or len(record.attempts) > 1:
            continue
        if record.result.training and record.result.training.stacked > 1:  # it was charged a share of the time
            continue
        given = rehearsal_of(found.rehearsals[record.spec.arm])
        space: Space = {name: Fixed(value=value) for name, value in record.spec.settings.items()}
        without = given.search.model_copy(update={"setup_seconds": 0.0})
        rung = record.spec.rung
        foretold += _training(study, space, given, without, 1.0, rung.ends if rung else (1,))
        took += record.result.cost.train_seconds + record.result.cost.evaluate_seconds
    ratio = took / foretold if took and foretold else 1.0
    return min(max(ratio, LEAST_CORRECTION), MOST_CORRECTION)


def _start_seconds(record: RunRecord) -> float:
    """From the scheduler's start of a run to the worker's clock, and from its end to the scheduler's note."""
    took = record.result.cost.wall_seconds if record.result else 0.0
    return max(0.0, span(record) - took)


def _all(found: Evidence) -> list[RunRecord]:
    groups = (
        found.baselines.values(), found.rehearsals.values(), found.frozen.values(), found.pilots,
        found.controls.values(),
    )  # fmt: skip
    return [record for group in groups for record in group if record.result]


def _disk_bytes(study: Study, found: Evidence, most: int) -> int:
    """Models of the replicates, checkpoints of the runs at a time (old and new), records, report."""
    arms = [rehearsal_of(record) for record in found.rehearsals.values()]
    models = study.train.seeds * sum(arm.model_bytes for arm in arms)
    rules = study.search
    waiting = sum(rules.counts[1:2])  # of every arm, to go on from
    checkpoints = (2 * most * study.run.stack + waiting * len(arms)) * max(arm.checkpoint_bytes for arm in arms)
    runs = len(arms) * (sum(rules.counts) + 2 * study.train.seeds)
    return models + checkpoints + runs * RECORD_BYTES + REPORT_BYTES
