"""An encoder's layers while it trains: without padding, and the last for what is read of it. Child side.

Padding has no part in the loss, nor in a gradient. On a CPU all but the attention itself is therefore done for
the tokens of all rows, one below the other, [tokens, features], and the attention for each row's own
(`ragged.py`). And of a classifier's last layer every position's keys and values are needed, but only the first
one's query, output and feed-forward part: in a model of six layers that is 14 % of the products.

In evaluation mode nothing changes: what is measured there is of whole layers, in rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import AttentionInterface

from finetrial.ragged import Lengths, Padding, of_rows

# Layers that are built alike, and whose classifiers read the first position (tests/test_trimmed.py).
LAYERS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "ElectraLayer")
# By the name of a model's attention: what does it to tokens of rows of some lengths, and drops.
OF_TOKENS: dict[str, Callable[..., torch.Tensor]] = {"sdpa": of_rows}
# Where a layer's modules may come from: known to do to each token the same, whatever the shape they are in.
KNOWN = ("torch.nn", "transformers.", "peft.tuners.lora", "finetrial.")


def trim(model: Any) -> bool:
    """Have an encoder's layers do no more than is read while it trains; whether it is of such a kind.

    To be called before adapters are put in: they are used where they are.
    """
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    encoder = getattr(body, "encoder", None)
    layers = getattr(encoder, "layer", None)
    if encoder is None or not layers or not all(map(_is_plain, layers)):
        return False
    first_alone = type(model).__name__.endswith("ForSequenceClassification")
    for layer in layers:
        layer.first_alone = first_alone and layer is layers[-1]
        layer.forward = MethodType(_layer, layer)
    encoder.forward = MethodType(_encoder, encoder)
    return True


def _is_plain(layer: Any) -> bool:
    return type(layer).__name__ in LAYERS and not layer.is_decoder and not layer.chunk_size_feed_forward


class Packed:
    """Rows of a batch as tokens, one below the other; takes the place of the attention mask in a layer.

    `real` is [rows, length], true at tokens, which padding follows; `mask` the same as attention takes it.
    """

    def __init__(self, real: torch.Tensor, mask: torch.Tensor | None):
        self.shape, self.mask, counts = real.shape, mask, real.sum(1)
        self.lengths = Lengths(counts.tolist())
        self.firsts = counts.cumsum(0) - counts  # of each row its first token
        self.padding = None if bool(real.all()) else Padding.of(real)

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


def _encoder(encoder: Any, hidden: torch.Tensor, mask: Any = None, *others: Any, **options: Any) -> Any:
    """The encoder's own forward; in training of tokens, where it can be."""
    mask = options.pop("attention_mask", mask)  # the library hands it on by its name
    packed = None
    if encoder.training:
        if not _is_known(encoder):
            _give_back(encoder)
        elif not _asks_for_more(others, options):
            packed = _packed(encoder, hidden, mask)
    if packed is None:
        return type(encoder).forward(encoder, hidden, mask, *others, **options)
    values = packed.pack(hidden)
    for layer in encoder.layer:
        values = layer(values, packed)
    last = values if encoder.layer[-1].first_alone else packed.unpack(values)
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=last)


def _packed(encoder: Any, hidden: torch.Tensor, mask: Any) -> Packed | None:
    """How the rows lie as tokens; None: it cannot be told."""
    if hidden.device.type != "cpu" or detect_fake_mode((hidden,)):
        return None
    if encoder.config._attn_implementation not in OF_TOKENS:
        return None
    if mask is None:
        return Packed(torch.ones(hidden.shape[:2], dtype=torch.bool), None)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[:2] != (len(hidden), 1):
        return None
    keys = mask[:, :, :1]  # one for all queries, mostly written out
    if not torch.equal(mask, keys.expand_as(mask)):
        return None
    real = keys[:, 0, 0] if keys.dtype == torch.bool else keys[:, 0, 0] == 0
    follows = real[:, :-1] | ~real[:, 1:]
    return Packed(real, keys) if bool(real[:, 0].all()) and bool(follows.all()) else None


def _is_known(encoder: Any) -> bool:
    """Whether nothing in its layers could do something else to tokens than to rows; looked at once."""
    if not hasattr(encoder, "known"):
        ours = all(map(_is_plain, encoder.layer)) and all("first_alone" in vars(each) for each in encoder.layer)
        encoder.known = ours and all(map(_is_as_made, encoder.layer.modules()))
    return encoder.known


def _is_as_made(module: Any) -> bool:
    """Whether a module is of a known kind, and does what its kind does."""
    forward = vars(module).get("forward")
    by = getattr(getattr(forward, "__func__", forward), "__module__", "")
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    known = type(module).__module__.startswith(KNOWN)
    return known and not any(hooks) and (forward is None or by.startswith("finetrial."))


def _give_back(encoder: Any) -> None:
    """Let an encoder and its layers do what they did before."""
    for module in (encoder, *encoder.layer):
        if getattr(vars(module).get("forward"), "__func__", None) in (_encoder, _layer):
            del module.forward


def _asks_for_more(others: tuple[Any, ...], options: dict[str, Any]) -> bool:
    more = [*others, *(options.get(name) for name in ("encoder_hidden_states", "past_key_values"))]
    return any(each is not None for each in more) or bool(
        options.get("output_attentions") or options.get("output_hidden_states")
    )


def _layer(layer: Any, hidden: torch.Tensor, mask: Any = None, *others: Any, **options: Any) -> Any:
    """The layer's own forward: of tokens [tokens, features], if they are packed; else of rows.

    In training of the first positions alone [rows, 1, features], if nobody reads the others.
    """
    if isinstance(mask, Packed):
        do = partial(_of_tokens, layer)
    elif layer.first_alone and _is_usual(layer, mask, options):
        do = partial(_of_firsts, layer)
    else:
        return type(layer).forward(layer, hidden, mask, *others, **options)
    if layer.gradient_checkpointing and layer.training:  # which is done in the library's forward
        return layer._gradient_checkpointing_func(do, hidden, mask)
    return do(hidden, mask)


def _of_tokens(layer: Any, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
    own = hidden.index_select(0, packed.firsts) if layer.first_alone else hidden
    values = layer.feed_forward_chunk(layer.attention.output(_attended(layer, own, hidden, packed), own))
    return values[:, None] if layer.first_alone else values


def _attended(layer: Any, own: torch.Tensor, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
    """What each of `own` has of its row's tokens, [tokens, features]."""
    inner = layer.attention.self
    query, key, value = inner.query(own), inner.key(hidden), inner.value(hidden)
    p = _dropout(inner)
    if not 0 < p < 1:  # the library's takes less memory
        query = query[:, None] if layer.first_alone else packed.unpack(query)
        found = _in_rows(inner, query, packed.unpack(key), packed.unpack(value), packed.mask)
        return found[:, 0] if layer.first_alone else packed.pack(found)
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


def _is_usual(layer: Any, mask: Any, options: dict[str, Any]) -> bool:
    """Whether a layer trains, by an attention that is known."""
    known = layer.attention.self.config._attn_implementation in OF_TOKENS
    four = mask is None or mask.ndim == 4
    return layer.training and known and four and not options.get("output_attentions")
