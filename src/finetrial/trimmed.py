"""An encoder's layers while it trains: without padding, and the last for what is read of it. Child side.

Padding has no part in the loss, nor in a gradient. On a CPU all but the attention itself is therefore done for
the tokens of all rows, one below the other, [tokens, features], and the attention for each row's own
(`ragged.py`). And of a classifier's last layer every position's keys and values are needed, but only the first
one's query, output and feed-forward part: in a model of six layers that is 14 % of the products.

In evaluation mode nothing changes: what is measured there is of whole layers, in rows.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import AttentionInterface

from finetrial.as_made import is_as_made, is_known, is_variant, variant_of
from finetrial.ragged import Lengths, Padding, of_rows

# Layers that are built alike, and whose classifiers read the first position (tests/test_trimmed.py).
LAYERS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "ElectraLayer")
# By the name of a model's attention: what does it to tokens of rows of some lengths, and drops.
OF_TOKENS: dict[str, Callable[..., torch.Tensor]] = {"sdpa": of_rows}
# Models that read no padding; and of these, those that read the first positions alone.
READERS = ("ForSequenceClassification", "ForQuestionAnswering")
OF_FIRSTS = "ForSequenceClassification"
# What adapters consist of, beside the kinds that a model has.
BESIDE = (nn.Linear, nn.Dropout, nn.Identity, nn.ModuleDict, nn.ParameterDict)
PUT_IN = ("peft.tuners.lora", "peft.utils.", "finetrial.")
# What an encoder is handed that its layers make no use of.
WITHOUT_EFFECT = ("use_cache", "encoder_attention_mask", "position_ids")

_told: ContextVar[tuple[int, Sequence[int]] | None] = ContextVar("told", default=None)
_reader: ContextVar[Any] = ContextVar("reader", default=None)  # the model under way


def trim(model: Any) -> bool:
    """Have an encoder do no more than is read while it trains; whether it is of such a kind.

    The encoder and the model become of kinds of the same names. To be called before adapters are put in: they
    are used where they are.
    """
    encoder = getattr(_body(model), "encoder", None)
    layers = getattr(encoder, "layer", None)
    if encoder is None or not layers or not all(map(_is_plain, layers)) or not _is_librarys(encoder):
        return False
    if not _is_librarys(model) or not type(model).__name__.endswith(READERS):
        return False
    encoder.kinds = frozenset(map(type, model.modules()))
    encoder.__class__, model.__class__ = _encoder_of(type(encoder)), _reader_of(type(model))
    return True


def _body(model: Any) -> Any:
    return getattr(model, getattr(model, "base_model_prefix", ""), None)


@contextlib.contextmanager
def told(mask: torch.Tensor | None) -> Iterator[None]:
    """Have a batch whose tensors have shapes only be taken for one of this mask [rows, length].

    One of another shape is a method's own doing, and counts whole.
    """
    before = _told.set(None if mask is None else (mask.shape[1], mask.sum(1).tolist()))
    try:
        yield
    finally:
        _told.reset(before)


def _is_plain(layer: Any) -> bool:
    usual = type(layer).__name__ in LAYERS and _is_librarys(layer)
    return usual and not layer.is_decoder and not layer.chunk_size_feed_forward


def _is_librarys(module: Any) -> bool:
    return type(module).__module__.startswith("transformers.models.") and not is_variant(module)


class Packed:
    """Rows of a batch as tokens, one below the other; takes the place of the attention mask in a layer.

    `counts`: how many tokens each has, which padding follows up to `length`; `mask`: the same as attention
    takes it.
    """

    def __init__(self, counts: Sequence[int], length: int, mask: torch.Tensor | None):
        self.shape, self.mask, self.lengths = (len(counts), length), mask, Lengths(counts)
        self.firsts = torch.tensor([0, *itertools.accumulate(counts[:-1])])  # of each row its first token
        self.padding = Padding.of(counts, length)

    def pack(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, length, features] as [tokens, features]."""
        rows = rows.reshape(-1, rows.shape[-1])
        return rows if self.padding is None else _Pack.apply(rows, self.padding)

    def unpack(self, tokens: torch.Tensor) -> torch.Tensor:
        """The opposite; what stands at padding means nothing, and has no gradient."""
        rows = tokens if self.padding is None else _Unpack.apply(tokens, self.padding)
        return rows.view(*self.shape, -1)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:  # pyrefly: ignore[bad-override]
        rows, ctx.padding = given
        return rows.index_select(0, ctx.padding.where)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # pyrefly: ignore[bad-override]
        # Less than half of what copying to where they belong takes.
        return gradients[0].index_select(0, ctx.padding.back).mul_(ctx.padding.real[:, None]), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:  # pyrefly: ignore[bad-override]
        tokens, ctx.padding = given
        return tokens.index_select(0, ctx.padding.back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # pyrefly: ignore[bad-override]
        return gradients[0].index_select(0, ctx.padding.where), None


@cache
def _encoder_of(kind: Any) -> type:
    """A kind of encoders that in training do no more than is read."""

    @wraps(kind.forward)
    def forward(self: Any, hidden_states: Any, attention_mask: Any = None, *others: Any, **options: Any) -> Any:
        if self.training and is_known(kind, kind.forward) and not _asks_for_more(others, options):
            found = _trained(self, hidden_states, attention_mask)
            if found is not None:
                return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=found)
        return kind.forward(self, hidden_states, attention_mask, *others, **options)

    return variant_of(kind, forward)


