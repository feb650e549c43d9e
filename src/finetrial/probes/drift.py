"""Drift: how far a trained model's layers moved from the base's, on the same inputs.

Raw measurements of one model as plain JSON; intervals and verdicts over replicates are `analyse.py`'s.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from finetrial.plugins import ProbeInput
from finetrial.records import Frozen


class Params(Frozen):
    """`rows`: probe inputs from the validation split; they are chosen before `measure` is called."""

    rows: int = Field(default=512, ge=8, le=100_000)


class Drift:
    """See `plugins.Probe`; the comparison itself is `represent.compare_models`."""

    Params = Params

    def measure(self, given: ProbeInput, params: Any) -> dict[str, Any]:
        """Similarity per layer (0: embeddings, 1..L: blocks) and mean drift (1 - similarity) over blocks.

        `layers`: cka (debiased), cosine (mean-subtracted), cka_biased, cosine_raw, relative_change.
        `neighbour`: the same, of the tuned model against a neighbouring replicate, or None: what
        another seed alone changes. A value is None where a layer does not vary over the rows.

        Raises:
            ValueError: as `represent.compare_models`.
        """
        from finetrial.represent import compare_models

        models, pairs = [given.base, given.tuned], [(0, 1)]
        if given.neighbour is not None:
            models.append(given.neighbour)
            pairs.append((1, 2))
        compared = compare_models(models, pairs, given.batches)
        described = [_describe(comparison.layers) for comparison in compared]
        return {
            **described[0],
            "rows": compared[0].rows,
            "input_sha256": given.input_sha256,
            "neighbour": described[1] if given.neighbour is not None else None,
        }


def _describe(layers: list[dict[str, Any]]) -> dict[str, Any]:
    named = [
        {
            "layer": layer["layer"],
            "cka": layer["cka_debiased"],
            "cosine": layer["cosine_mean_subtracted"],
            "cka_biased": layer["cka_biased"],
            "cosine_raw": layer["cosine_raw"],
            "relative_change": layer["relative_change"],
        }
        for layer in layers
    ]
    return {
        "layers": named,
        "cka_drift_mean": _mean_drift([layer["cka"] for layer in named[1:]]),
        "cosine_drift_mean": _mean_drift([layer["cosine"] for layer in named[1:]]),
    }


def _mean_drift(similarities: list[float | None]) -> float | None:
    """The mean of 1 - similarity; None if a block's is unknown, rather than a mean over fewer blocks."""
    drifts = [1.0 - value for value in similarities if value is not None]
    return sum(drifts) / len(drifts) if drifts and len(drifts) == len(similarities) else None


PLUGIN = Drift()
