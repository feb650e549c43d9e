"""How alike two sets of representations of the same rows are, beside CKA, and how sure a number is over rows.

Pure functions of float64 arrays and a generator; no files, no torch, no models (`represent.py` makes the rows).
CKA is in `cka.py`. Not for inference: rows and layers are not replicates; intervals over training runs come
from `stats.py`. A standard error over rows (`subsample_error`) says how much a number depends on which inputs
were taken, and nothing about another training run.

Axes: N rows (the same examples on both sides), D features before, E features after. Each function says what it
does not react to, and its source. Bit-identical inputs are exactly 1 alike (angle or change 0), by construction
and not by comparing them (see `cka.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetrial.rows import NO_SPREAD, Array, centred, checked, paired, same_shape

NEIGHBOURS = 10  # Huh et al. 2024 (arXiv 2405.07987)
DEAD_SHARE = (
    1e-6  # of the spread of the column that varies most: fp32's rounding of a value of its size is 6e-8
)
SUBSAMPLE_SHARE = 0.75  # of the rows, without replacement: `subsample_error`
TIE_DECIMALS = 12  # of the largest distance: below that, two distances differ by float64's rounding


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


class Procrustes(NamedTuple):
    """How well one side, rotated and scaled, fits the other: 1 and 0 rad where it fits exactly."""

    similarity: float
    angle: float  # radians, 0 to pi / 2


def procrustes(before_ND: ArrayLike, after_NE: ArrayLike) -> Procrustes | None:
    """Nuclear-norm similarity s = ||X'Y||_* / (||X|| ||Y||) of the column-centred rows, and arccos(s).

    s is the best correlation of X with any rotation of Y (Schönemann 1966); the angle is a metric, so that
    angles of three models obey the triangle inequality (Williams et al. 2021, arXiv 2110.14739). Not changed
    by rotation, scale and shift of either side; changed by any other linear map, and more than CKA by what
    happens to directions of little variance (Ding et al. 2021, arXiv 2108.01661). Symmetric. Widths may
    differ: the narrower side counts as if zeros followed. Not debiased: s of unrelated rows is 0.91 at 750
    rows of 2,048 features, so that only values at the same N and widths compare.

    None where one side does not vary. An angle below 1e-7 is rounding: arccos makes 1e-8 of 1e-16; for
    bit-identical inputs it is exactly 0, because ||X|| is taken as the root of ||X'X||_*, the same
    operations as above the line. Cost: N D min(N, D) and three singular value decompositions of that size.

    Raises:
        ValueError: not 2-D, not equally many rows, or values that are not finite.
    """
    before_ND, after_NE = paired(before_ND, after_NE)
    x_ND, y_NE = centred(before_ND), centred(after_NE)
    if x_ND is None or y_NE is None:
        return None
    x_NR, y_NS = _without_null_space(x_ND), _without_null_space(y_NE)
    product = _nuclear_norm(x_NR, x_NR) * _nuclear_norm(y_NS, y_NS)
    similarity = min(1.0, _nuclear_norm(x_NR, y_NS) / math.sqrt(product))
    return Procrustes(similarity, math.acos(similarity))


def rsa(
    before_ND: ArrayLike, after_NE: ArrayLike, *, distance: Literal["correlation", "euclidean"] = "correlation"
) -> float | None:
    """Representational similarity analysis: Spearman's rank correlation of the distances between rows.

    Distances are 1 - Pearson's correlation of two rows, or Euclidean; ranks are over all pairs of rows, ties
    at their mean rank (Kriegeskorte et al. 2008, doi 10.3389/neuro.06.004.2008). Not changed by anything
    that keeps the order of distances: Euclidean ones by rotation, scale and shift of either side;
    correlations by scale and offset of single rows, but not by rotation or shift. Symmetric; widths may
    differ; 0 is expected of permuted rows. Distances that differ by less than 1e-12 of the largest are tied.

    A row without spread over its features has no correlation and is left out on both sides. None where all
    distances on a side are equal or fewer than 3 rows are left.

    Raises:
        ValueError: not 2-D, not equally many rows, or values that are not finite.
    """
    x_ND, y_NE = paired(before_ND, after_NE)
    if distance == "correlation":
        x_ND, y_NE = _unit_rows(_row_centred(x_ND), _row_centred(y_NE))
    if len(x_ND) < 3:
        return None
    x_P, y_P = _distance_ranks(x_ND), _distance_ranks(y_NE)
    xx, yy = float((x_P * x_P).sum()), float((y_P * y_P).sum())
    return float((x_P * y_P).sum()) / math.sqrt(xx * yy) if xx > 0 and yy > 0 else None


class NeighbourOverlap(NamedTuple):
    """The share of nearest neighbours that both sides have in common, and what chance alone gives."""

    share: float
    chance: float


def neighbour_overlap(
    before_ND: ArrayLike, after_NE: ArrayLike, *, k: int = NEIGHBOURS
) -> NeighbourOverlap | None:
    """Mutual k-nearest neighbours: the mean over rows of the share of their k nearest that both sides agree on.

    Nearest by the cosine of the raw rows, the row itself left out (Huh et al. 2024, arXiv 2405.07987, with
    their k). Chance is k / (n - 1) for n rows. Local: not changed by rotation, by scale of single rows, or by
    anything that happens to far rows; changed by a shift. Symmetric; widths may differ. Neighbours at
    exactly the same cosine are taken in an arbitrary order, the same for the same data.

    A row of length 0 is left out on both sides. None where one side does not vary, or k rows or fewer are left.

    Raises:
        ValueError: not 2-D, not equally many rows, values that are not finite, or k not in 1 .. N - 1.
    """
    x_ND, y_NE = paired(before_ND, after_NE)
    if not 1 <= k < len(x_ND):
        raise ValueError(f"{k} neighbours of {len(x_ND)} rows; at least 1, and fewer than there are rows")
    x_ND, y_NE = _unit_rows(x_ND, y_NE)
    n = len(x_ND)
    if n <= k or centred(x_ND) is None or centred(y_NE) is None:
        return None
    common = int((_nearest(x_ND, k) & _nearest(y_NE, k)).sum())
    return NeighbourOverlap(common / (n * k), k / (n - 1))


def standardised(before_ND: ArrayLike, after_ND: ArrayLike) -> tuple[Array, Array]:
    """Both sides less the mean of `before`, divided by its standard deviation (of N), column by column.

    One feature of great variance decides CKA, Procrustes and Euclidean RSA alone; so scaled, every feature of
    the base counts alike (Timkey and van Schijndel 2021, arXiv 2109.04404). The base's statistics serve both
    sides, so that a change of a feature's scale still counts as a change. Columns that do not vary in
    `before`, or less than `DEAD_SHARE` of the one that varies most, have no scale of their own, and are left
    out on both sides, whatever they do in `after`: the last layer of MiniLM has three of a spread of 1e-9 and
    less, whose slightest change would otherwise outweigh all the others.

    Raises:
        ValueError: not 2-D, shapes that differ, values that are not finite, or no rows.
    """
    before_ND, after_ND = same_shape(before_ND, after_ND)
    if not len(before_ND):
        raise ValueError("no rows to take a mean of")
    mean_D = before_ND.mean(axis=0)
    x_ND = before_ND - mean_D
    squares_D = (x_ND * x_ND).mean(axis=0)
    varies_D = squares_D > (NO_SPREAD * mean_D) ** 2
    varies_D &= squares_D > DEAD_SHARE**2 * squares_D.max(initial=0.0)
    scale_D = np.sqrt(squares_D[varies_D])
    return x_ND[:, varies_D] / scale_D, (after_ND - mean_D)[:, varies_D] / scale_D


class VarianceShares(NamedTuple):
    """The share of the total variance over rows in the 1 and the 3 features that vary most."""

    top_1: float
    top_3: float


def variance_shares(values_ND: ArrayLike) -> VarianceShares | None:
    """How much of what CKA sees is in very few features: a share near 1 calls for `standardised` beside it.

    A few dimensions of language models hold most of the variance (Timkey and van Schijndel 2021, arXiv
    2109.04404; Sun et al. 2024, arXiv 2402.17762). Not changed by scale and shift; changed by rotation: these
    are features, not principal components. None where the rows do not vary.

    Raises:
        ValueError: not 2-D, or values that are not finite.
    """
    x_ND = centred(checked(values_ND))
    if x_ND is None:
        return None
    largest_D = np.sort((x_ND * x_ND).sum(axis=0))[::-1]
    total = float(largest_D.sum())
    return VarianceShares(float(largest_D[0]) / total, float(largest_D[:3].sum()) / total)


def subsample_error(
    measure: Callable[[Array, Array], float | None],
    before_ND: ArrayLike,
    after_NE: ArrayLike,
    rng: np.random.Generator,
    *,
    share: float = SUBSAMPLE_SHARE,
    times: int = 100,
) -> float | None:
    """The standard error over rows of `measure(before, after)`, by a delete-d jackknife.

    `times` subsamples of r = share * N rows are drawn without replacement; their standard deviation times
    sqrt(r / (N - r)) is the error of the value of all N rows (Shao and Wu 1989, doi 10.1214/aos/1176347263;
    for a mean it is s / sqrt(N) in expectation). It errs on the large side: for the CKA of 100 rows by 1.1
    where they are much alike, 1.3 where little, 1.5 where not at all (there a U-statistic's first term
    vanishes). Rows must be a random sample of the inputs that the value is to speak for.

    Never a bootstrap: a repeated row is alike to itself on both sides, which brings the debiased CKA of
    unrelated rows from 0 to 0.7 (200 rows of 512). Not the spread between training runs. Where a measure's
    level depends on N (biased CKA, `procrustes`, chance in `neighbour_overlap`), the error is of the value at
    this N and says nothing of that.

    None where the measure gives None for any of the subsamples.

    Raises:
        ValueError: as the measure, a share that keeps no row or all, or fewer than 2 times.
    """
    before_ND, after_NE = paired(before_ND, after_NE)
    samples, values = Subsamples.drawn(len(before_ND), rng, share=share, times=times), []
    for rows in samples.rows:
        value = measure(before_ND[rows], after_NE[rows])
        if value is None:
            return None
        values.append(value)
    return samples.error(values)


class Subsamples(NamedTuple):
    """Rows drawn without replacement, several times; what they say of an error is `subsample_error`'s."""

    rows: Sequence[NDArray[np.int64]]
    of: int

    @classmethod
    def drawn(
        cls, n: int, rng: np.random.Generator, *, share: float = SUBSAMPLE_SHARE, times: int = 100
    ) -> Subsamples:
        """`times` subsamples of `share` of `n` rows, each in order. Raises ValueError as `subsample_error`."""
        kept = round(share * n)
        if not 0 < kept < n or times < 2:
            raise ValueError(f"{times} subsamples of {kept} of {n} rows; at least 2 of some rows and not all")
        return cls([np.sort(rng.choice(n, kept, replace=False)) for _ in range(times)], n)

    def error(self, values: Sequence[float] | Array) -> float:
        """The standard error of a value of all rows, from those of the subsamples."""
        kept = len(self.rows[0])
        return float(np.std(values, ddof=1)) * math.sqrt(kept / (self.of - kept))