@cache
def _reader_of(kind: Any) -> type:
    """A kind of models that let their encoder know who reads what it gives."""

    @wraps(kind.forward)
    def forward(self: Any, *given: Any, **named: Any) -> Any:
        before = _reader.set(self if is_known(kind, kind.forward) else None)
        try:
            return kind.forward(self, *given, **named)
        finally:
            _reader.reset(before)

    return variant_of(kind, forward)


def _trained(encoder: Any, hidden: torch.Tensor, mask: Any) -> torch.Tensor | None:
    """What an encoder gives [rows, length, features]; None: it has to do it itself.

    Of classifiers at the first positions alone, [rows, 1, features].
    """
    reader = _reader.get()
    if encoder.config._attn_implementation not in OF_TOKENS or not _is_known(encoder, reader):
        return None
    firsts, (*before, last) = type(reader).__name__.endswith(OF_FIRSTS), encoder.layer
    packed = _packed(hidden, mask)
    if packed is not None:
        values = packed.pack(hidden)
        for layer in before:
            values = _once_or_twice(layer, _of_tokens, values, packed)
        if firsts:
            return _once_or_twice(last, _first_of_tokens, values, packed)
        return packed.unpack(_once_or_twice(last, _of_tokens, values, packed))
    if firsts and (mask is None or getattr(mask, "ndim", None) == 4):
        for layer in before:
            hidden = layer(hidden, mask)
        return _once_or_twice(last, _of_firsts, hidden, mask)
    return None


def _packed(hidden: torch.Tensor, mask: Any) -> Packed | None:
    """How the rows lie as tokens; None: it cannot be told."""
    if hidden.device.type != "cpu":
        return None
    rows, length, _ = hidden.shape
    if mask is None:
        return Packed([length] * rows, length, None)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[:2] != (rows, 1):
        return None
    keys = mask[:, :, :1]  # one for all queries, mostly written out
    if detect_fake_mode((hidden,)):
        told_length, counts = _told.get() or (0, ())
        return Packed(counts, length, keys) if (len(counts), told_length) == (rows, length) else None
    if not torch.equal(mask, keys.expand_as(mask)):
        return None
    real = keys[:, 0, 0] if keys.dtype == torch.bool else keys[:, 0, 0] == 0
    follows = real[:, :-1] | ~real[:, 1:]
    usual = bool(real[:, 0].all()) and bool(follows.all())
    return Packed(real.sum(1).tolist(), length, keys) if usual else None


