"""THE training loop, one for every method, and the evaluation that goes with it. Child side.

A difference between two methods here is a difference between methods: data order, batches, schedule,
clipping, precision, evaluation and stopping are this code, and the random streams are the replicate's. The
loss is normalised over the whole effective batch, so the micro-batch changes no result beyond rounding and
which activations dropout drops.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from accelerate import Accelerator

from finetrial import checkpoint
from finetrial.assemble import Workbench
from finetrial.batching import collate, epoch_batches, evaluation_batches, model_inputs
from finetrial.errors import Diverged
from finetrial.files import append_json_line
from finetrial.notice import EXIT_CODE, termination_notice
from finetrial.optimisation import evaluation_steps, plan_steps, prepare_optimisation, settings_used
from finetrial.plugins import Feature, Scored, metric_of
from finetrial.records import LoopRules, RunSpec, Setting, stream_seed
from finetrial.store import RunFolder

# What divergence is measured against: the median of so many losses, at most so many times the first.
START_LOSSES = 5
LUCK = 10.0


@dataclass
class Progress:
    """Where a training run is: everything a checkpoint must hold besides tensors. Plain JSON."""

    step: int = 0
    examples: int = 0
    largest_batch: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    first_losses: list[float] = field(default_factory=list)  # what divergence is measured against
    steps_above_start: int = 0
    unlogged_losses: list[float] = field(default_factory=list)  # since the last train record
    best_step: int | None = None
    best_score: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    best_calibration: dict[str, float] = field(default_factory=dict)
    best_per_example: dict[str, float] = field(default_factory=dict)
    peak_score: float | None = None  # the best of all evaluations, kept or not: what early stopping compares
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    resumed_from: list[int] = field(default_factory=list)
    earlier_wall_seconds: float = 0.0  # of the attempts before this one, up to its checkpoint
    earlier_cpu_seconds: float = 0.0

    def go_on_from(self, step: int, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint of that step holds."""
        for each in fields(self):
            setattr(self, each.name, state[each.name])
        self.resumed_from.append(step)
        self.earlier_wall_seconds, self.earlier_cpu_seconds = self.wall_seconds, self.cpu_seconds


@dataclass
class Trained:
    """A trained model (its kept weights in place), what it can be evaluated with, what was really set."""

    model: Any
    accelerator: Accelerator
    settings_used: dict[str, Setting]


