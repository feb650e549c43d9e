"""Attention with dropout on a CPU, a few rows at a time. Child side.

PyTorch's fused kernel has no dropout on a CPU. What it falls back to makes half a dozen passes over tensors of
[rows, heads, length, length], too large for any cache, and keeps three of them for the backward pass. Here all
that is done with some rows while they are in the cache, and one such tensor is kept: the probabilities, with a
minus sign where they were kept by the dropout. At 16 rows of 320 tokens it is twice as fast (docs/log.md).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

# Of one [rows, heads, length, length] tensor of a piece; there are three, beside what the products touch.
PIECE_BYTES = 1 << 20
DRAWN_TOGETHER = 4  # elements of a mask, at most, from one word of random bits (dropout.py)


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
    return _Dropped.apply(query, key, value, mask, p, scale)


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


def _pieces(query: torch.Tensor, key: torch.Tensor) -> Iterator[slice]:
    """Some rows each; so many that no piece but the last breaks off within a word that masks are drawn from."""
    one = query.shape[1] * query.shape[2] * key.shape[2]
    words = DRAWN_TOGETHER // math.gcd(DRAWN_TOGETHER, one)
    rows = -(-max(1, PIECE_BYTES // (4 * one)) // words) * words
    found = (slice(start, start + rows) for start in range(0, len(query), rows))
    # Where only memory is counted, the second piece is as the others: its parts lie beside the first one's.
    return itertools.islice(found, 2) if detect_fake_mode((query,)) else found


def _flat(values: torch.Tensor) -> torch.Tensor:
    """[rows, heads, length, features] as [rows x heads, length, features] in fp32."""
    return values.reshape(-1, *values.shape[2:]).float()


def _product(
    one: torch.Tensor, other: torch.Tensor, scale: float, output: torch.Tensor | None = None
) -> torch.Tensor:
    """One by other, batch by batch, times a number, without a pass of its own for that."""
    if output is None:
        output = one.new_empty(len(one), one.shape[1], other.shape[2])
    return output.baddbmm_(one, other, beta=0, alpha=scale)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:  # pyrefly: ignore[bad-override]
        query, key, value, mask, p, scale = given
        rows, heads, length, _ = query.shape
        output = query.new_empty(rows, length, heads, value.shape[-1])
        signed = torch.empty(rows, heads, length, key.shape[2], device="cpu")
        with torch.autocast("cpu", enabled=False):
            for part in _pieces(query, key):
                shares = signed[part]  # its scores, its probabilities, and those with their signs, in turn
                flat = shares.view(-1, *shares.shape[2:])
                _product(_flat(query[part]), _flat(key[part]).transpose(1, 2), scale, flat)
                if mask is not None:
                    shares.add_(mask[part] if len(mask) > 1 else mask)
                torch.softmax(flat, -1, out=flat)
                kept = torch.empty_like(flat).bernoulli_(1 - p).mul_(flat)
                flat.sub_(kept, alpha=2)
                found = _product(kept, _flat(value[part]), 1 / (1 - p))
                output[part] = found.view(*shares.shape[:3], -1).transpose(1, 2)
        ctx.save_for_backward(query, key, value, signed)
        ctx.p, ctx.scale = p, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # pyrefly: ignore[bad-override]
        query, key, value, signed = ctx.saved_tensors
        found = [torch.empty_like(each) for each in (query, key, value)]
        with torch.autocast("cpu", enabled=False):
            for part in _pieces(query, key):
                flat = signed[part].view(-1, *signed.shape[2:])
                of_output = _flat(gradients[0][part].transpose(1, 2))
                less = flat.clamp(max=0)  # minus what was kept of the probabilities
                of_value = _product(less.transpose(1, 2), of_output, -1 / (1 - ctx.p))
                less *= _product(of_output, _flat(value[part]).transpose(1, 2), 1 / (1 - ctx.p))
                # Minus the gradient of the scores: kept x its gradient - probability x that row's sum of it.
                less.addcmul_(flat.abs(), less.sum(-1, keepdim=True), value=-1)
                of_query = _product(less, _flat(key[part]), -ctx.scale)
                of_key = _product(less.transpose(1, 2), _flat(query[part]), -ctx.scale)
                for whole, own in zip(found, (of_query, of_key, of_value), strict=True):
                    whole[part] = own.view_as(whole[part])
        return *found, None, None, None