def _is_known(encoder: Any, reader: Any) -> bool:
    """Whether all is as it was made: layers that do to tokens what they do to rows, and who reads them."""
    body = _body(reader)
    if body is None or body.encoder is not encoder or not all(map(_is_plain, encoder.layer)):
        return False
    apart = (body, encoder, getattr(body, "embeddings", None))
    heads = (child for above in (reader, body) for child in above.children() if child not in apart)
    inside = (module for child in (encoder.layer, *heads) for module in child.modules())
    if not is_as_made(body) or not is_as_made(encoder):
        return False
    return all(is_as_made(each) and _is_of(type(each), encoder.kinds) for each in inside)


def _is_of(kind: type, kinds: frozenset[type]) -> bool:
    """Whether a module is of a kind that was there, or that adapters are put in by."""
    return kind in kinds or kind in BESIDE or kind.__module__.startswith(PUT_IN)


def _asks_for_more(others: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether an encoder is given, or asked for, more than the layers are here."""
    more = [*others, *(value for name, value in options.items() if name not in WITHOUT_EFFECT)]
    return any(each is not None and each is not False for each in more)


def _once_or_twice(layer: Any, do: Callable[..., torch.Tensor], hidden: torch.Tensor, how: Any) -> torch.Tensor:
    """Do a layer's work, as its own call does: with gradient checkpointing again in the backward pass."""
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(partial(do, layer), hidden, how)
    return do(layer, hidden, how)


def _of_tokens(layer: Any, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
    found = _attended(layer, hidden, hidden, packed)
    return layer.feed_forward_chunk(layer.attention.output(found, hidden))


def _first_of_tokens(layer: Any, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
    own = hidden.index_select(0, packed.firsts)
    found = _attended(layer, own, hidden, packed)
    return layer.feed_forward_chunk(layer.attention.output(found, own))[:, None]


def _attended(layer: Any, own: torch.Tensor, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
    """What each of `own` has of its row's tokens, [tokens, features]."""
    inner = layer.attention.self
    query, key, value = inner.query(own), inner.key(hidden), inner.value(hidden)
    p = _dropout(inner)
    if not 0 < p < 1:  # the library's takes less memory
        firsts = own is not hidden
        query = query[:, None] if firsts else packed.unpack(query)
        found = _in_rows(inner, query, packed.unpack(key), packed.unpack(value), packed.mask)
        return found[:, 0] if firsts else packed.pack(found)
    query, key, value = (each.view(len(each), -1, inner.attention_head_size) for each in (query, key, value))
    attend = OF_TOKENS[inner.config._attn_implementation]
    return attend(query, key, value, packed.lengths, p, inner.scaling).flatten(1)


def _of_firsts(layer: Any, hidden: torch.Tensor, mask: Any) -> torch.Tensor:
    inner, first = layer.attention.self, hidden[:, :1]
    mask = mask if mask is None else mask[:, :, :1]
    found = _in_rows(inner, inner.query(first), inner.key(hidden), inner.value(hidden), mask)
    return layer.feed_forward_chunk(layer.attention.output(found, first))


def _in_rows(inner: Any, query: Any, key: Any, value: Any, mask: Any) -> torch.Tensor:
    """Attention by the library's table, of [rows, length, features]."""
    query, key, value = (
        each.view(*each.shape[:2], -1, inner.attention_head_size).transpose(1, 2)
        for each in (query, key, value)
    )
    attend = AttentionInterface()[inner.config._attn_implementation]
    found, _ = attend(inner, query, key, value, mask, dropout=_dropout(inner), scaling=inner.scaling)
    return found.flatten(2)


def _dropout(inner: Any) -> float:
    return inner.dropout.p if inner.training else 0.0
