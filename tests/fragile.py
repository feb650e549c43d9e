"""Plug-ins that tests put in a study: the built-in ones, with a switch that makes them fail or tell.

They go through the same doors as a user's own (`fragile:QA`), so nothing of finetrial is replaced.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from finetrial.frozen import Setting
from finetrial.heads.extractive_qa import ExtractiveQa
from finetrial.methods.full import Full
from finetrial.plugins import AttachInput, Group, Scored
from finetrial.tasks.synthetic_qa import SyntheticQa


class Interrupted(BaseException):
    """As Ctrl-C or a signal: no `except Exception` catches it."""


@dataclass
class Trouble:
    """What goes wrong, counted in loss computations (micro-batches) from 1; and what was seen."""

    interrupt_at: int | None = None
    sigterm_at: int | None = None
    error_at: tuple[int, Exception] | None = None
    nan_loss_at: int | None = None
    interrupt_at_prediction: int | None = None  # a batch of an evaluation
    sigterm_at_prediction: int | None = None
    nan_logits_at_evaluation: int | None = None
    scores: list[float] = field(default_factory=list)  # the F1 that evaluations say, one after the other
    loss_factors: list[float] = field(default_factory=list)  # what the losses of evaluations are multiplied by
    losses: int = 0
    evaluations: int = 0
    predictions: int = 0
    calibrations: list[Any] = field(default_factory=list)  # what each evaluation was given
    batches: list[list[list[int]]] = field(default_factory=list)  # the inputs seen, without padding

    def reset(self, **switches: Any) -> None:
        """Everything as at first, apart from the switches given."""
        self.__init__(**switches)  # type: ignore[misc]


TROUBLE = Trouble()


class FragileHead(ExtractiveQa):
    """Extractive question answering that can be made to fail."""

    def losses(self, outputs: Any, batch: Mapping[str, Any]) -> Any:
        counted = isinstance(batch["input_ids"], FakeTensor)  # its memory is; nothing is computed
        if counted or not torch.is_grad_enabled():  # the latter within an evaluation
            factors = TROUBLE.loss_factors or [1.0]
            return super().losses(outputs, batch) * factors[min(TROUBLE.evaluations, len(factors) - 1)]
        TROUBLE.losses += 1
        lengths = batch["attention_mask"].sum(1).tolist()
        rows = batch["input_ids"].tolist()
        TROUBLE.batches.append([row[:length] for row, length in zip(rows, lengths, strict=True)])
        if TROUBLE.losses == TROUBLE.interrupt_at:
            raise Interrupted
        if TROUBLE.losses == TROUBLE.sigterm_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if TROUBLE.error_at and TROUBLE.losses == TROUBLE.error_at[0]:
            raise TROUBLE.error_at[1]
        loss = super().losses(outputs, batch)
        return loss * math.nan if TROUBLE.losses == TROUBLE.nan_loss_at else loss

    def predictions(self, outputs: Any, batch: Mapping[str, Any]) -> list[Any]:
        TROUBLE.predictions += 1
        if TROUBLE.predictions == TROUBLE.interrupt_at_prediction:
            raise Interrupted
        if TROUBLE.predictions == TROUBLE.sigterm_at_prediction:
            os.kill(os.getpid(), signal.SIGTERM)
        if TROUBLE.evaluations + 1 == TROUBLE.nan_logits_at_evaluation:
            outputs.start_logits = outputs.start_logits * math.nan
        return super().predictions(outputs, batch)

    def score(self, *arguments: Any, **options: Any) -> Scored:
        TROUBLE.evaluations += 1
        given = options.get("calibration", arguments[4] if len(arguments) > 4 else None)
        TROUBLE.calibrations.append(given and dict(given))
        scored = super().score(*arguments, **options)
        if not TROUBLE.scores:
            return scored
        said = TROUBLE.scores[min(TROUBLE.evaluations, len(TROUBLE.scores)) - 1]
        return Scored({**scored.metrics, "f1": said}, scored.calibration, scored.per_example)


class FragileTask(SyntheticQa):
    head = FragileHead()


class HeadOnly(Full):
    """A faulty method: it says that the body has to move, and freezes it."""

    def attach(self, given: AttachInput, settings: Mapping[str, Setting], params: Any) -> Any:
        model = super().attach(given, settings, params)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.group(name, given.head_names) == "head")
        return model

    def must_move(self) -> Sequence[Group]:
        return ("head", "body")


QA = FragileTask()
HEAD_ONLY = HeadOnly()
