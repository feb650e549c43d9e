"""The spectrum of weight matrices and of their updates: ranks, subspaces, intruder dimensions.

Pure functions of float64 arrays; no files, no torch, no models (`updates.py` reads the matrices). Not for
inference: matrices of one model are not replicates; intervals come from `stats.py`, over whole training runs.

Axes: M outputs and N inputs of a weight matrix (y = W x), R its directions (at most min(M, N)), K the largest
of them. Left singular vectors live on the side of the outputs.

What is exact and what is not: `low_rank_svd` is, to float64's rounding, and so are the singular values of a
dense update (the probe takes them from `numpy.linalg.svd`). `left_basis` takes eigenvectors of the smaller of
W W' and W'W, all of them or the K largest alone: at 2048 x 5632 that is 2 s and 1 s on one core. Squaring loses
singular values below about 1e-8 of the largest and mixes directions whose values are as near to each other; so
directions below `ROUNDING` of the largest are left out, and those within it of each other are tied. Nothing is
randomised.

Sources: effective rank, Roy and Vetterli 2007 (EUSIPCO, definition 1); subspace overlap, Hu et al. 2021
(arXiv 2106.09685, eq. 4); intruder dimensions, Shuttleworth et al. 2025 (arXiv 2410.21228, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

ENERGY_SHARE = 0.9  # Biderman et al. 2024 (arXiv 2405.09673): the ranks that hold 90 % of the variance
INTRUDER_BELOW = 0.5  # the authors' own setting (github.com/reeceshuttle/intruder-dimensions)
INTRUDER_TOP = 10  # likewise
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # the paper's sweep
# Share of the largest singular value below which a difference is rounding: of fp32 weights (6e-8), of W W'.
ROUNDING = 1e-6


class LeftBasis(NamedTuple):
    """Singular values, largest first, and their left singular vectors (columns of unit length)."""

    values_R: Array
    vectors_MR: Array


def effective_rank(values: ArrayLike) -> float | None:
    """exp of the entropy of s / sum(s): how many equal directions would be as many; None if all are 0."""
    scaled = _scaled(values)
    if scaled is None:
        return None
    shares = scaled / scaled.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def stable_rank(values: ArrayLike) -> float | None:
    """||W||_F^2 / ||W||_2^2 of the singular values of W: at most its rank; None if all are 0."""
    scaled = _scaled(values)
    return None if scaled is None else float((scaled**2).sum())


def rank_for_energy(values: ArrayLike, share: float = ENERGY_SHARE) -> int | None:
    """The fewest directions that hold `share` of the squared singular values; None if all are 0."""
    scaled = _scaled(values)
    if scaled is None:
        return None
    energy = np.cumsum(np.sort(scaled**2)[::-1])
    # Nine of ten equal values are 90 %, whatever their sum rounds to.
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12))) + 1


def left_basis(weight_MN: ArrayLike, top: int | None = None) -> LeftBasis:
    """The left singular vectors of a matrix, all or the `top` largest; fewer where the matrix has fewer.

    Directions whose singular value is at most `ROUNDING` of the largest are left out: they are any
    basis of a null space. A zero matrix has none. See the top of the file for the accuracy.

    Raises:
        ValueError: not 2-D, empty, or values that are not finite.
    """
    from scipy.linalg import eigh  # the parent, which reads the probe's parameters, need not wait for it

    weight_MN = _matrix(weight_MN)
    tall = weight_MN.shape[0] > weight_MN.shape[1]
    gram = weight_MN.T @ weight_MN if tall else weight_MN @ weight_MN.T
    last = len(gram) - 1
    subset = None if top is None or top > last else (last + 1 - top, last)
    solved = eigh(gram, subset_by_index=subset, driver="evr" if subset else "evd")
    squares, vectors = np.asarray(solved[0]), np.asarray(solved[1])
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    count = int((values > ROUNDING * values[0]).sum())
    values, vectors = values[:count], vectors[:, ::-1][:, :count]
    return LeftBasis(values, weight_MN @ vectors / values if tall else vectors)


def low_rank_svd(left_MR: ArrayLike, right_RN: ArrayLike) -> tuple[Array, Array, Array]:
    """The exact SVD (U, s, V') of left @ right from QR factors, without forming the product.

    Gives min(M, R, N) directions, some of them 0 where the factors are dependent. Costs (M + N) R^2 instead
    of M N min(M, N).

    Raises:
        ValueError: not 2-D, empty, values that are not finite, or shapes that do not multiply.
    """
    left_MR, right_RN = _matrix(left_MR), _matrix(right_RN)
    if left_MR.shape[1] != right_RN.shape[0]:
        raise ValueError(f"shapes {left_MR.shape} and {right_RN.shape} do not multiply")
    q_left, r_left = np.linalg.qr(left_MR)
    q_right, r_right = np.linalg.qr(right_RN.T)
    inner_left, values, inner_right = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ inner_left, values, inner_right @ q_right.T


def subspace_overlap(a_MR: ArrayLike, b_MR: ArrayLike, i: int, j: int) -> float:
    """||A_i' B_j||_F^2 / min(i, j) of the first i and j columns, orthonormal ones: Hu et al., eq. 4.

    1: one space holds the other; random spaces have max(i, j) / M.

    Raises:
        ValueError: there are no i or j columns, or the columns differ in length.
    """
    a_MR, b_MR = _matrix(a_MR), _matrix(b_MR)
    if len(a_MR) != len(b_MR):
        raise ValueError(f"vectors of {len(a_MR)} and {len(b_MR)} entries have no common space")
    if not (0 < i <= a_MR.shape[1] and 0 < j <= b_MR.shape[1]):
        raise ValueError(f"{i} and {j} columns were asked of {a_MR.shape[1]} and {b_MR.shape[1]}")
    return float(((a_MR[:, :i].T @ b_MR[:, :j]) ** 2).sum()) / min(i, j)


def energy_within(update_MN: ArrayLike, vectors_MR: ArrayLike) -> float | None:
    """The share of an update's squared norm in the span of orthonormal columns; None of a zero update.

    ||U'dW||_F^2 / ||dW||_F^2. An update without a direction of its own has R / M there.

    Raises:
        ValueError: not 2-D, empty, values that are not finite, or columns of another length.
    """
    update_MN, vectors_MR = _matrix(update_MN), _matrix(vectors_MR)
    if len(update_MN) != len(vectors_MR):
        raise ValueError(f"an update of {len(update_MN)} outputs and vectors of {len(vectors_MR)} entries")
    largest = float(np.abs(update_MN).max())
    if largest == 0:
        return None
    update_MN = update_MN / largest
    return float(((vectors_MR.T @ update_MN) ** 2).sum()) / float((update_MN**2).sum())


def likeness(tuned_MK: LeftBasis, base_MR: LeftBasis) -> Array:
    """m_j of Shuttleworth et al.: each tuned left singular vector's largest |cosine| with one of the base's.

    `base_MR` has to hold all of the base's vectors, not the largest alone. It is the cosine with single
    vectors, not with their span (which is the whole space where M <= N); only base vectors whose singular
    values are tied within `ROUNDING` count as their span, of which any basis would do. 0 where the base has
    no direction at all.

    An unrelated vector has about sqrt(2 ln M / M): 0.18 at M = 384, 0.09 at 2048.
    """
    if not len(base_MR.values_R):
        return np.zeros(len(tuned_MK.values_R))
    squares_RK = (base_MR.vectors_MR.T @ tuned_MK.vectors_MR) ** 2
    apart = -np.diff(base_MR.values_R) > ROUNDING * base_MR.values_R[0]
    starts = np.concatenate([[0], np.flatnonzero(apart) + 1])
    return np.sqrt(np.minimum(np.add.reduceat(squares_RK, starts, axis=0).max(axis=0), 1.0))


def intruders(likeness_K: ArrayLike, top: int = INTRUDER_TOP, below: float = INTRUDER_BELOW) -> int:
    """How many of the `top` largest directions are intruders: like none of the base's (m_j < `below`)."""
    return int((np.asarray(likeness_K, dtype=np.float64)[:top] < below).sum())


def intruder_curve(matrices: Sequence[ArrayLike], top: int = INTRUDER_TOP) -> list[list[int]]:
    """Intruders of all the matrices (the m_j of each): per threshold a list of counts, for k = 1 .. `top`."""
    return [
        [sum(intruders(likeness_K, k, below) for likeness_K in matrices) for k in range(1, top + 1)]
        for below in THRESHOLDS
    ]


def _scaled(values: ArrayLike) -> Array | None:
    """Singular values as shares of the largest, which squares do not under- or overflow; None if all are 0."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("singular values are a list of finite numbers that are not negative")
    largest = values.max(initial=0.0)
    return values / largest if largest > 0 else None


def _matrix(values: ArrayLike) -> Array:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a matrix is needed, not shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("a matrix with values that are not finite has no spectrum")
    return values