def train(
    bench: Workbench,
    folder: RunFolder,
    model: Any,
    tokenizer: Any,
    features: Sequence[Feature],
    validation: Sequence[Feature],
    progress: Progress,
) -> Trained:
    """Train a model by a run's spec, going on from its newest valid checkpoint if there is one.

    `progress` is kept up to date, so that it tells how far a run came that diverged.

    Raises:
        Diverged: a loss, gradient norm, weight or score was not finite, or the loss stayed far above its
            start; nothing is skipped or filtered.
    """
    spec, rules = bench.spec, bench.spec.rules
    accelerator = make_accelerator(rules)
    lengths = [len(feature.input_ids) for feature in features]
    batch_size = int(spec.settings["batch_size"])
    planned_steps, steps_per_epoch = plan_steps(spec, len(features))
    model, optimizer, scheduler = prepare_optimisation(accelerator, model, spec, planned_steps)
    evaluate_at = evaluation_steps(planned_steps, steps_per_epoch, rules.evaluations_per_epoch)

    found = checkpoint.newest(folder.checkpoint, with_best=_keeps_best(spec))
    if found is not None:
        progress.go_on_from(*checkpoint.restore(found, model, optimizer, scheduler))
    folder.keep_metrics_up_to(progress.step)
    clock = _Clock(progress)
    due = _checkpoint_rule(spec, progress.step)

    with termination_notice() as asked:
        for indices in _remaining(lengths, batch_size, spec.seeds.data_order, planned_steps, progress.step):
            progress.step += 1
            batch = [features[i] for i in indices]
            model.train()
            loss, norm, rate = _step(
                accelerator, model, optimizer, scheduler, bench, tokenizer, batch, progress
            )
            try:
                guard(progress, rules, loss, norm)
            except Diverged as diverged:
                record = {
                    "kind": "diverged", "step": progress.step, "reason": diverged.reason,
                    "losses_before": progress.unlogged_losses, "learning_rate": rate,
                }  # fmt: skip
                append_json_line(folder.metrics_file, record)
                raise
            progress.unlogged_losses.append(loss)
            progress.first_loss = loss if progress.first_loss is None else progress.first_loss
            progress.last_loss = loss
            last = progress.step == planned_steps
            if progress.step % spec.how.log_steps == 0 or last or progress.step in evaluate_at:
                losses = progress.unlogged_losses
                record = {
                    "kind": "train", "step": progress.step, "planned_steps": planned_steps,
                    "loss": _mean(losses), "gradient_norm": norm,
                    "learning_rate": rate, "tokens": progress.tokens,
                    "seconds": round(clock.train(), 3),
                }  # fmt: skip
                append_json_line(folder.metrics_file, record)
                losses.clear()
            if progress.step in evaluate_at:
                clock.train()
                try:
                    _check_weights(model)
                    scored = evaluate(accelerator, model, bench, tokenizer, validation, bench.splits.validation)
                except Diverged as diverged:  # a head knows no step
                    raise Diverged(progress.step, diverged.reason) from diverged
                clock.evaluate()
                _judge(bench, folder, model, scored, progress, rules)
            if progress.stopped_early:
                break
            leaving = asked()
            if (leaving or due(progress.step)) and not last:
                clock.train()
                checkpoint.save(folder.checkpoint, progress.step, model, optimizer, scheduler, asdict(progress))
            if leaving and not last:
                sys.stderr.write(f"asked to end: left after step {progress.step}, with a checkpoint\n")
                sys.exit(EXIT_CODE)
    clock.train()

    trained = accelerator.unwrap_model(model)
    largest = progress.largest_batch
    used = settings_used(spec.settings, optimizer, scheduler, largest, planned_steps, steps_per_epoch)
    used |= bench.method()[0].read_back(trained)
    if _keeps_best(spec) and progress.best_step != progress.step:
        checkpoint.load_best(folder.checkpoint, progress.best_step or 0, model)
    return Trained(trained, accelerator, used)


def make_accelerator(rules: LoopRules) -> Accelerator:
    """Accelerate with the precision of the rules; `auto` is bf16 autocast on a GPU that has it, else fp32."""
    precision = rules.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")


