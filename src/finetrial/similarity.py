"""How alike two sets of representations of the same rows are: linear CKA, cosine, relative change.

Pure functions of float64 arrays; no files, no torch, no models (`represent.py` makes the rows). Not for
inference: rows of a CKA must never be bootstrapped (a repeated row is alike to itself), and neither rows
nor layers are replicates; intervals come from `stats.py`, over whole training runs.

Axes: N rows (the same examples on both sides), D features before, E features after.

Sources: linear CKA, Kornblith et al. 2019 (arXiv 1905.00414), eq. 4; debiased by the U-statistic of HSIC,
Song et al. 2012 (JMLR 13, eq. 5), because the biased value of unrelated data is about d / (n + d), not 0.

A measure of bit-identical inputs is exactly 1 (or 0 for a change), by construction and not by comparing
them: the three HSIC terms come from the same operations on the same numbers, hence are one number h, and
sqrt(h * h) == h in binary floating point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

MIN_ROWS = 4  # the U-statistic divides by n - 3
# Rows whose spread is below this share of their mean's length are the same up to float64's rounding.
NO_SPREAD = 1e-13


def linear_cka(before_ND: ArrayLike, after_NE: ArrayLike, *, debiased: bool = True) -> float | None:
    """Linear CKA in two passes (centre, then Gram matrices): the reference for `CkaAccumulator`.

    Gives a number (1: equal up to rotation and scale; near 0: unrelated; the debiased one may fall a
    little below 0), or None where one side does not vary over the rows. Memory: N x N x 8 B, four times.

    Raises:
        ValueError: not 2-D, not equally many rows, fewer than 4 rows, or values that are not finite.
    """
    before_ND, after_NE = _paired(before_ND, after_NE)
    _require_rows(len(before_ND))
    mean_D, mean_E = before_ND.mean(axis=0), after_NE.mean(axis=0)
    x_ND, y_NE = before_ND - mean_D, after_NE - mean_E
    if _constant(float((x_ND * x_ND).sum()), mean_D, len(x_ND)):
        return None
    if _constant(float((y_NE * y_NE).sum()), mean_E, len(y_NE)):
        return None
    gram_x_NN, gram_y_NN = x_ND @ x_ND.T, y_NE @ y_NE.T
    if debiased:
        np.fill_diagonal(gram_x_NN, 0.0)
        np.fill_diagonal(gram_y_NN, 0.0)
    hsic = _gram_hsic_unbiased if debiased else _gram_hsic_biased
    return _normalised(hsic(gram_x_NN, gram_y_NN), hsic(gram_x_NN, gram_x_NN), hsic(gram_y_NN, gram_y_NN))


class CkaAccumulator:
    """Exact linear CKA in one pass: rows come in batches, are summed, and are not kept.

    `CkaAccumulator((D, E))`, then `add` every batch, `merge` accumulators of other shards if there are
    any, and ask for `value`. It equals `linear_cka` of all rows to 1e-8 in any batching. The sums are
    taken about the first batch's mean, which keeps a large common offset from cancelling (the
    U-statistic does not change under translation). Memory: (D D + D E + E E) x 8 B, whatever N is.
    """

    def __init__(self, dims: tuple[int, int]):
        """`dims`: the numbers of features (D, E) of the two sides."""
        self.dims = dims
        self._shift_D: Array = np.zeros(dims[0])
        self._shift_E: Array = np.zeros(dims[1])
        self._xx = _PairSums.empty(dims[0], dims[0])
        self._xy = _PairSums.empty(dims[0], dims[1])
        self._yy = _PairSums.empty(dims[1], dims[1])

    @property
    def rows(self) -> int:
        return self._xy.count

    def add(self, x_ND: ArrayLike, y_NE: ArrayLike) -> None:
        """Take in a batch: the same rows on both sides, in the same order.

        Raises:
            ValueError: wrong shapes, or values that are not finite.
        """
        x_ND, y_NE = _paired(x_ND, y_NE)
        if (x_ND.shape[1], y_NE.shape[1]) != self.dims:
            raise ValueError(f"a batch has {x_ND.shape[1]} and {y_NE.shape[1]} features; expected {self.dims}")
        if not len(x_ND):
            return
        if not self.rows:
            self._shift_D, self._shift_E = x_ND.mean(axis=0), y_NE.mean(axis=0)
        x_ND, y_NE = x_ND - self._shift_D, y_NE - self._shift_E
        # The copies keep BLAS on one routine: of one array twice it would take a symmetric one, whose
        # rounding differs, and identical inputs would no longer give exactly 1.
        self._xx += _PairSums.of(x_ND, x_ND.copy())
        self._xy += _PairSums.of(x_ND, y_NE)
        self._yy += _PairSums.of(y_NE, y_NE.copy())

    def merge(self, other: CkaAccumulator) -> None:
        """Take in another accumulator's rows (a shard's), whatever mean it sums about.

        Raises:
            ValueError: the numbers of features differ.
        """
        if other.dims != self.dims:
            raise ValueError(f"cannot merge features {other.dims} into {self.dims}")
        if not other.rows:
            return
        if not self.rows:
            self._shift_D, self._shift_E = other._shift_D.copy(), other._shift_E.copy()
        move_D, move_E = other._shift_D - self._shift_D, other._shift_E - self._shift_E
        self._xx += other._xx.moved(move_D, move_D)
        self._xy += other._xy.moved(move_D, move_E)
        self._yy += other._yy.moved(move_E, move_E)

    def value(self, *, debiased: bool = True) -> float | None:
        """CKA of all rows so far, or None where one side does not vary.

        Raises:
            ValueError: fewer than 4 rows.
        """
        _require_rows(self.rows)
        for own, shift in ((self._xx, self._shift_D), (self._yy, self._shift_E)):
            spread = own.square_u - float(own.sum_u @ own.sum_u) / own.count
            if _constant(spread, shift, own.count):
                return None
        return _normalised(*(pair.hsic(debiased) for pair in (self._xy, self._xx, self._yy)))


@dataclass
class _PairSums:
    """Sums over rows (u, v) that determine HSIC, biased and unbiased; additive."""

    count: int
    cross: Array  # sum of u v'
    sum_u: Array
    sum_v: Array
    square_u: float  # sum of |u|^2
    square_v: float
    weighted_u: Array  # sum of |v|^2 u
    weighted_v: Array  # sum of |u|^2 v
    square_both: float  # sum of |u|^2 |v|^2

    @classmethod
    def empty(cls, dims_u: int, dims_v: int) -> _PairSums:
        return cls.of(np.zeros((0, dims_u)), np.zeros((0, dims_v)))

    @classmethod
    def of(cls, u: Array, v: Array) -> _PairSums:
        uu, vv = (u * u).sum(axis=1), (v * v).sum(axis=1)
        return cls(
            count=len(u),
            cross=u.T @ v,
            sum_u=u.sum(axis=0),
            sum_v=v.sum(axis=0),
            square_u=float(uu.sum()),
            square_v=float(vv.sum()),
            weighted_u=(vv[:, None] * u).sum(axis=0),
            weighted_v=(uu[:, None] * v).sum(axis=0),
            square_both=float((uu * vv).sum()),
        )

    def __iadd__(self, other: _PairSums) -> _PairSums:
        self.count += other.count
        self.cross += other.cross
        self.sum_u += other.sum_u
        self.sum_v += other.sum_v
        self.square_u += other.square_u
        self.square_v += other.square_v
        self.weighted_u += other.weighted_u
        self.weighted_v += other.weighted_v
        self.square_both += other.square_both
        return self

    def moved(self, d: Array, e: Array) -> _PairSums:
        """The sums that rows (u + d, v + e) would have given: the products, multiplied out."""
        n, dd, ee = self.count, float(d @ d), float(e @ e)
        d_u, e_v = float(d @ self.sum_u), float(e @ self.sum_v)
        square_u = self.square_u + 2 * d_u + n * dd
        square_v = self.square_v + 2 * e_v + n * ee
        return _PairSums(
            count=n,
            cross=self.cross + np.outer(d, self.sum_v) + np.outer(self.sum_u, e) + n * np.outer(d, e),
            sum_u=self.sum_u + n * d,
            sum_v=self.sum_v + n * e,
            square_u=square_u,
            square_v=square_v,
            weighted_u=self.weighted_u + 2 * (self.cross @ e) + ee * self.sum_u + d * square_v,
            weighted_v=self.weighted_v + 2 * (d @ self.cross) + dd * self.sum_v + e * square_u,
            square_both=self.square_both
            + 2 * float(e @ self.weighted_v)
            + 2 * float(d @ self.weighted_u)
            + 4 * float(d @ self.cross @ e)
            + ee * (self.square_u + 2 * d_u)
            + dd * (self.square_v + 2 * e_v)
            + n * dd * ee,
        )

    def hsic(self, debiased: bool) -> float:
        n = self.count
        if not debiased:
            centred = self.cross - np.outer(self.sum_u, self.sum_v) / n
            return float((centred * centred).sum())
        # Song et al. eq. 5 on Gram matrices without their diagonals, written in features:
        # (K 1)_i = u_i . sum_u - |u_i|^2, and the trace loses the diagonal's |u_i|^2 |v_i|^2.
        trace = float((self.cross * self.cross).sum()) - self.square_both
        total_u = float(self.sum_u @ self.sum_u) - self.square_u
        total_v = float(self.sum_v @ self.sum_v) - self.square_v
        row_products = (
            float(self.sum_u @ self.cross @ self.sum_v)
            - float(self.sum_u @ self.weighted_u)
            - float(self.sum_v @ self.weighted_v)
            + self.square_both
        )
        return _unbiased(n, trace, total_u * total_v, row_products)


def mean_cosine(before_ND: ArrayLike, after_ND: ArrayLike, *, subtract_mean: bool = True) -> float | None:
    """Mean over rows of cos(x_i - mean_X, y_i - mean_Y); raw without `subtract_mean`.

    The means go first because one large common offset brings the raw cosine of unrelated data to 1
    (Timkey and van Schijndel 2021, arXiv 2109.04404). A row without a direction (length 0) is left
    out; None if no row has one.

    Raises:
        ValueError: not 2-D, shapes that differ, or values that are not finite.
    """
    x_ND, y_ND = _same_shape(before_ND, after_ND)
    if subtract_mean:
        x_ND, y_ND = _centred(x_ND), _centred(y_ND)
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
    before_ND, after_ND = _same_shape(before_ND, after_ND)
    x_ND, y_ND = _centred(before_ND), _centred(after_ND)
    spread = float((x_ND * x_ND).sum())
    if _constant(spread, before_ND.mean(axis=0), len(x_ND)):
        return None
    return math.sqrt(float(((y_ND - x_ND) ** 2).sum()) / spread)


def _gram_hsic_biased(k_NN: Array, l_NN: Array) -> float:
    return float((k_NN * l_NN).sum())


def _gram_hsic_unbiased(k_NN: Array, l_NN: Array) -> float:
    """Song et al. eq. 5; the diagonals are already zero."""
    rows_k, rows_l = k_NN.sum(axis=1), l_NN.sum(axis=1)
    trace, rows = float((k_NN * l_NN).sum()), float((rows_k * rows_l).sum())
    return _unbiased(len(k_NN), trace, float(rows_k.sum()) * float(rows_l.sum()), rows)


def _unbiased(n: int, trace: float, totals: float, row_products: float) -> float:
    return (trace + totals / ((n - 1) * (n - 2)) - 2 * row_products / (n - 2)) / (n * (n - 3))


def _normalised(xy: float, xx: float, yy: float) -> float | None:
    product = xx * yy
    return xy / math.sqrt(product) if xx > 0 and yy > 0 and product > 0 else None


def _constant(square_sum: float, mean: Array, n: int) -> bool:
    return square_sum <= n * NO_SPREAD**2 * float(mean @ mean)


def _centred(values_ND: Array) -> Array:
    return values_ND - values_ND.mean(axis=0) if len(values_ND) else values_ND


def _require_rows(n: int) -> None:
    if n < MIN_ROWS:
        raise ValueError(f"{n} rows; CKA needs at least {MIN_ROWS}")


def _same_shape(x: Any, y: Any) -> tuple[Array, Array]:
    x, y = _paired(x, y)
    if x.shape != y.shape:
        raise ValueError(f"shapes {x.shape} and {y.shape} differ; rows are compared feature by feature")
    return x, y


def _paired(x: Any, y: Any) -> tuple[Array, Array]:
    x = np.ascontiguousarray(x, dtype=np.float64)
    y = np.ascontiguousarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(f"rows x features are needed, not shapes {x.shape} and {y.shape}")
    if len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} rows; both sides need the same examples")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("values that are not finite cannot be compared")
    return x, y
