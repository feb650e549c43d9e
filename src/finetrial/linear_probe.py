"""What a linear classifier can still read from fixed features: cross-validated multinomial logistic regression.

Pure functions of float64 arrays; no torch, no files. Not for training models (`train.py`): the classifier is
refitted from nothing on every fold, so that two sets of features of the same rows are compared on equal terms.

Axes: N rows, D features, C classes.

Source: linear probes, Alain and Bengio 2016 (arXiv 1610.01644).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

FOLDS = 5
# Weight decay on standardised features: of 0.001 to 10 in steps of ten the best mean accuracy (600 rows each of
# SST-2, MRPC and RTE on MiniLM's features, SST-2 on SmolLM2-135M's; bench/linear_probe.py, docs/log.md).
PENALTY = 1.0
MOST_STEPS = 500


def stratified_folds(labels_N: ArrayLike, folds: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """The rows in `folds` parts, each with every class in nearly the same share; every row in one part.

    Raises:
        ValueError: a class has fewer rows than there are folds.
    """
    labels_N = np.asarray(labels_N)
    classes, counts = np.unique(labels_N, return_counts=True)
    if counts.min(initial=folds) < folds:
        rare = classes[counts.argmin()]
        raise ValueError(f"class {rare} has {counts.min()} rows; {folds} folds need at least {folds} of each")
    part_N = np.empty(len(labels_N), dtype=np.int64)
    begin = 0
    for label in classes:  # dealt out in turn, going on where the class before stopped
        rows = rng.permutation(np.flatnonzero(labels_N == label))
        part_N[rows] = (begin + np.arange(len(rows))) % folds
        begin += len(rows)
    return [np.flatnonzero(part_N == part) for part in range(folds)]


def cross_validated(
    features_ND: ArrayLike, labels_N: ArrayLike, folds: Sequence[NDArray[np.int64]], *, penalty: float = PENALTY
) -> NDArray[np.bool_]:
    """Whether each row is classified rightly by a classifier fitted on the other folds: bool [N].

    Features are standardised by the fitted rows' mean and spread; one that does not vary there is left out.

    Raises:
        ValueError: shapes do not fit, values that are not finite, or the fit does not settle.
    """
    features_ND = np.asarray(features_ND, dtype=np.float64)
    labels_N = np.unique(np.asarray(labels_N), return_inverse=True)[1]
    if features_ND.ndim != 2 or len(features_ND) != len(labels_N):
        raise ValueError(f"features {features_ND.shape} do not fit {len(labels_N)} labels")
    if not np.isfinite(features_ND).all():
        raise ValueError("features that are not finite cannot be classified")
    right_N = np.zeros(len(labels_N), dtype=bool)
    for held_out in folds:
        fitted = np.setdiff1d(np.arange(len(labels_N)), held_out)
        mean_D, spread_D = features_ND[fitted].mean(axis=0), features_ND[fitted].std(axis=0)
        varies_D = spread_D > 1e-12 * np.abs(mean_D)
        scaled_ND = (features_ND[:, varies_D] - mean_D[varies_D]) / spread_D[varies_D]
        weights_DC, bias_C = fit(scaled_ND[fitted], labels_N[fitted], int(labels_N.max()) + 1, penalty)
        predicted = (scaled_ND[held_out] @ weights_DC + bias_C).argmax(axis=1)
        right_N[held_out] = predicted == labels_N[held_out]
    return right_N


def fit(features_ND: Array, labels_N: NDArray[np.int64], classes: int, penalty: float) -> tuple[Array, Array]:
    """Weights [D, C] and bias [C] that minimise the mean cross-entropy + penalty / 2 |weights|^2.

    The minimum is unique in the weights (the bias up to one constant); it is found by L-BFGS from zero.

    Raises:
        ValueError: it is not reached.
    """
    from scipy.optimize import minimize

    n, dims = features_ND.shape
    target_NC = np.zeros((n, classes))
    target_NC[np.arange(n), labels_N] = 1.0

    def objective(flat: Array) -> tuple[float, Array]:
        weights_DC, bias_C = flat[:-classes].reshape(dims, classes), flat[-classes:]
        scores_NC = features_ND @ weights_DC + bias_C
        scores_NC -= scores_NC.max(axis=1, keepdims=True)
        log_sum_N = np.log(np.exp(scores_NC).sum(axis=1))
        value = float((log_sum_N - (target_NC * scores_NC).sum(axis=1)).mean())
        value += penalty / 2 * float((weights_DC * weights_DC).sum())
        error_NC = (np.exp(scores_NC - log_sum_N[:, None]) - target_NC) / n
        slope_DC = features_ND.T @ error_NC + penalty * weights_DC
        return value, np.concatenate([slope_DC.ravel(), error_NC.sum(axis=0)])

    options = {"maxiter": MOST_STEPS, "gtol": 1e-6, "ftol": 0.0}
    found = minimize(objective, np.zeros((dims + 1) * classes), jac=True, method="L-BFGS-B", options=options)
    if np.abs(found.jac).max() > 1e-4:
        raise ValueError(f"the linear probe's fit did not settle: {found.message}")
    return found.x[:-classes].reshape(dims, classes), found.x[-classes:]