def _remaining(
    lengths: Sequence[int], batch_size: int, seed: int, planned_steps: int, done: int
) -> Iterator[list[int]]:
    """The batches from step `done` + 1 to the last; a position in the data is a step number."""
    per_epoch = math.ceil(len(lengths) / batch_size)
    for epoch in range(done // per_epoch, math.ceil(planned_steps / per_epoch)):
        batches = epoch_batches(lengths, batch_size, seed=seed, epoch=epoch)
        first = max(0, done - epoch * per_epoch)
        yield from batches[first : planned_steps - epoch * per_epoch]


def _step(
    accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, bench: Workbench,
    tokenizer: Any, batch: Sequence[Feature], progress: Progress,
) -> tuple[float, float, float]:  # fmt: skip
    """One optimiser step over one effective batch.

    Gives its mean loss, the gradient norm before clipping, and the learning rate that it was made with.
    """
    spec = bench.spec
    micro = spec.how.micro_batch or len(batch)
    total = 0.0
    optimizer.zero_grad(set_to_none=True)
    for index, start in enumerate(range(0, len(batch), micro)):
        tensors = collate(batch[start : start + micro], tokenizer.pad_token_id, accelerator.device)
        # Dropout is a function of (replicate, step): no method's use of random numbers shifts another's.
        torch.manual_seed(stream_seed(spec.seeds.dropout, progress.step, index))
        outputs = model(**model_inputs(tensors))
        loss = bench.task.head.loss_sum(outputs, tensors) / len(batch)
        accelerator.backward(loss)
        total += float(loss.detach())
        progress.padded_tokens += tensors["input_ids"].numel()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = float(accelerator.clip_grad_norm_(trained, spec.rules.max_grad_norm))
    rate = float(scheduler.get_last_lr()[0])
    optimizer.step()
    scheduler.step()
    progress.examples += len(batch)
    progress.largest_batch = max(progress.largest_batch, len(batch))
    progress.tokens += sum(len(feature.input_ids) for feature in batch)
    return total, norm, rate


def guard(progress: Progress, rules: LoopRules, loss: float, norm: float) -> None:
    """Whether training still is where finite numbers come back from; called after every step."""
    if not math.isfinite(loss):
        raise Diverged(progress.step, f"the loss is {loss}")
    if not math.isfinite(norm):
        raise Diverged(progress.step, f"the gradient norm is {norm}")
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


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _check_weights(model: Any) -> None:
    for name, parameter in checkpoint.trained_tensors(model).items():
        if not bool(torch.isfinite(parameter).all()):
            raise Diverged(0, f"{name} holds a weight that is not finite")


def evaluate(
    accelerator: Accelerator,
    model: Any,
    bench: Workbench,
    tokenizer: Any,
    features: Sequence[Feature],
    examples: Sequence[dict[str, Any]],
    calibration: dict[str, float] | None = None,
) -> Scored:
    """Scores of a split. Validation chooses the calibration; test is given it."""
    model.eval()
    predictions: list[Any] = [None] * len(features)
    with torch.no_grad():
        for indices in evaluation_batches([len(feature.input_ids) for feature in features]):
            batch = [features[i] for i in indices]
            tensors = collate(batch, tokenizer.pad_token_id, accelerator.device)
            outputs = model(**model_inputs(tensors))
            made = bench.task.head.predictions(outputs, tensors)
            for index, prediction in zip(indices, made, strict=True):
                predictions[index] = prediction
    return bench.task.head.score(predictions, features, examples, bench.task_params, calibration)


def _judge(
    bench: Workbench, folder: RunFolder, model: Any, scored: Scored, progress: Progress, rules: LoopRules
) -> None:
    """Record an evaluation, keep the weights if it is the best, and apply the stopping rule.

    `progress.best_*` is of the weights that are kept: with `keep: last` those of the last evaluation.
    """
    metric = metric_of(bench.spec.task)
    score = scored.metrics[metric.name]
    if not math.isfinite(score):
        raise Diverged(progress.step, f"the score is {score}")
    record = {"kind": "eval", "step": progress.step, "score": score, **scored.metrics, **scored.calibration}
    append_json_line(folder.metrics_file, record)
    gain = math.inf
    if progress.peak_score is not None:
        gain = (score - progress.peak_score) * (1 if metric.higher_is_better else -1)
    if gain > 0:
        progress.peak_score = score
    if gain > 0 or rules.keep == "last":
        progress.best_step, progress.best_score = progress.step, score
        progress.best_metrics = dict(scored.metrics)
        progress.best_calibration = dict(scored.calibration)
        progress.best_per_example = dict(scored.per_example)
        if _keeps_best(bench.spec):
            checkpoint.save_best(folder.checkpoint, progress.step, model)
    stopping = rules.early_stopping
    if stopping is not None:
        enough = gain > stopping.min_delta
        progress.evaluations_without_gain = 0 if enough else progress.evaluations_without_gain + 1
        progress.stopped_early = progress.evaluations_without_gain >= stopping.patience


def _keeps_best(spec: RunSpec) -> bool:
    """A trial's weights are never used again; a replicate's best are what is tested and saved."""
    return spec.stage == "replicate" and spec.rules.keep == "best"


def _checkpoint_rule(spec: RunSpec, start: int) -> Callable[[int], bool]:
    """When to write a checkpoint: every so many steps, or every so many seconds. It changes no result."""
    last = {"step": start, "time": time.monotonic()}

    def due(step: int) -> bool:
        every_steps, every_seconds = spec.how.checkpoint_steps, spec.how.checkpoint_seconds
        by_steps = every_steps is not None and step - last["step"] >= every_steps
        by_time = every_seconds is not None and time.monotonic() - last["time"] >= every_seconds
        if by_steps or by_time:
            last.update(step=step, time=time.monotonic())
        return by_steps or by_time

    return due


class _Clock:
    """Adds up seconds by what they were spent on, over all attempts of a run."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.last = time.perf_counter()
        self.last_cpu = time.process_time()

    def _lap(self) -> float:
        now, cpu = time.perf_counter(), time.process_time()
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
