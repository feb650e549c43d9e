"""Cosine and relative change against reference values and identities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetrial.similarity import (
    mean_cosine,
    relative_change,
)


@pytest.fixture(scope="module")
def reference() -> tuple[np.ndarray, np.ndarray]:
    """The data of the CKA authors' notebook: np.random.seed(1337), X and then Y drawn."""
    legacy = np.random.RandomState(1337)
    x = legacy.randn(100, 10)
    return x, legacy.randn(100, 10) + x


def test_cosine_gives_the_reference_values_raw_and_mean_subtracted(reference):
    x, y = reference
    assert mean_cosine(x, y, subtract_mean=False) == pytest.approx(0.706042, abs=5e-7)
    assert mean_cosine(x, y) == pytest.approx(0.709527, abs=5e-7)


def test_mean_subtraction_takes_out_a_common_offset_that_fools_the_raw_cosine():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((500, 768)), rng.standard_normal((500, 768))
    x[:, 0] += 500
    y[:, 0] += 500
    assert mean_cosine(x, y, subtract_mean=False) > 0.99
    assert abs(mean_cosine(x, y)) < 0.01


def test_relative_change_of_a_tenth_more_is_a_tenth():
    x = np.random.default_rng(3).standard_normal((20, 4))
    assert relative_change(x, 1.1 * x) == pytest.approx(0.1, abs=1e-12)


@pytest.mark.parametrize("measure", [mean_cosine, relative_change])
def test_what_cannot_be_compared_is_refused(measure):
    ones = np.ones((20, 2))
    with pytest.raises(ValueError, match="same examples"):
        measure(ones, np.ones((21, 2)))
    with pytest.raises(ValueError, match="not finite"):
        measure(ones, np.full((20, 2), np.nan))
    with pytest.raises(ValueError, match="rows x features"):
        measure(ones, np.ones(20))


@pytest.mark.parametrize("measure", [mean_cosine, relative_change])
def test_what_goes_feature_by_feature_needs_the_same_features(measure):
    with pytest.raises(ValueError, match="one by one"):
        measure(np.ones((20, 2)), np.ones((20, 3)))


@given(rows=st.integers(4, 60), features=st.integers(1, 40), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_bit_identical_inputs_are_exactly_alike(rows, features, seed):
    x = np.random.default_rng(seed).standard_normal((rows, features)) + 100
    assert mean_cosine(x, x.copy()) == 1.0
    assert mean_cosine(x, x.copy(), subtract_mean=False) == 1.0
    assert relative_change(x, x.copy()) == 0.0


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6 / 3])
def test_rows_that_do_not_vary_have_no_similarity(constant):
    x = np.full((12, 3), constant)
    y = np.random.default_rng(4).standard_normal((12, 3))
    assert relative_change(x, y) is None
    assert mean_cosine(np.zeros((12, 3)), y) is None