def _without_null_space(x_ND: Array) -> Array:
    """N x min(N, D), the same up to a rotation of features, which changes no nuclear norm."""
    n, d = x_ND.shape
    return np.ascontiguousarray(np.transpose(np.linalg.qr(x_ND.T, mode="r"))) if n < d else x_ND


def _nuclear_norm(x_NR: Array, y_NS: Array) -> float:
    # A copy, because BLAS takes another routine for one array twice (see `CkaAccumulator.add`).
    return float(np.linalg.svd(x_NR.T @ y_NS.copy(), compute_uv=False).sum())


def _row_centred(x_ND: Array) -> Array:
    """Rows less their own mean; exactly 0 where a row does not vary over its features."""
    if not x_ND.shape[1]:
        return x_ND
    means_N1 = x_ND.mean(axis=1, keepdims=True)
    rows_ND = x_ND - means_N1
    flat_N = (rows_ND * rows_ND).mean(axis=1) <= (NO_SPREAD * means_N1[:, 0]) ** 2
    rows_ND[flat_N] = 0.0
    return rows_ND


def _unit_rows(x_ND: Array, y_NE: Array) -> tuple[Array, Array]:
    """Rows of length 1, without those that have no length on either side."""
    lengths_x_N, lengths_y_N = np.linalg.norm(x_ND, axis=1), np.linalg.norm(y_NE, axis=1)
    kept_N = (lengths_x_N > 0) & (lengths_y_N > 0)
    return x_ND[kept_N] / lengths_x_N[kept_N, None], y_NE[kept_N] / lengths_y_N[kept_N, None]


