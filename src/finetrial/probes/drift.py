"""Drift: how far a trained model's layers moved from the base's, on the same inputs.

Raw measurements of one model as plain JSON; intervals and verdicts over replicates are `analyse.py`'s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from finetrial.plugins import ProbeInput
from finetrial.records import Frozen

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
    """See `plugins.Probe`; the comparison itself is `represent.compare_models`."""

    Params = Params

    def measure(self, given: ProbeInput, params: Any) -> dict[str, Any]:
        """Similarity per layer (0: embeddings, 1..L: blocks) and mean drift over blocks.

        `layers`: cka (debiased), cka_standardised, cosine (mean-subtracted), rsa, neighbours; angle,
        relative_change; cka_biased beside its cka_floor, cosine_raw, neighbours_chance, top_1, top_3 (see
        `represent.layer_drift`). `cka_drift_mean`, `cosine_drift_mean` and `means`: the mean over blocks, of
        a similarity 1 minus it. `read`: the same where a classification head reads, its last or first token.
        `neighbour`: the same, of the tuned model against a neighbouring replicate, or None: what another seed
        alone changes. `perturbed`: of the base with noise of the update's norm in every matrix of the blocks,
        None in the control. A value is None where a layer does not vary over the rows.

        Raises:
            ValueError: as `represent.compare_models`.
        """
        from finetrial.represent import compare_models
        from finetrial.updates import perturbed

        models, pairs = {"base": given.base, "tuned": given.tuned}, {"tuned": ("base", "tuned")}
        if given.neighbour is not None:
            models["neighbour"], pairs["neighbour"] = given.neighbour, ("tuned", "neighbour")
        noisy = perturbed(given.base, given.tuned, np.random.default_rng(SEED)) if params.perturbation else None
        if noisy is not None:
            models["perturbed"], pairs["perturbed"] = noisy, ("base", "perturbed")
        at = {name: index for index, name in enumerate(models)}
        compared = compare_models(
            list(models.values()),
            [(at[one], at[other]) for one, other in pairs.values()],
            given.batches,
            causal=given.causal,
        )
        described = {name: _describe(comparison) for name, comparison in zip(pairs, compared, strict=True)}
        return {
            **described["tuned"],
            "rows": compared[0].rows,
            "input_sha256": given.input_sha256,
            "neighbour": described.get("neighbour"),
            "perturbed": described.get("perturbed"),
        }


def _describe(comparison: Any) -> dict[str, Any]:
    return _ways(comparison.layers) | {"read": _ways(comparison.read) if comparison.read else None}


def _ways(layers: list[dict[str, Any]]) -> dict[str, Any]:
    named = [{NAMES.get(key, key): value for key, value in layer.items()} for layer in layers]
    blocks = named[1:]
    means = {key: _mean([_from_one(layer[key]) for layer in blocks]) for key in SIMILARITIES}
    means |= {key: _mean([layer[key] for layer in blocks]) for key in DISTANCES}
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
