"""What a model predicts on a split, and its scores. Child side.

A long evaluation keeps the model's outputs as it goes, so that a killed process does not begin it again. Which
split is scored when, and with which calibration, is up to who asks: in training `loop.py`, else `stages.py`,
`measuring.py` or `rehearsal.py`.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from finetrial import checkpoint, files
from finetrial.assemble import Workbench, input_hash
from finetrial.batching import EVALUATION_TOKENS, collate, evaluation_batches, model_inputs
from finetrial.errors import Diverged
from finetrial.frozen import short_hash
from finetrial.notice import EXIT_CODE
from finetrial.plugins import Example, Feature, Scored, metric_of
from finetrial.records import How

# Outputs that wait to be written take no more than this; a batch that takes more by itself is not kept.
MOST_WAITING_BYTES = 64 * 10**6


class Outputs(dict[str, torch.Tensor]):
    """A model's outputs as a head sees them, computed or read back: its tensors by name, as attributes, too."""

    def __getattr__(self, name: str) -> torch.Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Kept:
    """Outputs of the batches of one evaluation, written as often as a run's checkpoints are.

    They hold for the same weights, inputs and batches only, whose hash lies beside them. A part that is
    damaged, or of another evaluation, is left out and computed again. They stay until the run goes on
    (`drop_up_to`) or ends.
    """

    def __init__(self, checkpoints: Path, name: str, how: How, asked: Callable[[], bool] = lambda: False):
        """`name`: of the evaluation, within its run. `asked`: whether the process was told to end."""
        self.place = checkpoints / checkpoint.EVALUATION / name
        self.due = checkpoint.rule(how)
        self.asked = asked
        self._waiting: dict[str, torch.Tensor] = {}
        self._read: dict[int, Outputs] = {}

    def begin(self, key_of: Callable[[], str]) -> None:
        """Read what an earlier process has left. `key_of` is asked only where there is something to compare."""
        self._key = functools.cache(key_of)
        for part in sorted(self.place.iterdir()) if self.place.is_dir() else []:
            fault = files.damage(part)
            if fault is None and json.loads((part / "key.json").read_text())["key"] != self._key():
                fault = "it is of another evaluation"
            if fault is None:
                for name, tensor in load_file(part / "outputs.safetensors").items():
                    number, _, field = name.partition(".")
                    self._read.setdefault(int(number), Outputs())[field] = tensor
            else:
                sys.stderr.write(f"kept outputs {part.name} are left out: {fault}\n")
                files.discard(part)

    def get(self, number: int, device: Any) -> Outputs | None:
        """The outputs of a batch, if they are there."""
        found = self._read.get(number)
        return None if found is None else Outputs({name: tensor.to(device) for name, tensor in found.items()})

    def add(self, number: int, outputs: Outputs, *, last: bool) -> None:
        """Take in a batch's outputs; write them if it is time to, and there are more to come.

        Raises:
            SystemExit: the process was told to end; what it has is written.
        """
        if last:
            return
        if sum(tensor.nbytes for tensor in outputs.values()) <= MOST_WAITING_BYTES:
            # Copies: a view would be written with all that it is a view of.
            self._waiting |= {f"{number}.{name}": t.detach().cpu().clone() for name, t in outputs.items()}
        full = sum(tensor.nbytes for tensor in self._waiting.values()) > MOST_WAITING_BYTES
        leaving = self.asked()
        if self._waiting and (self.due(number + 1) or full or leaving):
            self.write(number)
        if leaving:
            sys.stderr.write("asked to end: left within an evaluation, with what was computed of it\n")
            raise SystemExit(EXIT_CODE)

    def write(self, number: int) -> None:
        with checkpoint.committed(self.place / f"to-{number:08d}") as temporary:
            save_file(self._waiting, temporary / "outputs.safetensors")
            files.write_json(temporary / "key.json", {"key": self._key()})
        self._waiting = {}


def validation_name(step: int) -> str:
    """What `Kept` calls the evaluation after a step."""
    return f"validation-{step:08d}"


def drop_up_to(checkpoints: Path, step: int) -> None:
    """Delete the outputs of evaluations up to a step: the run has gone on from there."""
    place = checkpoints / checkpoint.EVALUATION
    for path in place.glob("validation-*"):
        if path.name <= validation_name(step):
            files.discard(path)


def evaluate(
    accelerator: Accelerator,
    model: Any,
    bench: Workbench,
    tokenizer: Any,
    features: Sequence[Feature],
    examples: Sequence[Example],
    calibration: dict[str, float] | None = None,
    *,
    tokens: int = EVALUATION_TOKENS,
    kept: Kept | None = None,
) -> Scored:
    """Scores of a split, so many tokens at a time. Validation chooses the calibration; test is given it.

    A metric that is not a finite number is left out.

    Raises:
        Diverged: it is the one that the task is judged by.
    """
    model.eval()
    predictions: list[Any] = [None] * len(features)
    losses = [math.nan] * len(features)

    def key() -> str:
        weights = checkpoint.weights_hash(checkpoint.trained_tensors(accelerator.unwrap_model(model)))
        return short_hash([weights, input_hash(features), tokens], 32)

    if kept is not None:
        kept.begin(key)
    with torch.no_grad():
        batches = evaluation_batches([len(feature.input_ids) for feature in features], tokens)
        for number, indices in enumerate(batches):
            tensors = collate([features[i] for i in indices], tokenizer.pad_token_id, accelerator.device)
            outputs = kept.get(number, accelerator.device) if kept is not None else None
            if outputs is None:
                computed = model(**model_inputs(tensors)).items()
                outputs = Outputs({name: value for name, value in computed if torch.is_tensor(value)})
                if kept is not None:
                    kept.add(number, outputs, last=number + 1 == len(batches))
            made = bench.task.head.predictions(outputs, tensors)
            lost = bench.task.head.losses(outputs, tensors).tolist()
            for index, prediction, loss in zip(indices, made, lost, strict=True):
                predictions[index], losses[index] = prediction, loss
    scored = bench.task.head.score(predictions, features, examples, bench.task_params, calibration)
    name = metric_of(bench.spec.task).name
    if not math.isfinite(score := scored.metrics.get(name, 0.0)):
        raise Diverged(0, f"the score is {score}")
    known = {name: value for name, value in scored.metrics.items() if math.isfinite(value)}
    return replace(scored, metrics=known, losses=_by_example(losses, features, examples))


def _by_example(
    losses: Sequence[float], features: Sequence[Feature], examples: Sequence[Example]
) -> dict[str, float]:
    """Of each example the mean over its inputs."""
    own: dict[str, list[float]] = {}
    for loss, feature in zip(losses, features, strict=True):
        own.setdefault(examples[feature.row]["id"], []).append(loss)
    return {name: math.fsum(values) / len(values) for name, values in own.items()}
