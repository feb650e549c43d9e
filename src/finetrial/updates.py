"""What training did to a model's weights: the matrices of its blocks before, and their updates, one by one.

Child side: imports torch. Reads plain and PEFT models alike, in float64, and leaves both as they are. Not for
what the matrices' numbers mean (`spectrum.py`).

Axes: M outputs and N inputs of a linear layer, R the rank of an adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from finetrial.errors import ModelError
from finetrial.models import beside_body, block_linears, in_head

Array = NDArray[np.float64]
CHUNK_ROWS = 4096  # of an embedding: 4096 x 2048 in float64 is 67 MB


class MatrixUpdate(NamedTuple):
    """A weight matrix of the base, by its parameter's name there, and what training added to it.

    `factors`: matrices (M x R, R x N) whose product the update is, or None if it is not held as such.
    `rounding_floor`: ||W0 - bf16(W0)||_F, of a trained matrix all of whose values are bf16 numbers, else None.
    """

    name: str
    before_MN: Array
    update_MN: Array
    factors: tuple[Array, Array] | None
    rounding_floor: float | None


class NormUpdate(NamedTuple):
    """A tensor's Frobenius norm in the base and that of its update."""

    name: str
    before: float
    update: float


def matrix_updates(base: Any, tuned: Any) -> Iterator[MatrixUpdate]:
    """Every linear layer of the blocks, in the model's order: the same ones for every method.

    Neither the head nor the embeddings. A LoRA's update is the product of its factors, exactly; another kind of
    adapter is merged into a copy of its layer, in float64. One matrix is held at a time.

    Raises:
        AttributeError: the tuned model has no layer of that name.
        ValueError: weights that are not finite.
    """
    inner = tuned.get_base_model() if hasattr(tuned, "get_base_model") else tuned
    for name in block_linears(base, beside_body(base)):
        yield _matrix_update(f"{name}.weight", base.get_submodule(name), inner.get_submodule(name))


@contextmanager
def perturbed(base: Any, tuned: Any, rng: np.random.Generator) -> Iterator[int]:
    """The base with Gaussian noise in place of every matrix's update, of the same Frobenius norm, as long as
    the block lasts; afterwards it has its own bits again. Gives the number of matrices that have noise.

    No second model is held: the matrices' own values wait on the CPU. Embeddings, biases and norms stay.

    Raises:
        AttributeError, ValueError: as `matrix_updates`.
    """
    kept: dict[str, torch.Tensor] = {}
    try:
        for update in matrix_updates(base, tuned):
            size = float(np.linalg.norm(update.update_MN))
            noise_MN = rng.standard_normal(update.before_MN.shape)  # drawn for unchanged ones, too: one stream
            if size > 0:
                parameter = base.get_parameter(update.name)
                kept[update.name] = parameter.detach().cpu().clone()
                noisy_MN = update.before_MN + noise_MN * (size / np.linalg.norm(noise_MN))
                with torch.no_grad():
                    parameter.copy_(torch.from_numpy(noisy_MN))
        yield len(kept)
    finally:
        with torch.no_grad():
            for name, own in kept.items():
                base.get_parameter(name).copy_(own)


@torch.no_grad()
def interpolated(
    base: Any, tuned: Any, head_names: Sequence[str], shares: Sequence[float]
) -> Iterator[tuple[float, Any]]:
    """Every share, the largest first, and a model whose body is the base's plus that share of the update.

    Its head is the tuned model's. It is one model throughout: use it before the next is asked for. Adapters are
    merged into it; base and tuned stay as they are. At share 0 the body has the base's own bits. A model whose
    body has not moved gives nothing.

    Raises:
        ModelError: the tuned model has other parameters than the base, even with its adapters merged.
    """
    model = copy.deepcopy(tuned)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    theirs, own = dict(base.named_parameters()), dict(model.named_parameters())
    body = [name for name in theirs if not in_head(name, head_names)]
    if missing := [name for name in body if name not in own]:
        raise ModelError(f"measure.interpolation: the tuned model has no {missing[0]}; leave it out")
    if more := [name for name in own if name not in theirs and not in_head(name, head_names)]:
        raise ModelError(f"measure.interpolation: the base has no {more[0]} that could go back; leave it out")
    if all(torch.equal(theirs[name], own[name]) for name in body):
        return
    at = 1.0
    for share in sorted(shares, reverse=True):
        for name in body:
            own[name].copy_(torch.lerp(theirs[name], own[name], share / at) if share else theirs[name])
        at = share
        yield share, model


def embedding_updates(base: Any, tuned: Any) -> Iterator[NormUpdate]:
    """The embeddings of the body; of tied ones (a decoder's input and output) the one that is looked up."""
    inner = tuned.get_base_model() if hasattr(tuned, "get_base_model") else tuned
    heads = beside_body(base)
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Embedding) and not in_head(name, heads):
            after = _effective_weight(inner.get_submodule(name))
            yield _norm_update(f"{name}.weight", module.weight.detach(), after)


def _matrix_update(name: str, before: Any, layer: Any) -> MatrixUpdate:
    before_MN, factors = _array(before.weight), _lora_factors(layer, before.weight)
    if factors is not None:
        update_MN, floor = factors[0] @ factors[1], None
    else:
        after = _effective_weight(layer)
        update_MN, floor = _array(after) - before_MN, _rounding_floor(before.weight, after)
    if not np.isfinite(update_MN).all():
        raise ValueError(f"{name} has values that are not finite")
    return MatrixUpdate(name, before_MN, update_MN, factors, floor)


def _rounding_floor(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """Values tell that a matrix was trained in bf16, for it is loaded in fp32."""
    if not torch.equal(after, after.bfloat16().to(after.dtype)):
        return None
    return float(np.linalg.norm(_array(before.bfloat16()) - _array(before)))


def _lora_factors(layer: Any, before: torch.Tensor) -> tuple[Array, Array] | None:
    """(scaling x B, A) of all active adapters side by side; None if the update is not their product alone."""
    if not hasattr(layer, "get_base_layer"):
        return None
    from peft.tuners.lora import Linear

    if not isinstance(layer, Linear) or layer.lora_variant:  # a variant: DoRA and the like
        return None
    if not torch.equal(layer.get_base_layer().weight, before):  # trained as well, or merged into
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return None
    left = [layer.scaling[name] * _array(layer.lora_B[name].weight) for name in active]
    return np.hstack(left), np.vstack([_array(layer.lora_A[name].weight) for name in active])


def _effective_weight(layer: Any) -> torch.Tensor:
    """The weight that a layer of the tuned model multiplies by, any adapter merged into a copy."""
    if not hasattr(layer, "get_base_layer"):
        return layer.weight.detach()
    merged = copy.deepcopy(layer).cpu().double()
    merged.merge()
    return merged.get_base_layer().weight.detach()


def _norm_update(name: str, before: torch.Tensor, after: torch.Tensor) -> NormUpdate:
    squares, changes = 0.0, 0.0
    for old, new in zip(before.split(CHUNK_ROWS), after.split(CHUNK_ROWS), strict=True):
        old = old.cpu().double()
        squares += float((old**2).sum())
        changes += float(((new.cpu().double() - old) ** 2).sum())
    return NormUpdate(name, squares**0.5, changes**0.5)


def _array(tensor: torch.Tensor) -> Array:
    return tensor.detach().cpu().double().numpy()
