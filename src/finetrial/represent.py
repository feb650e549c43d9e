"""What models make of the same inputs: forward passes, masked mean pooling, similarity per layer.

Child side: imports torch. Writes nothing: pooled rows live in memory and go, layer by layer, through the
accumulators of `cka.py`. Not for choosing the inputs (`measuring.py` does) nor for statistics over
replicates (`stats.py`).

Axes: B rows of a batch, T tokens, N rows in all, D features. Layers follow transformers' convention:
`hidden_states[0]` is the embeddings, 1..L the blocks, and in Llama-type models the last entry is taken after
the final norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from finetrial.batching import model_inputs
from finetrial.cka import MIN_ROWS, CkaAccumulator, gram_cka, grams
from finetrial.errors import DataError
from finetrial.similarity import (
    NEIGHBOURS,
    SUBSAMPLE_SHARE,
    Subsamples,
    mean_cosine,
    neighbour_overlap,
    procrustes,
    relative_change,
    rsa,
    standardised,
    variance_shares,
)

CHUNK_ROWS = 512  # rows per accumulator step: large enough for BLAS, small beside D x D sums
# Rows at most, evenly spaced, where cost grows with their square (RSA ranks half a million distances) or faster
# (Procrustes: 8.5 s of processor time for 2,500 rows of 2,048 features).
PAIR_ROWS = 1000
SUBSAMPLES = 50  # for the error over rows: known to a tenth of itself

LayerMeasures = dict[str, float | int | None]


class Comparison(NamedTuple):
    """Similarity of two models per layer (0: embeddings), over `rows` pooled rows.

    `read`: CKA and cosine alone at the one position that a classification head reads, where it is known.
    `rows_error`: the standard error over rows of the mean drift (1 - debiased CKA) over the blocks.
    """

    layers: list[LayerMeasures]
    rows: int
    read: list[LayerMeasures] | None
    rows_error: float | None


class Pooled(NamedTuple):
    """What a model makes of the rows, per layer N x D: the mean over a text's tokens, and what a head reads."""

    mean: list[NDArray[np.float32]]
    read: list[NDArray[np.float32]] | None


def masked_mean(hidden_BTD: torch.Tensor, pool_mask_BT: torch.Tensor) -> torch.Tensor:
    """The mean of each row's hidden states over its content tokens (mask 1): B x D, fp32.

    Padding and special tokens have mask 0. A row without content gives NaN; `pooled_layers` drops it.

    Raises:
        DataError: other positions than the mask's (Funnel shortens its sequences, virtual tokens are more).
    """
    if hidden_BTD.shape[:2] != pool_mask_BT.shape:
        tokens, positions = pool_mask_BT.shape[1], hidden_BTD.shape[1]
        raise DataError(
            f"of {tokens} tokens the model makes hidden states at {positions} positions, "
            f"so its layers cannot be compared over the tokens; leave out of `measure` what reads them (drift)"
        )
    weights_BT = pool_mask_BT.to(hidden_BTD.device, torch.float32)
    sums_BD = torch.einsum("btd,bt->bd", hidden_BTD.float(), weights_BT)
    return sums_BD / weights_BT.sum(dim=1, keepdim=True)


def read_position(hidden_BTD: torch.Tensor, attention_mask_BT: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """The hidden states that a classification head reads, B x D, fp32: of a decoder the last token's that is no
    padding, of an encoder the first token's ([CLS]). Padding is on the right."""
    last_B = attention_mask_BT.to(hidden_BTD.device).sum(dim=1) - 1 if causal else 0
    return hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), last_B].float()


def pooled_layers(model: Any, batch: Mapping[str, Any]) -> list[NDArray[np.float32]]:
    """One array (B x D) per layer, embeddings first, of the rows that have content.

    The model runs in its own precision on its own device, in eval mode, without autocast; keys of the
    batch that are not model inputs are ignored.

    Raises:
        DataError: positions that do not fit `pool_mask`.
        ValueError: hidden states that are not finite.
    """
    return _pooled(model, batch, None)[0]


