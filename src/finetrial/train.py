"""THE training loop, one for every method. Child side.

A difference between two methods here is a difference between methods: data order, batches, schedule,
clipping, precision, evaluation and stopping are this code, and the random streams are the replicate's. The
loss is normalised over the whole effective batch, so the micro-batch changes no result beyond rounding and
which activations dropout drops.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator

from finetrial import checkpoint
from finetrial.assemble import Workbench
from finetrial.batching import heaviest
from finetrial.fit import PROVED_SHARE, checkpoint_gradients
from finetrial.frozen import Setting
from finetrial.loop import Loop, Turn, keeps_best
from finetrial.optimisation import (
    evaluation_steps,
    how_to_step,
    plan_steps,
    planned_batches,
    precision_of,
    prepare_optimisation,
    settings_used,
)
from finetrial.plugins import Feature
from finetrial.records import Fit, LoopRules, RunSpec
from finetrial.stepping import Stepper
from finetrial.store import RunFolder
from finetrial.tables import trained_parameters, used_rows
from finetrial.training_state import Clock, Progress

T = TypeVar("T")


@dataclass
class Trained:
    """A trained model (its kept weights in place), what it can be evaluated with, what was really set."""

    model: Any
    accelerator: Accelerator
    settings_used: dict[str, Setting]


def alone(training: Generator[Turn, float, T]) -> T:
    """Do a training by itself. What it gives."""
    try:
        turn = next(training)
        while True:
            turn = follow(training, turn)
    except StopIteration as ended:
        return ended.value


def follow(training: Generator[Turn, float, Any], turn: Turn) -> Turn:
    """Take a step's gradients from its own model; the training's next turn."""
    try:
        loss = turn.loop.backward(turn.batch)
    except BaseException as error:  # noqa: BLE001 - it is the training's to handle, and comes back if it is not
        return training.throw(error)
    return training.send(loss)


def train(
    bench: Workbench,
    folder: RunFolder,
    model: Any,
    tokenizer: Any,
    features: Sequence[Feature],
    validation: Sequence[Feature],
    progress: Progress,
    fit: Fit,
    asked: Callable[[], bool] = lambda: False,
    begun: tuple[float, float] | None = None,
) -> Generator[Turn, float, Trained]:
    """Train a model by a run's spec, going on from its newest valid checkpoint if there is one.

    Every step waits for its gradients and is sent its loss (see `alone`, `stacking.py`).

    `progress` is kept up to date, so that it tells how far a run came that diverged. `asked`: whether the
    process was told to end. `begun`: wall and CPU time when the attempt did, where that is not now.

    Raises:
        Diverged: a loss, gradient norm, weight or score was not finite, or the loss stayed, or the
            weights grew, far above their start; nothing is skipped or filtered.
        OutOfMemory: it took more than its budget; a checkpoint of its last whole step is there.
        SystemExit: the process was told to end; a checkpoint is there.
    """
    spec = bench.spec
    planned_steps, steps_per_epoch = plan_steps(spec, len(features))
    loop = open_loop(bench, folder, model, tokenizer, features, progress, fit, planned_steps, begun)
    with loop.writer:
        yield from _turns(loop, features, validation, steps_per_epoch, asked)

    trained = loop.accelerator.unwrap_model(loop.model)
    used = settings_used(
        spec.settings, loop.optimizer, loop.scheduler, progress.largest_batch, planned_steps, steps_per_epoch
    )
    used |= bench.method()[0].read_back(trained)
    loop.optimizer.zero_grad(set_to_none=True)  # what comes after needs neither gradients nor moments, but room
    loop.optimizer.state.clear()
    if keeps_best(spec) and progress.best_step != progress.step:
        checkpoint.load_best(folder.checkpoint, progress.best_step or 0, loop.model)
    return Trained(trained, loop.accelerator, used)


def _turns(
    loop: Loop, features: Sequence[Feature], validation: Sequence[Feature], steps_per_epoch: int,
    asked: Callable[[], bool],
) -> Generator[Turn, float, None]:  # fmt: skip
    """Every step from where the loop is to where the training ends, with its evaluations and checkpoints."""
    spec, fit, progress, planned_steps = loop.bench.spec, loop.fit, loop.progress, loop.planned_steps
    evaluate_at = evaluation_steps(planned_steps, steps_per_epoch, spec.rules.evaluations_per_epoch)
    ends = spec.rung.steps(planned_steps) if spec.rung else (planned_steps,)
    regular, evaluate_at = evaluate_at, evaluate_at | set(ends)
    due = checkpoint.rule(spec.how, progress.step)
    lengths = [len(feature.input_ids) for feature in features]
    if progress.step == 0 and not fit.proved and (fit.predicted or 0) > PROVED_SHARE * fit.budget:
        planned = [[features[i] for i in batch] for batch in planned_batches(lengths, spec)]
        loop.prove(heaviest(planned))
    if progress.unjudged:  # the last attempt left within that evaluation
        loop.judge(validation, asked, regular=progress.step in regular)
    over = progress.stopped_early or progress.step >= ends[-1]
    if over and spec.may_go_on:
        loop.save()
    for indices in () if over else planned_batches(lengths, spec, progress.step):
        yield from loop.step([features[i] for i in indices])
        last = progress.step == ends[-1]
        if progress.step % spec.how.log_steps == 0 or last or progress.step in evaluate_at:
            loop.record()
        if progress.step in evaluate_at:
            loop.judge(validation, asked, regular=progress.step in regular)
        over = progress.stopped_early or last
        if over and spec.stage == "trial" and not spec.may_go_on:
            break
        if not over:
            loop.keep_to_budget()
        leaving = asked()
        if leaving or over or due(progress.step):  # over: others go on from it, or the test may be cut off
            loop.save()
        if leaving:
            loop.leave()
        if over:  # what is left is the test
            break
    loop.clock.train()


def make_accelerator(rules: LoopRules) -> Accelerator:
    """Accelerate with the precision of the rules."""
    return Accelerator(mixed_precision="bf16" if precision_of(rules) == "bf16" else "no")


def open_loop(
    bench: Workbench, folder: RunFolder, model: Any, tokenizer: Any, features: Sequence[Feature],
    progress: Progress, fit: Fit, planned_steps: int, begun: tuple[float, float] | None = None,
) -> Loop:  # fmt: skip
    """The loop where the folder's newest valid checkpoint left it, or before its first step."""
    if fit.checkpointing:
        checkpoint_gradients(model)
    accelerator = make_accelerator(bench.spec.rules)
    model = accelerator.prepare(model)
    used = used_rows(model, features, tokenizer.pad_token_id, bench.spec)
    trained = trained_parameters(model, used)
    optimizer, scheduler = prepare_optimisation(accelerator, trained, bench.spec, planned_steps)
    found, before = _checkpoint_of(folder, bench.spec, optimizer), folder.before(bench.spec)
    mine = found is not None
    if found is None and before is not None:
        found = _checkpoint_of(before, bench.spec, optimizer)
    if found is not None:
        progress.go_on_from(*checkpoint.restore(found, model, optimizer, scheduler), resumed=mine)
        if used is not None:
            used.read_again(progress.decay_owed)
        if before is not None and not mine:
            folder.take_over_metrics(before)
        folder.event("resumed" if mine else "goes on", step=progress.step)
    folder.keep_metrics_up_to(progress.step, unjudged=progress.unjudged)
    stepper = Stepper(trained, optimizer, bench.spec.rules, how_to_step(bench.spec))
    return Loop(
        bench, fit, folder, model, tokenizer, accelerator, optimizer, scheduler, planned_steps, progress,
        Clock(progress, begun), stepper, used, checkpoint.Writer(beside=accelerator.device.type == "cuda"),
    )  # fmt: skip


def _checkpoint_of(folder: RunFolder, spec: RunSpec, optimizer: Any) -> Path | None:
    """The newest checkpoint in a run's folder that holds and is of these tensors."""
    found = checkpoint.newest(folder.checkpoint, with_best=keeps_best(spec))
    if found is not None and not checkpoint.is_of(found, optimizer):
        sys.stderr.write(f"the checkpoint {found.name} is passed over: another device or version made it\n")
        return None
    return found
