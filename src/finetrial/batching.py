"""Batches: which inputs belong together, in which order, and how they become tensors.

The order is a pure function of (seed, epoch), so a position in the data is a number and resuming needs no
state. Inputs of similar length are grouped and padded to their own longest row, never to a maximum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from finetrial.plugins import Feature

# Length grouping sorts within blocks of this many batches, and of at most a quarter of them all: enough to
# leave little padding, small enough that no two epochs have the same batches. Both as in transformers'
# LengthGroupedSampler.
GROUPED_BATCHES = 50
LEAST_BLOCKS = 4
# Non-padding budget of an evaluation batch, in tokens; bounded so that long inputs cannot exhaust memory.
EVALUATION_TOKENS = 8192


def epoch_batches(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch: every input once, grouped by length, in seeded order; the last may be short."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    grouped = min(GROUPED_BATCHES, len(order) // (batch_size * LEAST_BLOCKS))
    block = batch_size * max(1, grouped)
    batches: list[list[int]] = []
    for start in range(0, len(order), block):
        # A stable sort: inputs of one length stay in random order.
        chunk = sorted(order[start : start + block].tolist(), key=lambda i: -lengths[i])
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    # The only batch that may be short stays the last, so that every full step has batch_size rows.
    short = [batch for batch in batches if len(batch) < batch_size]
    full = [batch for batch in batches if len(batch) == batch_size]
    return [full[i] for i in rng.permutation(len(full))] + short


def evaluation_batches(lengths: Sequence[int], budget: int = EVALUATION_TOKENS) -> list[list[int]]:
    """Batches in order of length, each of at most `budget` tokens including padding."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[index] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def micro_batches(lengths: Sequence[int], *, rows: int | None = None, tokens: int | None = None) -> list[slice]:
    """An effective batch in parts, in order: each of at most so many rows and tokens, padding included.

    A part has one row at least, whatever its length.
    """
    parts: list[slice] = []
    start, longest = 0, 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        count = index - start + 1
        if count > 1 and (
            (rows is not None and count > rows) or (tokens is not None and count * longest > tokens)
        ):
            parts.append(slice(start, index))
            start, longest = index, length
    return [*parts, slice(start, len(lengths))]


def longest(batch: Iterable[Feature]) -> int:
    """Tokens of the longest input."""
    return max(len(feature.input_ids) for feature in batch)


def padded(batch: Sequence[Feature]) -> int:
    """Tokens of a batch, padding included."""
    return len(batch) * longest(batch)


def heaviest(batches: Sequence[Sequence[Feature]]) -> list[Sequence[Feature]]:
    """The batches one of which takes the most memory: those of the most tokens and of the most attention.

    Attention's part grows with the square of the length, all else with the length: which of a full batch and
    a short one of longer inputs takes more depends on the model; and so it does whether padding counts. One
    batch, where it is the same.
    """

    def sizes(batch: Sequence[Feature]) -> tuple[int, ...]:
        lengths = [len(feature.input_ids) for feature in batch]
        places = len(lengths) * max(lengths)
        return places, places * max(lengths), sum(lengths), sum(length * length for length in lengths)

    each = [(sizes(batch), batch) for batch in batches]
    found = [max(each, key=lambda one: (one[0][by], one[0]))[1] for by in range(4)]
    return list({id(batch): batch for batch in found}.values())


def collate(features: Sequence[Feature], pad_token_id: int, device: Any = "cpu") -> dict[str, torch.Tensor]:
    """Tensors of some inputs, padded on the right to the longest of them.

    `input_ids`, `attention_mask`, `token_type_ids` (if the inputs have them), `pool_mask` (1 on the text's
    own tokens) are [inputs, length]; every label is [inputs], int64.
    """
    length = longest(features)

    def rows(values: Iterable[Sequence[int]], padding: int) -> torch.Tensor:
        return torch.tensor([[*own, *[padding] * (length - len(own))] for own in values], dtype=torch.int64)

    places = torch.arange(length)
    counts, starts, ends = (
        torch.tensor(each)[:, None]
        for each in zip(*((len(one.input_ids), *one.content) for one in features), strict=True)
    )
    batch = {
        "input_ids": rows((feature.input_ids for feature in features), pad_token_id),
        "attention_mask": (places < counts).long(),
        "pool_mask": ((starts <= places) & (places < ends)).long(),
    }
    if features[0].token_type_ids is not None:
        batch["token_type_ids"] = rows((feature.token_type_ids or () for feature in features), 0)
    for name in features[0].labels:
        batch[name] = torch.tensor([feature.labels[name] for feature in features])
    return {name: tensor.to(device) for name, tensor in batch.items()}


MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def model_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The part of a batch that a model's forward takes."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}
