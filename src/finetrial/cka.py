"""Linear CKA of two sets of representations of the same rows: of a pair, streamed, or of all pairs of layers.

Pure functions of float64 arrays; no files, no torch, no models (`represent.py` makes the rows). Other measures
are in `similarity.py`. Not for inference: rows of a CKA must never be bootstrapped (a repeated row is alike to
itself; `similarity.subsample_error` says more), and neither rows nor layers are replicates; intervals come from
`stats.py`, over whole training runs.

Axes: N rows (the same examples on both sides), D features before, E features after.

Sources: linear CKA, Kornblith et al. 2019 (arXiv 1905.00414), eq. 4; debiased by the U-statistic of HSIC,
Song et al. 2012 (JMLR 13, eq. 5), because the biased value of unrelated data is about d / (n + d), not 0
(Murphy et al. 2024, arXiv 2405.01012); the same as an inner product, Székely and Rizzo 2014 (arXiv 1310.2926,
section 2).

CKA of bit-identical inputs is exactly 1, by construction and not by comparing them: the three HSIC terms come
from the same operations on the same numbers, hence are one number h, and sqrt(h * h) == h in binary floating
point. This asks of the BLAS that it gives the same sums for the same numbers wherever they lie in memory, which
OpenBLAS does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from finetrial.rows import Array, centred, checked, constant, paired

MIN_ROWS = 4  # the U-statistic divides by n - 3
# The most that `cka_table` holds of Gram matrices, in bytes; beyond it, sums over features do. 750 rows and 12
# layers take 27 MB, 2,000 rows and 32 layers 512 MB.
MOST_GRAM_BYTES = 2**30


def linear_cka(before_ND: ArrayLike, after_NE: ArrayLike, *, debiased: bool = True) -> float | None:
    """Linear CKA in two passes (centre, then Gram matrices): the reference for `CkaAccumulator`.

    Gives a number (1: equal up to rotation and scale; near 0: unrelated; the debiased one may fall a
    little below 0), or None where one side does not vary over the rows. Memory: N x N x 8 B, four times.

    Raises:
        ValueError: not 2-D, not equally many rows, fewer than 4 rows, or values that are not finite.
    """
    x_ND, y_NE = _both_centred(before_ND, after_NE)
    if x_ND is None or y_NE is None:
        return None
    gram_x_NN, gram_y_NN = x_ND @ x_ND.T, y_NE @ y_NE.T
    if debiased:
        np.fill_diagonal(gram_x_NN, 0.0)
        np.fill_diagonal(gram_y_NN, 0.0)
    hsic = _gram_hsic_unbiased if debiased else _gram_hsic_biased
    return _normalised(hsic(gram_x_NN, gram_y_NN), hsic(gram_x_NN, gram_x_NN), hsic(gram_y_NN, gram_y_NN))


def cka_floor(before_ND: ArrayLike, after_NE: ArrayLike) -> float | None:
    """What biased linear CKA of these data would be if their rows had nothing to do with each other.

    The exact expectation of `linear_cka(..., debiased=False)` over all permutations of one side's rows:
    tr(K) tr(L) / ((n - 1) ||K|| ||L||) with centred Gram matrices K and L. (Both have rows that sum to 0, so
    that the mean of the permuted L is tr(L) / (n - 1) times the centring matrix; the norms do not change.) It
    is the geometric mean of the sides' participation ratios over n - 1: a biased CKA says something only
    where it is well above. None where one side does not vary. Memory: min(N, D) squared x 8 B.

    Raises:
        ValueError: as `linear_cka`.
    """
    x_ND, y_NE = _both_centred(before_ND, after_NE)
    if x_ND is None or y_NE is None:
        return None
    traces = float((x_ND * x_ND).sum()), float((y_NE * y_NE).sum())
    return _floor(len(x_ND), *traces, _gram_square(x_ND), _gram_square(y_NE))


def grams(before_ND: ArrayLike, after_NE: ArrayLike) -> tuple[Array, Array]:
    """Both Gram matrices of centred rows, N x N, with zero diagonals: what `gram_cka` reads.

    Raises:
        ValueError: as `linear_cka`.
    """
    before_ND, after_NE = paired(before_ND, after_NE)
    _require_rows(len(before_ND))
    made = []
    for rows_ND in (before_ND, after_NE):
        offset_ND = rows_ND - rows_ND.mean(axis=0)
        gram_NN = offset_ND @ offset_ND.T
        np.fill_diagonal(gram_NN, 0.0)
        made.append(gram_NN)
    return made[0], made[1]


def gram_cka(before_NN: Array, after_NN: Array) -> float | None:
    """Debiased linear CKA from the `grams`; from the same rows and columns of both, that of these rows alone.

    None where either side does not vary.

    Raises:
        ValueError: fewer than 4 rows.
    """
    _require_rows(len(before_NN))
    sides = (before_NN, after_NN), (before_NN, before_NN), (after_NN, after_NN)
    return _normalised(*(_gram_hsic_unbiased(k_NN, l_NN) for k_NN, l_NN in sides))


def cka_table(
    layers_before: Sequence[ArrayLike], layers_after: Sequence[ArrayLike]
) -> list[list[float | None]]:
    """Debiased linear CKA of every layer before (rows of the table) with every layer after (columns).

    Layers are N x D arrays, of any widths, over the same N rows. A pair's value is that of `linear_cka` to
    1e-10, and exactly 1 for bit-identical layers; None where either layer does not vary.

    Every Gram matrix is made once and U-centred (Székely and Rizzo 2014), after which a pair costs N N / 2
    multiplications: its HSIC is the inner product of the two upper triangles. A plain product for each pair,
    not one for all: an entry of a matrix product may be summed in another order than its neighbour, and the
    1 would no longer be exact; it takes 2 % of the time that the Gram matrices do (750 rows of 2,048). Many
    rows of few features are summed over features instead, where that costs less or Gram matrices would take
    more than `MOST_GRAM_BYTES`. Memory: (layers before / 2 + 4) x N x N x 8 B, or 3 D D x 8 B.

    Raises:
        ValueError: as `linear_cka`, for any of the layers.
    """
    before, after = [checked(layer) for layer in layers_before], [checked(layer) for layer in layers_after]
    counts = {len(layer) for layer in [*before, *after]}
    if len(counts) > 1:
        raise ValueError(f"layers of {sorted(counts)} rows; all need the same examples")
    for n in counts:
        _require_rows(n)
    use_grams = _grams_cost_less([layer.shape for layer in before], [layer.shape for layer in after])
    prepare, hsic = (_u_centred_triangle, _inner) if use_grams else (centred, _feature_hsic)
    known = [prepare(layer) for layer in before]
    squares = [None if x is None else hsic(x, x) for x in known]
    table: list[list[float | None]] = [[None] * len(after) for _ in before]
    for column, layer in enumerate(after):  # one at a time: what is made of it serves one column alone
        y = prepare(layer)
        if y is None:
            continue
        yy = hsic(y, y)
        for row, (x, xx) in enumerate(zip(known, squares, strict=True)):
            if x is not None and xx is not None:
                table[row][column] = _normalised(hsic(x, y), xx, yy)
    return table


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
        x_ND, y_NE = paired(x_ND, y_NE)
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
            if constant(own.spread(), shift, own.count):
                return None
        return _normalised(*(pair.hsic(debiased) for pair in (self._xy, self._xx, self._yy)))

    def floor(self) -> float | None:
        """`cka_floor` of all rows so far: to be told beside `value(debiased=False)`.

        Raises:
            ValueError: fewer than 4 rows.
        """
        if self.value(debiased=False) is None:
            return None
        squares = self._xx.hsic(debiased=False), self._yy.hsic(debiased=False)
        return _floor(self.rows, self._xx.spread(), self._yy.spread(), *squares)


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

    def spread(self) -> float:
        """The sum of squares of u about its mean: the trace of its centred Gram matrix."""
        return self.square_u - float(self.sum_u @ self.sum_u) / self.count

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


def _grams_cost_less(before: list[tuple[int, ...]], after: list[tuple[int, ...]]) -> bool:
    """Multiplications of the two ways to a table; Gram matrices are symmetric, hence half."""
    if not before or not after:
        return True
    n, widths_before, widths_after = before[0][0], [d for _, d in before], [e for _, e in after]
    widths = [*widths_before, *widths_after]
    of_grams = n * n * (sum(widths) + len(before) * len(after)) // 2
    of_features = n * (sum(widths_before) * sum(widths_after) + sum(width * width for width in widths))
    return of_grams <= of_features and len(before) * n * n * 4 <= MOST_GRAM_BYTES


def _u_centred_triangle(values_ND: Array) -> Array | None:
    """The upper triangle of the U-centred Gram matrix: the inner product of two is n (n - 3) / 2 times HSIC."""
    x_ND = centred(values_ND)
    if x_ND is None:
        return None
    n, gram_NN = len(x_ND), x_ND @ x_ND.T
    np.fill_diagonal(gram_NN, 0.0)
    means_N = gram_NN.sum(axis=1) / (n - 2)
    gram_NN -= means_N[:, None]
    gram_NN -= means_N
    gram_NN += means_N.sum() / (n - 1)
    return gram_NN[np.triu(np.ones((n, n), dtype=bool), 1)]


def _inner(k: Array, m: Array) -> float:
    return float(k @ m)


def _feature_hsic(x_ND: Array, y_NE: Array) -> float:
    return _PairSums.of(x_ND, y_NE.copy()).hsic(debiased=True)  # a copy: see `CkaAccumulator.add`


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


def _floor(n: int, trace_x: float, trace_y: float, square_x: float, square_y: float) -> float:
    return trace_x * trace_y / ((n - 1) * math.sqrt(square_x * square_y))


def _gram_square(x_ND: Array) -> float:
    """The squared Frobenius norm of x x', which is that of x' x."""
    product = x_ND @ x_ND.T if len(x_ND) < x_ND.shape[1] else x_ND.T @ x_ND
    return float((product * product).sum())


def _both_centred(before_ND: ArrayLike, after_NE: ArrayLike) -> tuple[Array | None, Array | None]:
    before_ND, after_NE = paired(before_ND, after_NE)
    _require_rows(len(before_ND))
    return centred(before_ND), centred(after_NE)


def _require_rows(n: int) -> None:
    if n < MIN_ROWS:
        raise ValueError(f"{n} rows; CKA needs at least {MIN_ROWS}")
