"""Spectrum: what training did to the weight matrices of a model's blocks, and in how many directions.

Raw measurements of one model as plain JSON; intervals over replicates are `analyse.py`'s.

Axes: M outputs and N inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from finetrial import spectrum
from finetrial.errors import ModelError
from finetrial.frozen import Frozen
from finetrial.plugins import ProbeInput


class Params(Frozen):
    """`top`: the largest directions of a matrix that are looked at. There are no `rows`: it needs no inputs."""

    top: int = Field(default=spectrum.INTRUDER_TOP, ge=1, le=100)


class Spectrum:
    """See `plugins.Probe`; the matrices come from `updates.py`, the numbers from `spectrum.py`."""

    Params = Params

    def measure(self, given: ProbeInput, params: Any) -> dict[str, Any]:
        """Of every linear layer of the blocks whose weight changed, and over all of them.

        `matrices`: per changed matrix its norms and ranks (of the update), `likeness` (m_j of its `top`
        directions), `intruders`, `energy_in_base_top` and `top_overlap` (see docs/statistics.md).
        `embeddings`: norms alone. `overall`: sums and means over matrices, the share of all the blocks'
        weight, and the intruders for every threshold and k. A value is None where nothing changed.

        Raises:
            ModelError: the model has no linear layers in its blocks (GPT-2 has none: its own kind of layer).
            ValueError: weights that are not finite.
        """
        from finetrial.updates import embedding_updates, matrix_updates

        matrices, unchanged, base_square = [], 0, 0.0
        for update in matrix_updates(given.base, given.tuned):
            base_square += float((update.before_MN**2).sum())
            if update.update_MN.any():
                matrices.append(_describe(update, params.top))
            else:
                unchanged += 1
        if not matrices and not unchanged:
            raise ModelError(
                f"measure.spectrum: {type(given.base).__name__} has no linear layers in blocks; leave it out"
            )
        embeddings = [
            {"name": e.name, "update_norm": e.update, "relative_change": _share(e.update, e.before)}
            for e in embedding_updates(given.base, given.tuned)
        ]
        overall = _overall(matrices, unchanged, base_square**0.5, params.top)
        return {"matrices": matrices, "embeddings": embeddings, "overall": overall}


def _describe(update: Any, top: int) -> dict[str, Any]:
    before_MN, update_MN = update.before_MN, update.update_MN
    if update.factors is not None:
        values = spectrum.low_rank_svd(*update.factors)[1]
    else:
        values = np.linalg.svd(update_MN, compute_uv=False)
    base, tuned = spectrum.left_basis(before_MN), spectrum.left_basis(before_MN + update_MN, top)
    likeness = spectrum.likeness(tuned, base)
    in_base, in_tuned = (min(top, len(basis.values_R)) for basis in (base, tuned))
    base_top = base.vectors_MR[:, :in_base]
    update_norm = float(np.linalg.norm(values))
    return {
        "name": update.name,
        "shape": list(before_MN.shape),
        "update_norm": update_norm,
        "relative_change": _share(update_norm, float(np.linalg.norm(before_MN))),
        "spectral_norm": float(values[0]),
        "effective_rank": spectrum.effective_rank(values),
        "stable_rank": spectrum.stable_rank(values),
        "rank_for_energy": spectrum.rank_for_energy(values),
        "energy_in_base_top": spectrum.energy_within(update_MN, base_top) if in_base else None,
        "top_overlap": (
            spectrum.subspace_overlap(tuned.vectors_MR, base.vectors_MR, in_tuned, in_base)
            if in_base and in_tuned
            else None
        ),
        "likeness": likeness.tolist(),
        "intruders": spectrum.intruders(likeness, top),
        "rounding_floor": update.rounding_floor,
    }


def _overall(matrices: Sequence[dict[str, Any]], unchanged: int, base_norm: float, top: int) -> dict[str, Any]:
    update_norm = float(np.linalg.norm([matrix["update_norm"] for matrix in matrices]))
    means = ("effective_rank", "stable_rank", "rank_for_energy", "energy_in_base_top", "top_overlap")
    floors = [m["rounding_floor"] for m in matrices if m["rounding_floor"] is not None]
    return {
        "changed": len(matrices),
        "unchanged": unchanged,
        "update_norm": update_norm,
        "relative_change": _share(update_norm, base_norm),
        **{f"{key}_mean": _mean([matrix[key] for matrix in matrices]) for key in means},
        "intruders": sum(matrix["intruders"] for matrix in matrices),
        "directions": sum(len(matrix["likeness"]) for matrix in matrices),
        "thresholds": list(spectrum.THRESHOLDS),
        "intruder_curve": spectrum.intruder_curve([m["likeness"] for m in matrices], top),
        "rounding_floor": float(np.linalg.norm(floors)) if floors else None,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


PLUGIN = Spectrum()