def _pooled(model: Any, batch: Mapping[str, Any], causal: bool | None) -> list[list[NDArray[np.float32]]]:
    """Per way of pooling one array per layer: the masked mean and, if it is known, what a head reads."""
    device = next(model.parameters()).device
    model.eval()
    inputs = {name: tensor.to(device) for name, tensor in model_inputs(batch).items()}
    pool_mask_BT = batch["pool_mask"].to(device)
    has_content_B = pool_mask_BT.sum(dim=1) > 0
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        outputs = model(**inputs, output_hidden_states=True, return_dict=True)
        hidden = outputs.hidden_states
        pooled = [[masked_mean(hidden_BTD, pool_mask_BT) for hidden_BTD in hidden]]
        if causal is not None:
            mask_BT = inputs["attention_mask"]
            pooled.append([read_position(hidden_BTD, mask_BT, causal=causal) for hidden_BTD in hidden])
        arrays = [[layer[has_content_B].cpu().numpy() for layer in way] for way in pooled]
    for number in range(len(hidden)):
        if not all(np.isfinite(way[number]).all() for way in arrays):
            raise ValueError(f"layer {number} has hidden states that are not finite")
    return arrays


def pooled_rows(model: Any, batches: Sequence[Mapping[str, Any]]) -> NDArray[np.float32]:
    """The last layer of every row, N x D, in the order of the batches.

    Raises:
        DataError, ValueError: as `pooled_layers`; ValueError: a row has no content.
    """
    pooled = [pooled_layers(model, batch)[-1] for batch in batches]
    for batch, rows in zip(batches, pooled, strict=True):
        if len(rows) != len(batch["input_ids"]):
            raise ValueError(f"{len(batch['input_ids']) - len(rows)} rows of a batch have no content to pool")
    return np.concatenate(pooled)


def pool(model: Any, batches: Sequence[Mapping[str, Any]], *, causal: bool | None = None) -> Pooled:
    """One forward pass per batch. `causal` says where a head reads (`read_position`); None: it is left out.

    Memory: N x D x 4 B per layer and way of pooling (TinyLlama, 512 rows: 4 MB a layer, 190 MB in all). Rows
    are kept because a mean-subtracted cosine needs the means first, and a second pass costs more.

    Raises:
        DataError: fewer than 4 rows with content, or positions that do not fit `pool_mask`.
        ValueError: hidden states that are not finite.
    """
    found = [_pooled(model, batch, causal) for batch in batches]
    n = sum(len(ways[0][0]) for ways in found)
    if n < MIN_ROWS:
        raise DataError(
            f"layers are compared on validation rows that have a text, of which there are {n}, and {MIN_ROWS} "
            f"are needed; give more of them, raise the measure's `rows`, or leave the measure out"
        )
    depth = range(len(found[0][0]))
    ways = [
        [np.concatenate([each[way][layer] for each in found]) for layer in depth]
        for way in range(len(found[0]))
    ]
    return Pooled(ways[0], ways[1] if len(ways) > 1 else None)


def compare(before: Pooled, after: Pooled, *, whole: bool = True) -> Comparison:
    """Per-layer similarity of two models on the same rows. `whole`: every measure, else CKA and cosine alone.

    Memory: one layer's sums, 3 D D x 8 B (TinyLlama: 100 MB).

    Raises:
        ValueError: models of different depth or width.
    """
    depths = {len(before.mean), len(after.mean)}
    if len(depths) > 1:
        raise ValueError(f"models of different depth cannot be compared: {sorted(depths)} layers")
    layers = [
        {"layer": layer, **(_measures if whole else _likeness)(before.mean[layer], after.mean[layer])}
        for layer in range(len(before.mean))
    ]
    read = None
    if before.read is not None and after.read is not None:
        pairs = enumerate(zip(before.read, after.read, strict=True))
        read = [{"layer": layer, **_likeness(one, other)} for layer, (one, other) in pairs]
    rows_error = _rows_error(before.mean[1:], after.mean[1:]) if whole else None
    return Comparison(layers, len(before.mean[0]), read, rows_error)


