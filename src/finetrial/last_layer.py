"""A classifier's last layer while it trains: for the first token alone, as its head reads no other. Child side.

Of an encoder's last layer every position's keys and values are needed, but only the first one's query, output
and feed-forward part; the rest has no part in the loss, nor in a gradient. In a model of six layers these are
14 % of the products. In evaluation mode nothing changes: what is measured there is of the whole layer.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from transformers.modeling_utils import AttentionInterface

# Layers that are built alike, and whose classifiers read the first position (tests/test_last_layer.py).
LAYERS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "ElectraLayer")
ATTENTIONS = ("sdpa", "finetrial_stacked")


def narrow(model: Any) -> bool:
    """Have a classifier's last layer do no more than is read while it trains; whether it is of such a kind.

    To be called before adapters are put in: they are used where they are.
    """
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    layers = getattr(getattr(body, "encoder", None), "layer", None)
    if not type(model).__name__.endswith("ForSequenceClassification") or not layers:
        return False
    last = layers[-1]
    if type(last).__name__ not in LAYERS or last.is_decoder or last.chunk_size_feed_forward:
        return False
    last.forward = MethodType(_forward, last)
    return True


def _forward(layer: Any, hidden: torch.Tensor, attention_mask: Any = None, *others: Any, **options: Any) -> Any:
    """The layer's own forward, but in training [rows, 1, features] of the first position."""
    inner = layer.attention.self
    name = inner.config._attn_implementation
    four = attention_mask is None or attention_mask.ndim == 4
    if not layer.training or name not in ATTENTIONS or not four or options.get("output_attentions"):
        return type(layer).forward(layer, hidden, attention_mask, *others, **options)
    first = hidden[:, :1]
    mask = attention_mask if attention_mask is None else attention_mask[:, :, :1]

    def heads(values: torch.Tensor) -> torch.Tensor:
        return values.view(*values.shape[:2], -1, inner.attention_head_size).transpose(1, 2)

    found, _ = AttentionInterface()[name](
        inner, heads(inner.query(first)), heads(inner.key(hidden)), heads(inner.value(hidden)), mask,
        dropout=inner.dropout.p, scaling=inner.scaling,
    )  # fmt: skip
    attended = layer.attention.output(found.reshape(*first.shape[:2], -1), first)
    return layer.feed_forward_chunk(attended)
