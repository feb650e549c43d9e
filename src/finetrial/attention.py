"""Attention with dropout on a CPU, a few rows at a time. Child side.

PyTorch's fused kernel has no dropout on a CPU. What it falls back to makes half a dozen passes over tensors of
[rows, heads, length, length], too large for any cache, and keeps three of them for the backward pass. Here all
that is done with some rows while they are in the cache, and one such tensor is kept: the probabilities, with a
minus sign where they were kept by the dropout. At 16 rows of 320 tokens it is twice as fast (docs/log.md).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from finetrial.dropout import bernoulli_

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


def _pieces(query: torch.Tensor, key: torch.Tensor, heads: int) -> Iterator[slice]:
    """Some rows with all their heads each, of flat tensors.

    So many that no piece but the last breaks off within a word that masks are drawn from.
    """
    one = heads * query.shape[1] * key.shape[1]
    words = DRAWN_TOGETHER // math.gcd(DRAWN_TOGETHER, one)
    step = heads * -(-max(1, PIECE_BYTES // (4 * one)) // words) * words
    found = (slice(start, start + step) for start in range(0, len(query), step))
    # Where only memory is counted, the second piece is as the others: its parts lie beside the first one's.
    return itertools.islice(found, 2) if detect_fake_mode((query,)) else found


def _flat(values: torch.Tensor) -> torch.Tensor:
    """[rows, heads, length, features] as [rows x heads, length, features]."""
    return values.reshape(-1, *values.shape[2:])


def _multiply(one: torch.Tensor, other: torch.Tensor, scale: float, output: torch.Tensor) -> torch.Tensor:
    """One by other, batch by batch in fp32, times a number, without a pass of its own for that."""
    one, other = one.float(), other.float()
    if output.dtype == one.dtype:
        return output.baddbmm_(one, other, beta=0, alpha=scale)
    return output.copy_(torch.empty_like(output, dtype=one.dtype).baddbmm_(one, other, beta=0, alpha=scale))


def _as_they_are() -> contextlib.AbstractContextManager[Any]:
    """No autocast; where there is none, nothing, which takes less time."""
    cast = torch.is_autocast_enabled("cpu")
    return torch.autocast("cpu", enabled=False) if cast else contextlib.nullcontext()


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:  # pyrefly: ignore[bad-override]
        *tensors, mask, p, scale = given
        rows, heads, length, _ = tensors[0].shape
        query, key, value = map(_flat, tensors)
        output = query.new_empty(*query.shape[:2], value.shape[2])
        signed = torch.empty(*query.shape[:2], key.shape[1], device="cpu")
        with _as_they_are():
            for part in _pieces(query, key, heads):
                flat = signed[part]  # its scores, its probabilities, and those with their signs, in turn
                _multiply(query[part], key[part].transpose(1, 2), scale, flat)
                if mask is not None:
                    own = mask[part.start // heads : part.stop // heads] if len(mask) > 1 else mask
                    flat.view(-1, heads, *flat.shape[1:]).add_(own)
                torch.softmax(flat, -1, out=flat)
                kept = bernoulli_(torch.empty_like(flat), 1 - p).mul_(flat)
                flat.sub_(kept, alpha=2)
                _multiply(kept, value[part], 1 / (1 - p), output[part])
        ctx.save_for_backward(query, key, value, signed)
        ctx.p, ctx.scale, ctx.heads = p, scale, heads
        return output.view(rows, heads, length, -1).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # pyrefly: ignore[bad-override]
        query, key, value, signed = ctx.saved_tensors
        of_output = _flat(gradients[0].transpose(1, 2))
        of_query, of_key, of_value = found = [torch.empty_like(each) for each in (query, key, value)]
        with _as_they_are():
            for part in _pieces(query, key, ctx.heads):
                flat, own = signed[part], of_output[part]
                less = flat.clamp(max=0)  # minus what was kept of the probabilities
                _multiply(less.transpose(1, 2), own, -1 / (1 - ctx.p), of_value[part])
                less *= _multiply(own, value[part].transpose(1, 2), 1 / (1 - ctx.p), torch.empty_like(flat))
                # Minus the gradient of the scores: kept x its gradient - probability x that row's sum of it.
                less.addcmul_(flat.abs(), less.sum(-1, keepdim=True), value=-1)
                _multiply(less, key[part], -ctx.scale, of_query[part])
                _multiply(less.transpose(1, 2), query[part], -ctx.scale, of_key[part])
        return *(each.view(-1, ctx.heads, *each.shape[1:]) for each in found), None, None, None
