"""Attention with dropout on a CPU, in the library's place. Child side; the product itself is in `ragged.py`."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from finetrial import ragged


def install() -> None:
    """Have every model of this process with attention "sdpa" use `attention`."""
    AttentionInterface.register("sdpa", attention)


def attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The library's attention "sdpa", [rows, length, heads, features]; where it drops on a CPU, by pieces."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    alike = query.shape[:2] == key.shape[:2] == value.shape[:2]
    plain = attention_mask is not None or not causal or query.shape[2] == 1
    special = any(options.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if attention_mask is not None:
        special = special or attention_mask.ndim != 4 or attention_mask.requires_grad
    if query.device.type != "cpu" or not 0 < dropout < 1 or not alike or not plain or special:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return dropped(query, key, value, _added(attention_mask), dropout, scale), None


def dropped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, p: float,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """softmax(query key' scale + mask), dropped with probability `p`, times value.

    The three are [rows, heads, length, features], and what is given [rows, length, heads, features]. `mask` is
    added as it is, has no gradient, and may be of one row, head or query for all. Computed in fp32 whatever the
    type of the three. What is dropped is what the library would drop from the same state of the generator, if
    that draws by `dropout.py`. A query that the mask leaves no key attends to all alike.
    """
    rows, heads, queries, _ = query.shape
    pieces = [*ragged.alike(rows, queries, key.shape[2], heads, mask)]
    query, key, value = (each.transpose(1, 2).reshape(-1, heads, each.shape[3]) for each in (query, key, value))
    return ragged.dropped(query, key, value, pieces, p, scale).view(rows, queries, heads, -1)


def _added(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask as something finite to add: of a boolean one, 0 where it is true."""
    least = torch.finfo(torch.float32).min
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        return mask.float().clamp(min=least)
    if mask.shape[2] > 1 and mask.stride(2) == 0:  # one for all queries, written out by a view
        mask = mask[:, :, :1]
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, least)
