"""A frozen linear layer and its adapter as one product of three matrices, forwards and backwards. Child side.

The sums are the library's. What differs is that they are made where the layer's own lie, without passes over
whole outputs to add them, and with a few rows times many columns wherever there is a choice: the other way
round a product by a matrix of a few columns takes up to three times as long on a CPU (docs/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from finetrial.as_made import has_hooks


def is_plain(base: Any, down: Any, up: Any) -> bool:
    """Whether `adapted` does what a layer and its adapter do.

    They are linear layers as torch makes them, which nobody listens to; the layer is frozen, and the adapter
    adds no bias.
    """
    parts = (base, down, up)
    hooked = any(map(has_hooks, parts))
    usual = all(type(part) is torch.nn.Linear and "forward" not in vars(part) for part in parts)
    frozen = not base.weight.requires_grad and not (base.bias is not None and base.bias.requires_grad)
    return usual and frozen and not hooked and down.bias is None and up.bias is None


def adapted(
    rows: torch.Tensor, dropped: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None,
    down: torch.Tensor, up: torch.Tensor, scale: float,
) -> torch.Tensor:  # fmt: skip
    """rows weight' + bias + scale x dropped down' up': [rows, outputs].

    `rows` is [rows, inputs], `dropped` the same after dropout (None: without), `weight` [outputs, inputs],
    `down` [rank, inputs], `up` [outputs, rank]. Under autocast all are cast first. Gradients are of `rows`,
    `dropped`, `down` and `up` alone: not for a layer that is trained itself, nor for gradients of gradients.
    """
    kind = rows.device.type
    if torch.is_autocast_enabled(kind):
        lower = torch.get_autocast_dtype(kind)
        rows, weight, down, up = (each.to(lower) for each in (rows, weight, down, up))
        dropped, bias = (each if each is None else each.to(lower) for each in (dropped, bias))
    return _Adapted.apply(rows, dropped, weight, bias, down, up, scale)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:  # pyrefly: ignore[bad-override]
        rows, dropped, weight, bias, down, up, scale = given
        through = rows if dropped is None else dropped
        inner = through.mm(down.t())
        ctx.save_for_backward(through, inner, weight, down, up)
        ctx.scale, ctx.drops = scale, dropped is not None
        return functional.linear(rows, weight, bias).addmm_(inner, up.t(), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # pyrefly: ignore[bad-override]
        through, inner, weight, down, up = ctx.saved_tensors
        (of_output,) = gradients
        of_inner = up.t().mm(of_output.t()).mul_(ctx.scale)  # [rank, rows]
        of_up = inner.t().mm(of_output).mul_(ctx.scale).t()
        of_rows = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_rows = of_output.mm(weight)
            if ctx.drops:
                of_dropped = of_inner.t().mm(down)
            else:
                of_rows.addmm_(of_inner.t(), down)
        return of_rows, of_dropped, None, None, of_inner.mm(through), of_up, None
