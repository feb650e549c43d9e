"""Drift: how far a trained model's layers moved from the base's, on the same inputs.

Raw measurements of one model as plain JSON; intervals and verdicts over replicates are `analyse.py`'s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from finetrial.frozen import Frozen
from finetrial.plugins import ProbeInput

SEED = 0  # of the perturbation's noise: the same directions for every method
NAMES = {"cka_debiased": "cka", "cosine_mean_subtracted": "cosine"}
# Measured per layer -> as what its mean over blocks is given: a similarity s as 1 - s, a distance as it is.
SIMILARITIES = ("cka", "cka_standardised", "cosine", "rsa", "neighbours")
DISTANCES = ("angle", "relative_change")


class Params(Frozen):
    """`rows`: probe inputs from the validation split; they are chosen before `measure` is called.

    `perturbation`: also measure the base with noise in place of each matrix's update, of the same norm.
    """

    rows: int = Field(default=512, ge=8, le=100_000)
    perturbation: bool = True


class Drift:
    """See `plugins.Probe`; the comparison itself is `represent.compare`."""

    Params = Params

    def measure(self, given: ProbeInput, params: Any) -> dict[str, Any]:
        """Similarity per layer (0: embeddings, 1..L: blocks) and mean drift over blocks.

        `layers`: cka (debiased), cka_standardised, cosine (mean-subtracted), rsa, neighbours; angle,
        relative_change; cka_biased beside its cka_floor, cosine_raw, neighbours_chance, top_1, top_3 (see
        `represent.layer_drift`). `cka_drift_mean`, `cosine_drift_mean` and `means`: the mean over blocks, of
        a similarity 1 minus it; `rows_error`, the standard error over rows of the first. Then CKA and cosine
        alone of three more: `read`, where a classification head reads, at its last or first token;
        `neighbour`, the tuned model against a neighbouring replicate, which another seed alone changes;
        `perturbed`, the base with noise of the update's norm in every matrix of the blocks, None in the
        control. A value is None where a layer does not vary over the rows.

        Raises:
            DataError, ValueError: as `represent.pool` and `represent.compare`.
        """
        from finetrial.represent import compare, pool
        from finetrial.updates import perturbed

        base, tuned = (pool(model, given.batches, causal=given.causal) for model in (given.base, given.tuned))
        found = compare(base, tuned, whole=not given.brief)
        neighbour = noisy = None
        if given.neighbour is not None:
            neighbour = compare(tuned, pool(given.neighbour, given.batches, causal=given.causal), whole=False)
        if params.perturbation and not given.brief:
            with perturbed(given.base, given.tuned, np.random.default_rng(SEED)) as matrices:
                if matrices:
                    noisy = compare(base, pool(given.base, given.batches, causal=given.causal), whole=False)
        return {
            **_described(found.layers),
            "read": _described(found.read) if found.read else None,
            "rows": found.rows,
            "rows_error": found.rows_error,
            "input_sha256": given.input_sha256,
            "neighbour": _described(neighbour.layers) if neighbour else None,
            "perturbed": _described(noisy.layers) if noisy else None,
        }


def _described(layers: list[dict[str, Any]]) -> dict[str, Any]:
    named = [{NAMES.get(key, key): value for key, value in layer.items()} for layer in layers]
    blocks = named[1:]
    measured = [key for key in (*SIMILARITIES, *DISTANCES) if key in named[0]]
    means = {
        key: _mean([layer[key] if key in DISTANCES else _from_one(layer[key]) for layer in blocks])
        for key in measured
    }
    return {
        "layers": named,
        "cka_drift_mean": means.pop("cka"),
        "cosine_drift_mean": means.pop("cosine"),
        "means": means,
    }


def _from_one(similarity: float | None) -> float | None:
    return None if similarity is None else 1.0 - similarity


def _mean(values: list[float | None]) -> float | None:
    """None if a block's is unknown, rather than a mean over fewer blocks."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


PLUGIN = Drift()