def _distance_ranks(x_ND: Array) -> Array:
    """Ranks of the squared Euclidean distances of all pairs of rows, less the mean rank.

    Of rows of length 1, squared distances are 2 - 2 cos, which rank as 1 - cos.
    """
    x_ND = x_ND - x_ND.mean(axis=0)  # distances are differences: no large offset may cancel in them
    gram_NN = x_ND @ x_ND.T
    squares_N = gram_NN.diagonal()
    distances_NN = squares_N[:, None] + squares_N - 2 * gram_NN
    distances_P = distances_NN[np.triu(np.ones(distances_NN.shape, dtype=bool), 1)]
    largest = float(distances_P.max())
    if largest > 0:
        distances_P = np.round(distances_P / largest, TIE_DECIMALS)
    _, inverse_P, counts = np.unique(distances_P, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return ranks[inverse_P] - (len(distances_P) + 1) / 2


def _nearest(unit_ND: Array, k: int) -> NDArray[np.bool_]:
    """N x N: whether the column is one of the row's k nearest by cosine."""
    cosines_NN = unit_ND @ unit_ND.T
    np.fill_diagonal(cosines_NN, -np.inf)
    nearest_NK = np.argpartition(cosines_NN, -k, axis=1)[:, -k:]
    chosen_NN = np.zeros(cosines_NN.shape, dtype=bool)
    np.put_along_axis(chosen_NN, nearest_NK, True, axis=1)
    return chosen_NN
