"""Rows to be compared: what every similarity asks of its arrays before it computes anything.

Not for a measure itself (`cka.py`, `similarity.py`). Axes: N rows (the same examples on both sides), D features
before, E features after.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Rows whose spread is below this share of their mean's length are the same up to float64's rounding.
NO_SPREAD = 1e-13


def checked(values: Any) -> Array:
    """One side, as contiguous float64.

    Raises:
        ValueError: not 2-D, or values that are not finite.
    """
    values = np.ascontiguousarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"rows x features are needed, not shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("values that are not finite cannot be compared")
    return values


def paired(before: Any, after: Any) -> tuple[Array, Array]:
    """Both sides, as contiguous float64.

    Raises:
        ValueError: as `checked`, or not equally many rows.
    """
    before, after = checked(before), checked(after)
    if len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} rows; both sides need the same examples")
    return before, after


def same_shape(before: Any, after: Any) -> tuple[Array, Array]:
    """Both sides, for a measure that goes feature by feature.

    Raises:
        ValueError: as `paired`, or not equally many features.
    """
    before, after = paired(before, after)
    if before.shape != after.shape:
        raise ValueError(f"shapes {before.shape} and {after.shape} differ; features are compared one by one")
    return before, after


def constant(square_sum: float, mean: Array, n: int) -> bool:
    """Whether n rows, `square_sum` about their mean, are the same up to rounding."""
    return square_sum <= n * NO_SPREAD**2 * float(mean @ mean)


def centred(values_ND: Array) -> Array | None:
    """The rows about their mean, or None where they do not vary (or there are none)."""
    if not len(values_ND):
        return None
    mean_D = values_ND.mean(axis=0)
    centred_ND = values_ND - mean_D
    return None if constant(float((centred_ND * centred_ND).sum()), mean_D, len(values_ND)) else centred_ND
