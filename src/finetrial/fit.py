"""How a run fits into its memory: the largest micro-batch within the budget, foretold and watched. Child side.

The effective batch never changes: it is split where it has to be, and gradients are summed. Where not even
one row fits, activations are computed twice instead of kept (gradient checkpointing). `memory.py` counts; this
decides.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch

from finetrial import lean, memory
from finetrial.assemble import Workbench, pick_device
from finetrial.batching import (
    EVALUATION_TOKENS,
    collate,
    evaluation_batches,
    heaviest,
    micro_batches,
    padded,
)
from finetrial.errors import DoesNotFit
from finetrial.models import Built
from finetrial.optimisation import how_to_step, make_optimizer, planned_batches, precision_of
from finetrial.plugins import Feature, Stepping
from finetrial.process_memory import budget_of, held_bytes
from finetrial.processes import cores
from finetrial.records import Fit, RunSpec
from finetrial.tables import shrink

# Of a budget, left free: how far the worst prediction lay below what was measured (bench/memory.py).
MARGIN = 0.05
# First touched during a step (code of kernels, workspaces): bench/memory.py.
FIRST_TOUCHED_BYTES = 20_000_000
# Where all that is freed is kept in case it serves again, a run takes up to 1.7 times what it needs
# (bench/memory.py). Where that is too much, large blocks are given back at once.
ROOMY = 2.0
# Tensors per output in the coarse bound: twice what the largest of bench/memory.py holds, and their spread.
COARSE = 8
# A prediction this close to the budget is proved by a step that is thrown away.
PROVED_SHARE = 0.7


def split(fit: Fit, batch: Sequence[Feature]) -> list[Sequence[Feature]]:
    """An effective batch in the micro-batches of a fit."""
    lengths = [len(feature.input_ids) for feature in batch]
    return [batch[part] for part in micro_batches(lengths, rows=fit.rows, tokens=fit.tokens)]


class Ladder:
    """The ways in which a trial or replicate can be fitted to its memory, each smaller than the one before.

    `shapes` is its model with the method attached, on the meta device; it is used up. `features` are trained
    on, and each of `evaluated` is a split that is evaluated. `built`: the base that it was made of.
    """

    def __init__(
        self, bench: Workbench, shapes: Any, features: Sequence[Feature],
        evaluated: Sequence[Sequence[Feature]], built: Built,
    ):  # fmt: skip
        self.bench, self.spec, self.shapes = bench, bench.spec, shapes
        self.pad_token_id, self.mapped = built.tokenizer.pad_token_id, built.mapped
        self.asked = bench.spec.how.gradient_checkpointing
        self.device = pick_device().type
        self.budget = budget_of(bench.spec.how.memory_bytes, bench.spec.how.parallel)
        shrink(shapes, features, self.pad_token_id, bench.spec, self.device)
        self.stacked = bench.spec.how.stacked
        self.frozen = _frozen_bytes(shapes, mapped=self.mapped and self.device == "cpu")
        self.held = held_bytes() + FIRST_TOUCHED_BYTES if self.device == "cpu" else 0
        lengths = [len(feature.input_ids) for feature in features]
        self.worst = heaviest([[features[i] for i in batch] for batch in planned_batches(lengths, bench.spec)])
        self.longest = max(features, key=lambda feature: len(feature.input_ids))
        self.judged = heaviest(
            [
                [split[i] for i in batch]
                for split in evaluated
                for batch in evaluation_batches([len(feature.input_ids) for feature in split])
            ]
        )

    def is_as(self, earlier: Fit | None) -> TypeGuard[Fit]:
        """Whether an earlier run was fitted to as much of the same: where memory ran out, it would again."""
        here = (self.device, self.budget, self.stacked)
        return earlier is not None and (earlier.device, earlier.budget, earlier.stacked) == here

    def choose(self, halvings: int, *, earlier: Fit | None = None, count: bool = False) -> Fit:
        """The largest that fits, or so many rungs below it: one for every time that memory ran out.

        `earlier`: of an attempt at the same run before this one; it stays, if it was asked for the same.
        `count`: also where the budget is so large that nobody need know what it takes.

        Raises:
            DoesNotFit: there is none; it says what takes how much.
        """
        how = self.spec.how
        asked = Fit(
            device=self.device, budget=self.budget, predicted=None, rows=how.micro_batch,
            checkpointing=bool(self.asked), checkpointing_asked=self.asked,
            evaluation_tokens=EVALUATION_TOKENS, halvings=halvings,
            shared=budget_of(None, 1) if how.packed else None, stacked=self.stacked,
        )  # fmt: skip
        counted = earlier is not None and (earlier.predicted is not None or not how.packed)
        if (
            earlier is not None
            and counted
            and all(
                getattr(earlier, name) == getattr(asked, name)
                for name in ("device", "budget", "rows", "checkpointing_asked", "halvings", "stacked")
            )
        ):
            return self.roomy(earlier.model_copy(update={"shared": asked.shared}))
        count = count or how.packed
        if not count and halvings == 0 and how.memory_bytes is None and self.surely_fits():
            return asked
        found = next(itertools.islice(self.rungs(asked), halvings, None), None)
        if found is None:
            step = self.step([self.longest], checkpointing=True, split=True)
            parts = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in step._asdict().items())
            raise DoesNotFit(
                f"one row of {len(self.longest.input_ids)} tokens at a time takes "
                f"{self.total(step) / 1e6:.0f} MB with gradient checkpointing ({parts}, the process "
                f"{self.held / 1e6:.0f} MB), and of the budget of {self.budget / 1e6:.0f} MB a run may be "
                f"foretold to take {self.most / 1e6:.0f} MB"
            )
        return self.roomy(found)

    def roomy(self, found: Fit) -> Fit:
        """With what its process does with what it frees, which depends on how much room there is here.

        It changes no bit of the result, and so need not be what an earlier attempt did.
        """
        most, tight, surplus = self.budget, False, 1.0
        if found.shared is not None:  # as many beside it as there are cores for
            most = min(most, found.shared // max(1, cores() // self.spec.how.threads))
        if self.device == "cpu" and found.predicted is not None:
            tight = found.tokens is not None or ROOMY * found.predicted > most
            surplus = 1.0 if tight else ROOMY
        return found.model_copy(update={"tight": tight, "surplus": surplus})

    @property
    def most(self) -> int:
        """Bytes that a run may be foretold to take."""
        return int(self.budget * (1 - MARGIN))

    def rungs(self, asked: Fit) -> Iterator[Fit]:
        length = len(self.longest.input_ids)
        for checkpointing in (False, True) if self.asked is None else (self.asked,):
            first = self.largest(asked.model_copy(update={"checkpointing": checkpointing}))
            if first is None:
                continue
            yield first
            tokens = first.tokens or max(padded(split(first, batch)[0]) for batch in self.worst)
            while tokens >= 2 * length:
                tokens //= 2
                less = {"tokens": tokens, "evaluation_tokens": min(tokens, EVALUATION_TOKENS)}
                yield first.model_copy(update=less)

    def largest(self, asked: Fit) -> Fit | None:
        """The largest micro-batch that fits, or None if one row does not."""
        checkpointing = asked.checkpointing
        parts = [split(asked, batch) for batch in self.worst]
        several = any(len(those) > 1 for those in parts)
        evaluation = max(self.evaluation(batch) for batch in self.judged)
        predicted = max(
            self.total(self.step(part, checkpointing=checkpointing, split=several), evaluation)
            for part in heaviest([part for those in parts for part in those])
        )
        if predicted <= self.most:
            return asked.model_copy(update={"predicted": predicted})
        one, two = (
            self.total(self.step([self.longest] * count, checkpointing=checkpointing, split=True))
            for count in (1, 2)
        )
        if one > self.most:
            return None
        rows = 1 + (self.most - one) // max(1, two - one)
        if self.device == "cpu":
            # A power of two: what a process holds varies by some megabytes from one to the next, and the
            # split, on which the bits of the result depend, should not vary with it.
            rows = 1 << (rows.bit_length() - 1)
        tokens = rows * len(self.longest.input_ids)
        found = {
            "predicted": one + (rows - 1) * (two - one), "tokens": tokens,
            "evaluation_tokens": min(EVALUATION_TOKENS, tokens),
        }  # fmt: skip
        return asked.model_copy(update=found)

    def surely_fits(self) -> bool:
        """Whether a coarse upper bound is within the budget, so that the seconds of counting are saved.

        Everything trained by AdamW in fp32, and so many tensors of the size of each layer's output and of
        each head's attention.
        """
        config = self.shapes.config
        heads = getattr(config, "num_attention_heads", None)
        layers = getattr(config, "num_hidden_layers", None)
        if not isinstance(heads, int) or not isinstance(layers, int):
            return False
        weights = [module.weight for module in self.shapes.modules() if hasattr(module, "weight")]
        outputs = sum(weight.shape[-1 if weight.ndim == 1 else 0] for weight in weights if weight is not None)
        tables = [m for m in self.shapes.modules() if isinstance(m, torch.nn.Embedding)]
        outputs += sum(table.embedding_dim - table.num_embeddings for table in tables)
        most = max(padded(batch) for batch in (*self.worst, *self.judged))
        per_token = outputs + heads * layers * len(self.longest.input_ids)
        parameters = sum(parameter.numel() for parameter in self.shapes.parameters())
        return self.held + 4 * self.stacked * (6 * parameters + COARSE * most * per_token) < self.most

    def step(self, part: Sequence[Feature], *, checkpointing: bool, split: bool) -> memory.Step:
        """Bytes of a training step whose largest micro-batch is that."""
        checkpoint_gradients(self.shapes, on=checkpointing)
        return memory.training_step(
            self.shapes, collate(part, self.pad_token_id), self.bench.task.head.losses,
            partial(optimizer_without_values, self.spec), split=split,
            in_backward=how_to_step(self.spec).in_backward, autocast=self.autocast, device=self.device,
            mapped=self.mapped,
        )  # fmt: skip

    def evaluation(self, batch: Sequence[Feature]) -> int:
        tensors = collate(batch, self.pad_token_id)
        return memory.evaluation_batch(self.shapes, tensors, autocast=self.autocast, device=self.device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        bf16 = precision_of(self.spec.rules) == "bf16"
        return torch.autocast(self.device, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def total(self, step: memory.Step, evaluation: int = 0) -> int:
        """Bytes at the peak of the process. Trainings that are stacked share the frozen base; while another is
        built, two of it are there."""
        own = step.resident + step.gradients + step.optimizer + max(step.activations, evaluation)
        if self.stacked == 1:
            return self.held + own
        return self.held + 2 * self.frozen + self.stacked * (own - self.frozen)


def _frozen_bytes(model: Any, *, mapped: bool) -> int:
    """What is not trained and lies in memory, as in `memory.Step.resident`."""
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    return frozen - (memory.left_on_disk(model) if mapped else 0)


def optimizer_without_values(spec: RunSpec, trained: list[torch.nn.Parameter]) -> Any:
    """A run's own optimiser, or what it would take: a lean one reads values, which these have not."""
    how = how_to_step(spec)
    if how == Stepping():
        return make_optimizer(trained, spec)
    return memory.Stated(*lean.bytes_of(trained, rounding=how.rounding, quantised=how.state == "8bit"))


def checkpoint_gradients(model: Any, *, on: bool = True) -> None:
    """Have a model compute its activations again in the backward pass, or keep them, where its kind can."""
    if not hasattr(model, "gradient_checkpointing_enable"):
        return
    if not on:
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
