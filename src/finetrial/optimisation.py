"""What a run's settings become: steps, AdamW, a schedule, evaluation points; and the settings read back.

The same for every method. Child side; nothing is trained here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers import get_scheduler

from finetrial.batching import epoch_batches
from finetrial.frozen import Setting, stream_seed
from finetrial.lean import LeanAdamW
from finetrial.plugins import Stepping, stepping_of
from finetrial.records import LoopRules, RunSpec


def plan_steps(spec: RunSpec, inputs: int) -> tuple[int, int]:
    """(Optimiser steps in all, steps per epoch) for that many training inputs."""
    steps_per_epoch = math.ceil(inputs / int(spec.settings["batch_size"]))
    return max(1, math.ceil(float(spec.settings["epochs"]) * steps_per_epoch)), steps_per_epoch


def planned_batches(lengths: Sequence[int], spec: RunSpec, done: int = 0) -> Iterator[list[int]]:
    """The effective batches from step `done` + 1 to the last; a position in the data is a step number."""
    planned_steps, per_epoch = plan_steps(spec, len(lengths))
    for epoch in range(done // per_epoch, math.ceil(planned_steps / per_epoch)):
        batches = epoch_batches(
            lengths, int(spec.settings["batch_size"]), seed=spec.seeds.data_order, epoch=epoch
        )
        yield from batches[max(0, done - epoch * per_epoch) : planned_steps - epoch * per_epoch]


def precision_of(rules: LoopRules) -> str:
    """`bf16` or `fp32`: `auto` is bf16 autocast on a GPU that has it."""
    if rules.precision != "auto":
        return rules.precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def could_be_bf16(spec: RunSpec) -> bool:
    """Whether `auto` has chosen fp32 on a processor that has instructions for bf16: with them it is faster."""
    asked = spec.rules.precision == "auto" and not _has_bf16_weights(spec)
    return asked and not torch.cuda.is_available() and _processor_has_bf16()


def is_slow_in_bf16(spec: RunSpec) -> bool:
    """Whether a run computes in bf16 on a processor without instructions for it: fp32 is many times faster."""
    asked = spec.rules.precision == "bf16" or _has_bf16_weights(spec)
    return asked and not torch.cuda.is_available() and not _processor_has_bf16()


def _has_bf16_weights(spec: RunSpec) -> bool:
    """Then it computes in bf16 whatever the precision."""
    return how_to_step(spec).rounding != Stepping().rounding


def _processor_has_bf16() -> bool:
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))


def make_optimizer(trained: Sequence[torch.nn.Parameter], spec: RunSpec) -> torch.optim.Optimizer:
    """AdamW over the trained parameters: torch's, or a lean one if the method says so.

    Biases and norm weights (one-dimensional tensors) get no weight decay, as is usual for transformers.
    """
    decay = float(spec.settings["weight_decay"])
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate, stepping = float(spec.settings["learning_rate"]), how_to_step(spec)
    if stepping == Stepping():
        # The fused kernel of a CPU takes weight, gradient and moments to lie alike.
        return torch.optim.AdamW(groups, lr=rate, fused=all(p.is_contiguous() for p in trained))
    return LeanAdamW(
        groups, lr=rate, rounding=stepping.rounding, quantised=stepping.state == "8bit",
        seed=stream_seed(spec.seeds.dropout, "rounding"),
    )  # fmt: skip


def prepare_optimisation(
    accelerator: Accelerator, trained: Sequence[torch.nn.Parameter], spec: RunSpec, planned_steps: int
) -> tuple[Any, Any]:
    """An optimiser as Accelerate wants it, and a schedule with warm-up and decay."""
    optimizer = make_optimizer(trained, spec)
    warmup_steps = round(float(spec.settings["warmup_ratio"]) * planned_steps)
    name = "constant_with_warmup" if spec.rules.schedule == "constant" else spec.rules.schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=planned_steps)
    return accelerator.prepare(optimizer), scheduler


def how_to_step(spec: RunSpec) -> Stepping:
    """How the run's method wants its parameters stepped."""
    return stepping_of(spec.method) if spec.method else Stepping()


def evaluation_steps(planned_steps: int, steps_per_epoch: int, per_epoch: int) -> set[int]:
    """After which steps to evaluate: evenly within each epoch, and always after the last."""
    count = math.ceil(planned_steps / steps_per_epoch * per_epoch)
    steps = {round(k * steps_per_epoch / per_epoch) for k in range(1, count + 1)}
    return {step for step in steps if 0 < step < planned_steps} | {planned_steps}


def settings_used(
    asked: Mapping[str, Setting], optimizer: Any, scheduler: Any, largest_batch: int,
    planned_steps: int, steps_per_epoch: int,
) -> dict[str, Setting]:  # fmt: skip
    """The settings as the optimiser, the schedule, the batches and the modules had them.

    Read back, not copied from the spec: a setting that was searched and did not arrive shows here. Warm-up
    and epochs become whole steps; they are confirmed when the steps found are those that they round to.
    """
    shape = scheduler.lr_lambdas[0]
    warmup_steps = next((step for step in range(planned_steps) if shape(step) == 1.0), planned_steps)
    return {
        "learning_rate": float(max(group["initial_lr"] for group in optimizer.param_groups)),
        "weight_decay": float(max(group["weight_decay"] for group in optimizer.param_groups)),
        "warmup_steps": warmup_steps,
        "warmup_ratio": asked["warmup_ratio"]
        if warmup_steps == round(float(asked["warmup_ratio"]) * planned_steps)
        else warmup_steps / planned_steps,
        "batch_size": largest_batch,
        "epochs": asked["epochs"]
        if planned_steps == max(1, math.ceil(float(asked["epochs"]) * steps_per_epoch))
        else planned_steps / steps_per_epoch,
    }