def _rows_error(before: Sequence[NDArray[np.float32]], after: Sequence[NDArray[np.float32]]) -> float | None:
    """The error that the choice of rows gives the mean over blocks; the same subsamples for every block.

    Of more than `PAIR_ROWS` rows from that many, for it falls with the root of their number. None where there
    are too few rows, or a block does not vary. Memory: 2 x (at most `PAIR_ROWS`) squared x 8 B.
    """
    n = len(before[0]) if before else 0
    some = np.linspace(0, n - 1, min(n, PAIR_ROWS)).round().astype(int)
    if round(SUBSAMPLE_SHARE * len(some)) < MIN_ROWS:
        return None
    samples = Subsamples.drawn(len(some), np.random.default_rng(0), times=SUBSAMPLES)
    drifts = np.zeros(SUBSAMPLES)
    for one, other in zip(before, after, strict=True):
        before_NN, after_NN = grams(one[some], other[some])
        for number, rows in enumerate(samples.rows):
            both = np.ix_(rows, rows)
            found = gram_cka(before_NN[both], after_NN[both])
            if found is None:
                return None
            drifts[number] += (1 - found) / len(before)
    return samples.error(drifts) * float(np.sqrt(len(some) / n))


def layer_drift(base: Any, tuned: Any, batches: Sequence[Mapping[str, Any]]) -> list[LayerMeasures]:
    """How alike the tuned model's layers are to the base's, one entry per layer, embeddings first.

    Keys: `layer`. 1 where unchanged: `cka_debiased`, `cka_standardised` (debiased, by the base's columns),
    `cka_biased`, `cosine_mean_subtracted`, `cosine_raw`, `rsa` (by correlation), `neighbours`. 0 where
    unchanged: `relative_change`, `angle` (Procrustes). For orientation: `cka_floor` (`cka_biased` of unrelated
    rows), `neighbours_chance`, `top_1` and `top_3` (shares of the base's variance). None where a layer does not
    vary over the rows. Drift is 1 - similarity, and is exactly 0 for equal hidden states. Both may be plain or
    PEFT models.

    Raises:
        DataError, ValueError: as `pool` and `compare`.
    """
    return compare(pool(base, batches), pool(tuned, batches)).layers


def _likeness(before_ND: NDArray[np.float32], after_ND: NDArray[np.float32]) -> dict[str, float | None]:
    return {
        "cka_debiased": _accumulated(before_ND, after_ND).value(),
        "cosine_mean_subtracted": mean_cosine(before_ND, after_ND),
    }


def _measures(before_ND: NDArray[np.float32], after_ND: NDArray[np.float32]) -> dict[str, float | None]:
    accumulator, top = _accumulated(before_ND, after_ND), variance_shares(before_ND)
    by_base = standardised(before_ND, after_ND)
    some = np.linspace(0, len(before_ND) - 1, min(len(before_ND), PAIR_ROWS)).round().astype(int)
    before_some_ND, after_some_ND = before_ND[some], after_ND[some]
    turned = procrustes(before_some_ND, after_some_ND)
    near = neighbour_overlap(before_some_ND, after_some_ND, k=min(NEIGHBOURS, len(some) - 2))
    return {
        "cka_debiased": accumulator.value(),
        "cka_standardised": _accumulated(*by_base).value() if by_base[0].shape[1] else None,
        "cka_biased": accumulator.value(debiased=False),
        "cka_floor": accumulator.floor(),
        "cosine_mean_subtracted": mean_cosine(before_ND, after_ND),
        "cosine_raw": mean_cosine(before_ND, after_ND, subtract_mean=False),
        "relative_change": relative_change(before_ND, after_ND),
        "angle": turned.angle if turned else None,
        "rsa": rsa(before_some_ND, after_some_ND),
        "neighbours": near.share if near else None,
        "neighbours_chance": near.chance if near else None,
        "top_1": top.top_1 if top else None,
        "top_3": top.top_3 if top else None,
    }


def _accumulated(before_ND: NDArray[Any], after_ND: NDArray[Any]) -> CkaAccumulator:
    accumulator = CkaAccumulator((before_ND.shape[1], after_ND.shape[1]))
    for start in range(0, len(before_ND), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        accumulator.add(before_ND[chunk], after_ND[chunk])
    return accumulator
