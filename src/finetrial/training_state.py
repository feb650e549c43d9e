"""Where a training run is, what it has cost so far, and whether its numbers still mean anything. Child side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from finetrial.errors import Diverged
from finetrial.fair_time import FAIR
from finetrial.plugins import Scored
from finetrial.records import LoopRules

# What divergence is measured against: the median of so many losses, at most so many times the first.
START_LOSSES = 5
LUCK = 10.0
# A tensor whose root mean square starts below this, as that of a fresh head, counts as starting here.
SMALL_WEIGHTS = 0.1


@dataclass
class Progress:
    """Where a training run is: everything a checkpoint must hold besides tensors. Plain JSON."""

    step: int = 0
    examples: int = 0
    largest_batch: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    micro_batches: int = 1  # most that an effective batch was split into
    first_loss: float | None = None
    last_loss: float | None = None
    gradient_norm: float = 0.0  # of the last step, before clipping
    learning_rate: float = 0.0  # that the last step was made with
    first_weight_sizes: list[float] = field(default_factory=list)  # each trained tensor's, at the start
    weight_growth: float = 1.0  # the median tensor's size when last weighed, as a multiple of its start
    first_losses: list[float] = field(default_factory=list)  # what divergence is measured against
    steps_above_start: int = 0
    unlogged_losses: list[float] = field(default_factory=list)  # since the last train record
    decay_owed: float = 1.0  # what the unused rows of the embeddings are still to be multiplied by
    updates_watched: int = 0  # of a sample of elements, at some steps: updates other than zero
    updates_lost: int = 0  # and those that left the stored weight as it was
    best_step: int | None = None
    best_score: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    best_calibration: dict[str, float] = field(default_factory=dict)
    best_per_example: dict[str, float] = field(default_factory=dict)
    loss: float | None = None  # by which halving compares: the mean over validation's examples
    losses: dict[str, float] = field(default_factory=dict)  # and each one's; of trials that may go on alone
    peak_score: float | None = None  # the best of all evaluations, kept or not
    regular_peak: float | None = None  # and of the regular ones, which early stopping compares
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    unjudged: bool = False  # the evaluation of this step is still to be made
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    resumed_from: list[int] = field(default_factory=list)
    earlier_wall_seconds: float = 0.0  # of the attempts before this one, up to its checkpoint
    earlier_cpu_seconds: float = 0.0

    def go_on_from(self, step: int, state: Mapping[str, Any], *, resumed: bool = True) -> None:
        """Take over what a checkpoint of that step holds. `resumed`: of an attempt that did not end well."""
        for each in fields(self):
            if each.name in state:  # not one that a newer version has
                setattr(self, each.name, state[each.name])
        if resumed:
            self.resumed_from.append(step)
        self.earlier_wall_seconds, self.earlier_cpu_seconds = self.wall_seconds, self.cpu_seconds

    @property
    def lost_to_rounding(self) -> float | None:
        """Share of the watched updates so far that were lost."""
        return self.updates_lost / self.updates_watched if self.updates_watched else None

    def weigh(self, sizes: Sequence[float]) -> None:
        """Take in the root mean square of every trained tensor after a step."""
        starts = (max(start, SMALL_WEIGHTS) for start in self.first_weight_sizes)
        growths = [size / start for size, start in zip(sizes, starts, strict=True)]
        self.weight_growth = statistics.median(growths) if all(map(math.isfinite, growths)) else math.nan

    def keep(self, score: float, scored: Scored) -> None:
        """Remember an evaluation as that of the weights that are kept."""
        self.best_step, self.best_score = self.step, score
        self.best_metrics = dict(scored.metrics)
        self.best_calibration = dict(scored.calibration)
        self.best_per_example = dict(scored.per_example)

    def compare_by(self, loss: float, scored: Scored, *, last: bool) -> None:
        """Remember an evaluation's losses if their mean is the lowest so far, or those of the `last` count."""
        if last or self.loss is None or loss < self.loss:
            self.loss, self.losses = loss, dict(scored.losses)


def guard(progress: Progress, rules: LoopRules, loss: float) -> None:
    """Whether training still is where useful weights come back from; called after every step.

    The loss alone does not tell: behind a layer norm a model may be lost while it predicts what it did.
    """
    for name, value in (
        ("loss", loss),
        ("gradient norm", progress.gradient_norm),
        ("trained weights' size", progress.weight_growth),
    ):
        if not math.isfinite(value):
            raise Diverged(progress.step, f"the {name} is {value}")
    if progress.weight_growth > rules.divergence_growth:
        raise Diverged(
            progress.step,
            f"the trained weights are {progress.weight_growth:.3g} times as large as at the start",
        )
    if len(progress.first_losses) < START_LOSSES:
        progress.first_losses.append(loss)
    # One batch may be lucky, so the start is the median of the first; but no explosion is taken for a start.
    first, usual = progress.first_losses[0], statistics.median(progress.first_losses)
    start = max(first, min(usual, LUCK * first))
    above = start > 0 and loss > rules.divergence_factor * start  # a loss that may be negative has no such rule
    progress.steps_above_start = progress.steps_above_start + 1 if above else 0
    if progress.steps_above_start >= rules.divergence_steps:
        raise Diverged(
            progress.step,
            f"the loss, {loss:.3g}, was above {rules.divergence_factor:g} times its start of {start:.3g} "
            f"for {rules.divergence_steps} steps",
        )


class Clock:
    """Adds up seconds by what they were spent on, over all attempts of a run."""

    def __init__(self, progress: Progress, begun: tuple[float, float] | None = None):
        """`begun`: when the attempt did; what it took up to here is neither training nor evaluation."""
        self.progress = progress
        self.last, self.last_cpu = begun or FAIR.now()
        self._lap()

    def _lap(self) -> float:
        now, cpu = FAIR.now()
        passed = now - self.last
        self.progress.cpu_seconds += cpu - self.last_cpu
        self.progress.wall_seconds += passed
        self.last, self.last_cpu = now, cpu
        return passed

    def train(self) -> float:
        """Book the time since the last lap as training; all training seconds so far."""
        self.progress.train_seconds += self._lap()
        return self.progress.train_seconds

    def evaluate(self) -> None:
        self.progress.evaluate_seconds += self._lap()
