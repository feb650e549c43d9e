"""The linear classifier on fixed features: its folds, its optimum, and what it reads."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from finetrial.linear_probe import cross_validated, fit, stratified_folds


@given(st.lists(st.integers(5, 40), min_size=2, max_size=4), st.integers(0, 2**32 - 1))
def test_every_row_is_in_one_fold_and_the_classes_are_shared_out(counts, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    folds = stratified_folds(labels, 5, np.random.default_rng(seed))
    assert sorted(np.concatenate(folds).tolist()) == list(range(len(labels)))
    for label, count in enumerate(counts):
        held = [int((labels[fold] == label).sum()) for fold in folds]
        assert sum(held) == count
        assert max(held) - min(held) <= 1
    sizes = [len(fold) for fold in folds]
    assert max(sizes) - min(sizes) <= 1


def test_a_class_with_fewer_rows_than_folds_is_refused():
    with pytest.raises(ValueError, match="class 1 has 3 rows; 5 folds need at least 5 of each"):
        stratified_folds([0] * 20 + [1] * 3, 5, np.random.default_rng(0))


@pytest.mark.parametrize("penalty", [0.01, 0.1, 1.0, 10.0])
def test_the_optimum_of_one_feature_solves_its_equation(penalty):
    """With x = -1 and 1 in two classes the weights are -a and a; the derivative of
    log(1 + exp(-2 a)) + penalty a^2 is zero at a = 1 / (penalty (1 + exp(2 a)))."""
    a = brentq(lambda a: a - 1 / (penalty * (1 + math.exp(2 * a))), 0, 100)
    weights, bias = fit(np.array([[-1.0], [1.0]] * 4), np.array([0, 1] * 4), 2, penalty)
    assert weights[0, 1] == pytest.approx(a, abs=1e-5)
    assert weights[0, 0] == pytest.approx(-a, abs=1e-5)
    assert bias[0] == pytest.approx(bias[1], abs=1e-5)


def test_classes_apart_are_read_and_labels_at_random_are_not():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 100)
    apart = rng.normal(size=(300, 10)) + 6 * np.eye(10)[labels]
    folds = stratified_folds(labels, 5, rng)
    assert cross_validated(apart, labels, folds).mean() > 0.98
    assert 0.2 < cross_validated(apart, rng.permutation(labels), folds).mean() < 0.47


def test_nothing_is_fitted_on_the_rows_that_are_judged():
    """Each row its own feature: learnt by heart, worth nothing on rows that were not seen."""
    labels = np.arange(60) % 2
    folds = stratified_folds(labels, 5, np.random.default_rng(1))
    assert cross_validated(np.eye(60), labels, folds, penalty=0.001).mean() <= 0.5


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-100, 100))
def test_the_scale_and_the_origin_of_a_feature_do_not_matter(seed, scale, shift):
    rng = np.random.default_rng(seed)
    labels = np.arange(40) % 2
    features = rng.normal(size=(40, 3)) + labels[:, None]
    moved = features * np.array([1, scale, 1]) + np.array([0, 0, shift])
    folds = stratified_folds(labels, 5, rng)
    constant = np.full((40, 1), 7.0)  # a feature that does not vary is left out
    np.testing.assert_array_equal(
        cross_validated(features, labels, folds), cross_validated(np.hstack([moved, constant]), labels, folds)
    )


def test_what_does_not_fit_is_refused():
    folds = [np.arange(5), np.arange(5, 10)]
    with pytest.raises(ValueError, match="do not fit 9 labels"):
        cross_validated(np.ones((10, 2)), [0] * 9, folds)
    with pytest.raises(ValueError, match="not finite"):
        cross_validated(np.full((10, 2), np.nan), [0, 1] * 5, folds)
