"""Modules of a stacked model: each does to every training's rows what its own module does alone. Child side.

The rows of a batch lie training by training (`GROUPS`), padded to the longest of all, or as tokens without any
padding (`trimmed.py`); a training's own part is what it has alone, and so is the stream its dropout draws from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import AttentionInterface

from finetrial.ragged import Lengths, of_rows


@dataclass
class Group:
    """One training's part of a stacked batch.

    Where its rows are, and its tokens where padding is left out; how long its rows are; its state of random
    numbers.
    """

    rows: slice
    tokens: slice
    length: int
    state: torch.Tensor
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class Groups(list[Group]):
    """The groups of the batch that is under way."""

    @contextlib.contextmanager
    def drawing(self, group: Group) -> Iterator[None]:
        """Draw what is drawn here from a group's own stream."""
        random_state(group.state)
        yield
        group.state = random_state()

    def parts(self, values: torch.Tensor) -> list[slice]:
        """Where in values each group's own are: values of rows, or of tokens."""
        tokens = len(values) == self[-1].tokens.stop
        return [group.tokens if tokens else group.rows for group in self]

    def each(self, values: torch.Tensor, what: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Do something to each group's own values, from its own stream; 0 beyond their length."""
        found = []
        for index, (group, part) in enumerate(zip(self, self.parts(values), strict=True)):
            if not group.length:  # it has no rows in this part
                continue
            own = values[part]
            if values.ndim > 2:  # as it is alone: on a GPU what dropout draws depends on how it lies in memory
                own = own[:, : group.length].contiguous()
            with self.drawing(group):
                own = what(index, own)
            missing = values.shape[1] - own.shape[1] if own.ndim > 2 else 0
            found.append(functional.pad(own, [0, 0] * (own.ndim - 2) + [0, missing]) if missing else own)
        return torch.cat(found)

    def side_by_side(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, length, features] as [groups, rows x length, features]; rows of 0 where a group has fewer."""
        counts = [part.stop - part.start for part in self.parts(values)]
        most = max(counts)
        if min(counts) < most:
            own = values.split(counts)
            values = torch.cat(
                [
                    functional.pad(each, (0, 0, 0, 0, 0, most - count))
                    for each, count in zip(own, counts, strict=True)
                ]
            )
        return values.reshape(len(self), most * values.shape[1], values.shape[2])

    def as_were(self, apart: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The opposite: in rows, or tokens, as `like`."""
        apart = apart.view(len(self), -1, like.shape[1], apart.shape[-1])
        counts = [part.stop - part.start for part in self.parts(like)]
        return torch.cat([own[:count] for own, count in zip(apart, counts, strict=True)])


GROUPS = Groups()  # attention is called by the library, which hands nothing of ours through


class StackedLora(nn.Module):
    """A frozen linear layer once, and beside it every training's adapter on its own rows."""

    def __init__(self, layers: Sequence[Any]):
        super().__init__()
        self.base_layer = layers[0].base_layer
        self.own = list(layers)  # a list: they are the trainings' modules, not this one's
        self.name = layers[0].active_adapters[0]
        self.drops = any(self._dropout(layer) for layer in layers)

    def _dropout(self, layer: Any) -> float:
        return float(getattr(layer.lora_dropout[self.name], "p", 0.0))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if values.ndim == 2:  # tokens, or pooled: one position a row
            return self.forward(values.unsqueeze(1)).squeeze(1)
        output = self.base_layer(values)
        if self.drops:
            values = GROUPS.each(
                values, lambda i, own: functional.dropout(own, self._dropout(self.own[i]), self.training)
            )
        downs = [layer.lora_A[self.name].weight for layer in self.own]
        ups = [layer.lora_B[self.name].weight * layer.scaling[self.name] for layer in self.own]
        most = max(down.shape[0] for down in downs)
        down = torch.stack([functional.pad(down, (0, 0, 0, most - down.shape[0])) for down in downs])
        up = torch.stack([functional.pad(up, (0, most - up.shape[1])) for up in ups])
        inner = torch.bmm(GROUPS.side_by_side(values), down.to(values.dtype).transpose(1, 2))
        added = torch.bmm(inner, up.to(inner.dtype).transpose(1, 2))
        return output + GROUPS.as_were(added, values).to(output.dtype)


class StackedRows(nn.Module):
    """Every training's own module on its own rows: a head."""

    def __init__(self, modules: Sequence[Any]):
        super().__init__()
        self.own = list(modules)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return GROUPS.each(values, lambda i, own: self.own[i](own))


class StackedDropout(nn.Module):
    """Dropout of the base, each training's drawn from its own stream."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return values
        return GROUPS.each(values, lambda _, own: functional.dropout(own, self.p, training=True))


def attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    dropout: float = 0.0, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The library's attention; where it drops, each training's rows by themselves."""
    alone = AttentionInterface()["sdpa"]
    if not dropout:
        return alone(module, query, key, value, attention_mask, dropout=0.0, **options)
    whole, found = query.shape[2], []
    for group in (group for group in GROUPS if group.length):
        cut = (group.rows, slice(None), slice(group.length))
        mask = attention_mask
        if mask is not None:
            rows = group.rows if mask.shape[0] > 1 else slice(None)
            mask = mask[rows, :, : group.length, : group.length]
        with GROUPS.drawing(group):
            own, _ = alone(module, query[cut], key[cut], value[cut], mask, dropout=dropout, **options)
        # Of its own length, for one query may be all there is.
        found.append(functional.pad(own, (0, 0, 0, 0, 0, whole - own.shape[1])))
    return torch.cat(found), None


def attention_of_tokens(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Lengths, p: float, scale: float
) -> torch.Tensor:
    """`ragged.of_rows`, each training's rows by themselves."""
    found = []
    for group, queries in zip(GROUPS, GROUPS.parts(query), strict=True):
        if group.length:
            with GROUPS.drawing(group):
                own, keys = lengths.part(group.rows), group.tokens
                found.append(of_rows(query[queries], key[keys], value[keys], own, p, scale))
    return torch.cat(found)


def random_state(new: torch.Tensor | None = None) -> torch.Tensor:
    """The state of the generator that dropout draws from; `new` takes its place."""
    if torch.cuda.is_available():
        if new is not None:
            torch.cuda.set_rng_state(new)
        return torch.cuda.get_rng_state()
    if new is not None:
        torch.set_rng_state(new)
    return torch.get_rng_state()
