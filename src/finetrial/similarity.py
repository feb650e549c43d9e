"""How alike two sets of representations of the same rows are, beside CKA (`cka.py`): cosine, relative change.

Pure functions of float64 arrays; no files, no torch, no models (`represent.py` makes the rows). Not for
inference: rows and layers are not replicates; intervals over training runs come from `stats.py`.

Axes: N rows (the same examples on both sides), D features.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from finetrial.rows import centred, same_shape


def mean_cosine(before_ND: ArrayLike, after_ND: ArrayLike, *, subtract_mean: bool = True) -> float | None:
    """Mean over rows of cos(x_i - mean_X, y_i - mean_Y); raw without `subtract_mean`.

    The means go first because one large common offset brings the raw cosine of unrelated data to 1
    (Timkey and van Schijndel 2021, arXiv 2109.04404). A row without a direction (length 0) is left
    out; None if no row has one.

    Raises:
        ValueError: not 2-D, shapes that differ, or values that are not finite.
    """
    x_ND, y_ND = same_shape(before_ND, after_ND)
    if subtract_mean and len(x_ND):
        x_ND, y_ND = x_ND - x_ND.mean(axis=0), y_ND - y_ND.mean(axis=0)
    squares_N = (x_ND * x_ND).sum(axis=1) * (y_ND * y_ND).sum(axis=1)
    has_direction_N = squares_N > 0
    if not has_direction_N.any():
        return None
    dots_N = (x_ND * y_ND).sum(axis=1)
    return float((dots_N[has_direction_N] / np.sqrt(squares_N[has_direction_N])).mean())


def relative_change(before_ND: ArrayLike, after_ND: ArrayLike) -> float | None:
    """||Y - X|| / ||X|| (Frobenius) of the column-centred rows; None where X does not vary.

    Unaligned: a rotation counts as a change, which is right for a model and its own fine-tuned copy
    (they share a basis).

    Raises:
        ValueError: not 2-D, shapes that differ, or values that are not finite.
    """
    before_ND, after_ND = same_shape(before_ND, after_ND)
    x_ND = centred(before_ND)
    if x_ND is None:
        return None
    y_ND = after_ND - after_ND.mean(axis=0)
    return math.sqrt(float(((y_ND - x_ND) ** 2).sum()) / float((x_ND * x_ND).sum()))
