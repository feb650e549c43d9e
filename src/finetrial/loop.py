"""One training's loop: what a step, an evaluation and a checkpoint are. Child side.

`train.py` says when each of them comes; where a step's gradients come from is up to whoever drives it.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import Accelerator

from finetrial import checkpoint
from finetrial.assemble import Workbench
from finetrial.batching import collate, model_inputs
from finetrial.errors import Diverged, OutOfMemory
from finetrial.evaluation import Kept, drop_up_to, evaluate, validation_name
from finetrial.files import append_json_line
from finetrial.fit import split
from finetrial.frozen import stream_seed
from finetrial.notice import EXIT_CODE
from finetrial.plugins import Feature, metric_of
from finetrial.process_memory import check, peak_bytes
from finetrial.records import Fit, RunSpec
from finetrial.stepping import Stepper
from finetrial.store import RunFolder
from finetrial.tables import UsedRows
from finetrial.training_state import Clock, Progress, guard

# At which steps the weights' sizes are looked at, which is a pass over all of them.
WEIGHED_ALWAYS, WEIGHED_EVERY = 20, 4


class Turn(NamedTuple):
    """A step that waits for its gradients: of this loop's model, of the mean loss over this batch."""

    loop: Loop
    batch: Sequence[Feature]


@dataclass(frozen=True, eq=False)
class Loop:
    """What every turn of the loop needs, and what a turn may do."""

    bench: Workbench
    fit: Fit
    folder: RunFolder
    model: Any
    tokenizer: Any
    accelerator: Accelerator
    optimizer: Any
    scheduler: Any
    planned_steps: int
    progress: Progress
    clock: Clock
    stepper: Stepper
    used: UsedRows | None
    writer: checkpoint.Writer

    def step(self, batch: Sequence[Feature]) -> Generator[Turn, float, None]:
        """One optimiser step over one effective batch.

        Raises:
            Diverged: recorded first, with the losses that led to it.
        """
        progress = self.progress
        progress.step += 1
        if not progress.first_weight_sizes:
            progress.first_weight_sizes = self.stepper.weight_sizes()
        self.stepper.look(progress.step, self.planned_steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss = yield Turn(self, batch)
        progress.gradient_norm = self.stepper.finish()
        self.stepper.lost(progress)
        if self.used is not None:
            self.used.put_back(self.optimizer)
        if progress.step <= WEIGHED_ALWAYS or progress.step % WEIGHED_EVERY == 0:
            progress.weigh(self.stepper.weight_sizes())
        progress.learning_rate = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        progress.examples += len(batch)
        progress.largest_batch = max(progress.largest_batch, len(batch))
        progress.tokens += sum(len(feature.input_ids) for feature in batch)
        try:
            guard(progress, self.bench.spec.rules, loss)
        except Diverged as diverged:
            record = {
                "kind": "diverged", "step": progress.step, "reason": diverged.reason,
                "losses_before": progress.unlogged_losses, "learning_rate": progress.learning_rate,
            }  # fmt: skip
            append_json_line(self.folder.metrics_file, record)
            raise
        progress.unlogged_losses.append(loss)
        progress.first_loss = loss if progress.first_loss is None else progress.first_loss
        progress.last_loss = loss

    def backward(self, batch: Sequence[Feature]) -> float:
        """Gradients of an effective batch's mean loss, and that loss."""
        progress = self.progress
        self.model.train()
        total = 0.0
        parts = split(self.fit, batch)
        progress.micro_batches = max(progress.micro_batches, len(parts))
        for index, part in enumerate(parts):
            tensors = collate(part, self.tokenizer.pad_token_id, self.accelerator.device)
            torch.manual_seed(self.dropout_seed(index))
            # No name keeps the outputs: they would live on through the next part's passes.
            loss = self.bench.task.head.losses(self.model(**model_inputs(tensors)), tensors).sum() / len(batch)
            self.stepper.last_part = index == len(parts) - 1
            self.accelerator.backward(loss)
            total += float(loss.detach())
            progress.padded_tokens += tensors["input_ids"].numel()
        return total

    def loss_of(self, part: Sequence[Feature], number: int) -> float:
        """The summed loss of a part of this step's batch, as `backward` would have it."""
        self.model.train()
        tensors = collate(part, self.tokenizer.pad_token_id, self.accelerator.device)
        torch.manual_seed(self.dropout_seed(number))
        return float(self.bench.task.head.losses(self.model(**model_inputs(tensors)), tensors).sum())

    def dropout_seed(self, part: int) -> int:
        """Dropout is a function of (replicate, step): no method's use of random numbers shifts another's."""
        return stream_seed(self.bench.spec.seeds.dropout, self.progress.step, part)

    def record(self) -> None:
        """A line of metrics: the mean loss since the last one, and the last step's gradient norm and rate."""
        progress, losses = self.progress, self.progress.unlogged_losses
        record = {
            "kind": "train", "step": progress.step, "planned_steps": self.planned_steps,
            "loss": math.fsum(losses) / len(losses), "gradient_norm": progress.gradient_norm,
            "weight_growth": progress.weight_growth, "learning_rate": progress.learning_rate,
            "tokens": progress.tokens, "lost_to_rounding": progress.lost_to_rounding,
            "seconds": round(self.clock.train(), 3),
        }  # fmt: skip
        append_json_line(self.folder.metrics_file, record)
        losses.clear()

    def judge(self, validation: Sequence[Feature], asked: Callable[[], bool], *, regular: bool = True) -> None:
        """Score validation, keep the weights if they are the best, and apply the stopping rule.

        `progress.best_*` is of the weights that are kept: with `keep: last` those of the last evaluation.
        `asked`: whether the process was told to end. `regular`: not only for halving, so that it counts for
        the stopping rule.
        """
        bench, progress, rules = self.bench, self.progress, self.bench.spec.rules
        metric = metric_of(bench.spec.task)
        self.clock.train()
        if self.used is not None:
            self.used.settle()
        progress.unjudged = True
        try:
            _check_weights(self.model)
            scored = evaluate(
                self.accelerator, self.model, bench, self.tokenizer, validation, bench.splits.validation,
                tokens=self.fit.evaluation_tokens, kept=Kept(
                    self.folder.checkpoint, validation_name(progress.step), bench.spec.how, asked
                ),
            )  # fmt: skip
        except Diverged as diverged:  # a head knows no step
            raise Diverged(progress.step, diverged.reason) from diverged
        except SystemExit:  # told to end: the next attempt begins with this evaluation
            self.clock.evaluate()
            if progress.resumed_from[-1:] != [progress.step]:  # else the same is there already
                self.save()
            self.leave()
        self.clock.evaluate()
        progress.unjudged = False
        score = scored.metrics[metric.name]
        loss = statistics.fmean(scored.losses.values())
        if not math.isfinite(loss):
            raise Diverged(progress.step, f"the loss on validation is {loss}")
        record = {
            "kind": "eval", "step": progress.step, "score": score, "loss": loss, **scored.metrics,
            **scored.calibration,
        }  # fmt: skip
        append_json_line(self.folder.metrics_file, record)
        if bench.spec.may_go_on:
            progress.compare_by(loss, scored, last=rules.keep == "last")
        gain = self._gain(score, progress.peak_score)
        if gain > 0:
            progress.peak_score = score
        if gain > 0 or rules.keep == "last":
            progress.keep(score, scored)
            if keeps_best(bench.spec):
                self.writer.wait()
                checkpoint.save_best(self.folder.checkpoint, progress.step, self.model)
        stopping = rules.early_stopping
        if stopping is not None and regular:
            gain = self._gain(score, progress.regular_peak)
            if gain > 0:
                progress.regular_peak = score
            enough = gain > stopping.min_delta
            progress.evaluations_without_gain = 0 if enough else progress.evaluations_without_gain + 1
            progress.stopped_early = progress.evaluations_without_gain >= stopping.patience

    def _gain(self, score: float, peak: float | None) -> float:
        """By how much a score is better than the best before it."""
        sign = 1 if metric_of(self.bench.spec.task).higher_is_better else -1
        return math.inf if peak is None else sign * (score - peak)

    def prove(self, batches: Sequence[Sequence[Feature]]) -> None:
        """A step on each of the heaviest batches that leaves no trace: whether the memory foretold suffices.

        The rate is zero, so that AdamW leaves every weight as it is, bit for bit; its state is thrown away.

        Raises:
            OutOfMemory: it does not.
            Diverged: the batch gives no finite gradient, from which no step leaves the weights as they are.
        """
        before = copy.deepcopy(self.progress)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for batch in batches:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.backward(batch)
            norm = self.stepper.finish()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(0, f"before the first step, the loss is {loss} and the gradient norm {norm}")
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)
        vars(self.progress).update(vars(before))
        check(self.fit)
        self.folder.write_fit(self.fit.model_copy(update={"proved": True}))
        self.folder.event("memory proved", peak_bytes=peak_bytes(), rows=[len(batch) for batch in batches])

    def keep_to_budget(self) -> None:
        """End a run that has taken more memory than it may, with a checkpoint: it goes on with less at once."""
        try:
            check(self.fit)
        except OutOfMemory:
            self.save()
            self.writer.wait()
            raise

    def save(self) -> None:
        """A checkpoint of this step."""
        self.writer.wait()  # before a second copy is taken
        self.clock.train()
        self.progress.decay_owed = self.used.owed if self.used is not None else 1.0
        place, judged = self.folder.checkpoint, self.progress.step - self.progress.unjudged
        taken = checkpoint.take(
            self.progress.step, self.model, self.optimizer, self.scheduler, asdict(self.progress),
            copy=self.writer.beside,
        )  # fmt: skip

        def write() -> None:
            started = time.perf_counter()
            checkpoint.save(place, taken)
            seconds = round(time.perf_counter() - started, 3)
            drop_up_to(place, judged)
            self.folder.event("checkpoint", step=taken.step, seconds=seconds, peak_bytes=peak_bytes())

        self.writer.do(write)

    def leave(self) -> NoReturn:
        """End the process as it was told to; a checkpoint is there."""
        self.writer.wait()
        sys.stderr.write(f"asked to end: left after step {self.progress.step}, with a checkpoint\n")
        self.folder.event("left when asked to end", step=self.progress.step)
        sys.exit(EXIT_CODE)


@torch.no_grad()
def _check_weights(model: Any) -> None:
    for name, parameter in checkpoint.trained_tensors(model).items():
        # The ends tell of all, and take no memory: what is not a number comes through.
        if parameter.numel() and not all(map(math.isfinite, torch.stack(torch.aminmax(parameter)).tolist())):
            raise Diverged(0, f"{name} holds a weight that is not finite")


def keeps_best(spec: RunSpec) -> bool:
    """A trial's weights are never used again; of all others the best are what is tested."""
    return spec.stage != "trial" and spec.rules.keep == "best"
