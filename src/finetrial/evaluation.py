"""What a model predicts on a split, and its scores. Child side.

A long evaluation keeps the model's outputs as it goes, so that a killed process does not begin it again. Which
split is scored when, and with which calibration, is `train.py`'s and `stages.py`'s.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from finetrial import checkpoint, files
from finetrial.assemble import Workbench, input_hash
from finetrial.batching import EVALUATION_TOKENS, collate, evaluation_batches, model_inputs
from finetrial.notice import EXIT_CODE
from finetrial.plugins import Example, Feature, Scored
from finetrial.records import short_hash
from finetrial.store import RunFolder

# Outputs of a batch that take more than this are not kept: no task of today has them, and disk is not for that.
MOST_KEPT_BYTES = 64 * 10**6


class _Outputs(dict[str, torch.Tensor]):
    """A model's outputs, read back: tensors by name, as attributes, too."""

    def __getattr__(self, name: str) -> torch.Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Kept:
    """Outputs of the batches of one evaluation, written as often as a run's checkpoints are.

    They hold for the same weights, inputs and batches only, whose hash lies beside them. A part that is
    damaged, or of another evaluation, is left out and computed again.
    """

    def __init__(self, folder: RunFolder, *, asked: Callable[[], bool] = lambda: False):
        """`asked`: whether the process was told to end."""
        self.place = folder.checkpoint / checkpoint.EVALUATION
        self.due = checkpoint.rule(folder.spec().how)
        self.asked = asked
        self._new: dict[str, torch.Tensor] = {}
        self._read: dict[str, torch.Tensor] = {}
        self._last = 0
        self._key: str | None = None
        self._key_of: Callable[[], str] = str

    def begin(self, key_of: Callable[[], str]) -> None:
        """Read what an earlier process has left. `key_of` is asked only where there is something to compare."""
        self._key_of = key_of
        for part in sorted(self.place.iterdir()) if self.place.is_dir() else []:
            fault = files.damage(part)
            if fault is None and json.loads((part / "key.json").read_text())["key"] != self.key:
                fault = "it is of another evaluation"
            if fault is None:
                self._read |= load_file(part / "outputs.safetensors")
            else:
                sys.stderr.write(f"kept outputs {part.name} are left out: {fault}\n")
                files.discard(part)

    @property
    def key(self) -> str:
        if self._key is None:
            self._key = self._key_of()
        return self._key

    def get(self, number: int, device: Any) -> _Outputs | None:
        """The outputs of a batch, if they are there."""
        start = f"{number}."
        found = {n.removeprefix(start): t for n, t in self._read.items() if n.startswith(start)}
        return _Outputs({name: tensor.to(device) for name, tensor in found.items()}) if found else None

    def add(self, number: int, outputs: Mapping[str, Any], *, last: bool) -> None:
        """Take in a batch's outputs; write them if it is time to, and there are more to come.

        Raises:
            SystemExit: the process was told to end; what it has is written.
        """
        if last:
            return
        tensors = {name: tensor for name, tensor in outputs.items() if torch.is_tensor(tensor)}
        if sum(tensor.nbytes for tensor in tensors.values()) <= MOST_KEPT_BYTES:
            # Copies: a view would be written with all that it is a view of.
            self._new |= {f"{number}.{name}": t.detach().cpu().clone() for name, t in tensors.items()}
        leaving = self.asked()
        if self._new and (self.due(number + 1) or leaving):
            self.write(number)
        if leaving:
            sys.stderr.write("asked to end: left within an evaluation, with what was computed of it\n")
            raise SystemExit(EXIT_CODE)

    def write(self, number: int) -> None:
        with checkpoint.committed(self.place / f"to-{number:08d}") as temporary:
            save_file(self._new, temporary / "outputs.safetensors")
            files.write_json(temporary / "key.json", {"key": self.key})
        self._new = {}

    def end(self) -> None:
        """The evaluation is complete: nobody needs them any more."""
        files.discard(self.place)


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
    """Scores of a split, so many tokens at a time. Validation chooses the calibration; test is given it."""
    model.eval()
    predictions: list[Any] = [None] * len(features)

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
                outputs = model(**model_inputs(tensors))
                if kept is not None:
                    kept.add(number, outputs, last=number + 1 == len(batches))
            made = bench.task.head.predictions(outputs, tensors)
            for index, prediction in zip(indices, made, strict=True):
                predictions[index] = prediction
    scored = bench.task.head.score(predictions, features, examples, bench.task_params, calibration)
    if kept is not None:
        kept.end()
    return scored
