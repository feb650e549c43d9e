"""Procrustes, RSA, neighbours and cosine against published values, other libraries and identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import procrustes as scipy_procrustes
from scipy.spatial.distance import pdist
from scipy.stats import rankdata, spearmanr

from finetrial.cka import linear_cka
from finetrial.similarity import (
    mean_cosine,
    neighbour_overlap,
    procrustes,
    relative_change,
    rsa,
    standardised,
    subsample_error,
    variance_shares,
)

# Seed, (rows, D, E), and what rsatoolbox 0.3.2 gives: biased linear CKA, nuclear-norm similarity (from the root
# of a Gram matrix, hence to 1e-7), Spearman of Euclidean and of correlation distances. Made by
# bench/similarity_oracle.py.
RSATOOLBOX = [
    (0, (20, 5, 3), 0.121923962, 0.317933167, 0.015866018, -0.038216834),
    (1, (12, 30, 7), 0.391867074, 0.619644465, -0.034798038, -0.018348815),
    (2, (40, 8, 8), 0.116361769, 0.332162942, 0.044535273, 0.014810296),
    (3, (9, 4, 50), 0.374446066, 0.419902175, 0.037837838, 0.144144144),
    (4, (100, 64, 64), 0.075968455, 0.334689896, 0.075582007, -0.008342213),
    (5, (30, 300, 200), 0.441590060, 0.849000066, -0.144923513, -0.025224620),
]
SHAPES = {
    "rows": st.integers(5, 40),
    "d": st.integers(3, 60),
    "e": st.integers(3, 60),
    "seed": st.integers(0, 10**6),
}


@pytest.fixture(scope="module")
def reference() -> tuple[np.ndarray, np.ndarray]:
    """The data of the CKA authors' notebook: np.random.seed(1337), X and then Y drawn."""
    legacy = np.random.RandomState(1337)
    x = legacy.randn(100, 10)
    return x, legacy.randn(100, 10) + x


def drawn(rows: int, d: int, e: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As `bench/similarity_oracle.py` draws: one feature of the first side is in all of the second."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, d)) * rng.lognormal(size=d)
    return x, rng.standard_normal((rows, e)) + x[:, :1]


def rotation(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


# ---- published values, other libraries -------------------------------------------------------------------


def test_the_reference_data_give_the_reference_values(reference):
    x, y = reference
    found = procrustes(x, y)
    assert found.similarity == pytest.approx(0.736255, abs=5e-7)
    assert found.angle == pytest.approx(0.743276, abs=5e-7)
    assert rsa(x, y) == pytest.approx(0.472440, abs=5e-7)
    assert rsa(x, y, distance="euclidean") == pytest.approx(0.492965, abs=5e-7)
    assert neighbour_overlap(x, y).share == pytest.approx(0.2790, abs=1e-12)
    assert neighbour_overlap(x, y).chance == pytest.approx(10 / 99, abs=1e-12)


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


@pytest.mark.parametrize(("seed", "shape", "biased", "nuclear", "euclidean", "correlation"), RSATOOLBOX)
def test_rsatoolbox_gives_the_same_of_random_rows(seed, shape, biased, nuclear, euclidean, correlation):
    rows, d, e = shape
    x, y = drawn(rows, d, e, seed)
    assert linear_cka(x, y, debiased=False) == pytest.approx(biased, abs=1e-9)
    assert procrustes(x, y).similarity == pytest.approx(nuclear, abs=1e-7)
    assert rsa(x, y, distance="euclidean") == pytest.approx(euclidean, abs=1e-9)
    assert rsa(x, y) == pytest.approx(correlation, abs=1e-9)


@given(**SHAPES)
@settings(max_examples=60, deadline=None)
def test_scipy_gives_the_same_of_random_rows(rows, d, e, seed):
    """Its disparity is 1 - s^2, of sides of one width: the narrower with zeros."""
    x, y = drawn(rows, d, e, seed)
    width = max(d, e)
    padded = (np.pad(side, ((0, 0), (0, width - side.shape[1]))) for side in (x, y))
    assert procrustes(x, y).similarity == pytest.approx(math.sqrt(1 - scipy_procrustes(*padded)[2]), abs=1e-9)
    for distance in ("euclidean", "correlation"):
        expected = spearmanr(pdist(x, distance), pdist(y, distance)).statistic
        assert rsa(x, y, distance=distance) == pytest.approx(expected, abs=1e-9)


def test_ranks_of_tied_distances_are_their_mean():
    """Points on a line at 0, 1, 2, 4: distances 1 2 4 1 3 2."""
    x = np.array([[0.0], [1], [2], [4]])
    y = np.array([[0.0], [1], [5], [3]])
    expected = np.corrcoef(rankdata([1, 2, 4, 1, 3, 2]), rankdata([1, 5, 3, 4, 2, 2]))[0, 1]
    assert rsa(x, y, distance="euclidean") == pytest.approx(expected, abs=1e-12)


def test_neighbours_of_points_on_a_circle():
    """Four pairs of directions; after, two pairs have changed partners: half of the rows keep theirs."""
    before = np.radians([0, 5, 90, 95, 180, 185, 270, 275])
    after = before.copy()
    after[[0, 2]] = before[[2, 0]]
    x, y = (np.stack([np.cos(angles), np.sin(angles)], axis=1) for angles in (before, after))
    lengths = np.arange(1.0, 9)[:, None]
    assert neighbour_overlap(x, y * lengths, k=1) == (0.5, 1 / 7)


# ---- what each does not react to -------------------------------------------------------------------------


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100), **SHAPES)
@settings(max_examples=60, deadline=None)
def test_rotation_scale_and_shift_change_neither_procrustes_nor_euclidean_rsa(rows, d, e, seed, scale, shift):
    x, y = drawn(rows, d, e, seed)
    moved = scale * x @ rotation(d, seed) + shift
    assert procrustes(moved, y).similarity == pytest.approx(procrustes(x, y).similarity, abs=1e-9)
    assert procrustes(x, moved).angle == pytest.approx(0, abs=1e-5)
    assert rsa(moved, y, distance="euclidean") == pytest.approx(rsa(x, y, distance="euclidean"), abs=1e-6)


@given(**SHAPES)
@settings(max_examples=40, deadline=None)
def test_what_looks_at_single_rows_ignores_their_lengths_and_offsets(rows, d, e, seed):
    rng = np.random.default_rng(seed)
    x, y = drawn(rows, d, e, seed)
    longer = x * rng.lognormal(size=(rows, 1))
    k = min(3, rows - 1)
    assert neighbour_overlap(longer @ rotation(d, seed), y, k=k) == neighbour_overlap(x, y, k=k)
    assert rsa(longer + rng.standard_normal((rows, 1)), y) == pytest.approx(rsa(x, y), abs=1e-6)
    assert mean_cosine(longer, y[:, :1] + 0 * x, subtract_mean=False) == pytest.approx(
        mean_cosine(x, y[:, :1] + 0 * x, subtract_mean=False), abs=1e-12
    )


def test_a_general_linear_map_is_a_change():
    x = np.random.default_rng(5).standard_normal((200, 6))
    mapped = x @ np.diag([10, 1, 1, 1, 1, 0.1])
    assert procrustes(x, mapped).angle > 0.5
    assert rsa(x, mapped, distance="euclidean") < 0.9
    assert neighbour_overlap(x, mapped).share < 0.5


@given(**SHAPES)
@settings(max_examples=40, deadline=None)
def test_sides_may_change_places(rows, d, e, seed):
    x, y = drawn(rows, d, e, seed)
    assert procrustes(x, y).similarity == pytest.approx(procrustes(y, x).similarity, abs=1e-12)
    assert rsa(x, y) == pytest.approx(rsa(y, x), abs=1e-12)
    assert neighbour_overlap(x, y, k=2) == neighbour_overlap(y, x, k=2)


@given(
    rows=st.integers(3, 30),
    widths=st.tuples(*[st.integers(1, 40)] * 3),
    near=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_angles_obey_the_triangle_inequality(rows, widths, near, seed):
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((rows, 1))
    x, y, z = (near * common + (1 - near) * rng.standard_normal((rows, width)) for width in widths)
    xy, yz, xz = procrustes(x, y).angle, procrustes(y, z).angle, procrustes(x, z).angle
    assert 0 <= xz <= xy + yz + 1e-7
    assert xz <= math.pi / 2


@given(**SHAPES)
@settings(max_examples=60, deadline=None)
def test_bit_identical_inputs_are_exactly_alike(rows, d, e, seed):
    x, _ = drawn(rows, d, e, seed)
    x += 100
    assert procrustes(x, x.copy()) == (1.0, 0.0)
    assert rsa(x, x.copy()) == 1.0
    assert rsa(x, x.copy(), distance="euclidean") == 1.0
    assert neighbour_overlap(x, x.copy(), k=2).share == 1.0
    assert mean_cosine(x, x.copy()) == 1.0
    assert mean_cosine(x, x.copy(), subtract_mean=False) == 1.0
    assert relative_change(x, x.copy()) == 0.0


@pytest.mark.parametrize(("rows", "features"), [(200, 384), (512, 100), (300, 768)])
def test_identical_inputs_are_exactly_alike_in_the_sizes_of_models(rows, features):
    x = np.random.default_rng(rows).standard_normal((rows, features))
    assert procrustes(x, x.copy()) == (1.0, 0.0)
    assert rsa(x, x.copy()) == 1.0
    assert neighbour_overlap(x, x.copy()).share == 1.0


# ---- unrelated data --------------------------------------------------------------------------------------


def test_unrelated_rows_are_alike_by_chance_alone():
    """RSA near 0, neighbours near k / (n - 1); Procrustes is not debiased, as its text says."""
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal((750, 2048)), rng.standard_normal((750, 2048))
    assert rsa(x, y) == pytest.approx(0, abs=0.03)
    assert rsa(x, y, distance="euclidean") == pytest.approx(0, abs=0.03)
    overlap = neighbour_overlap(x, y)
    assert overlap.share == pytest.approx(overlap.chance, abs=0.005)
    assert procrustes(x, y).similarity == pytest.approx(0.91, abs=0.005)


# ---- a few features that hold everything -----------------------------------------------------------------


def test_one_shared_massive_dimension_makes_unrelated_data_alike_until_they_are_standardised():
    """2,000 rows, sd 100 against 767 of sd 1: raw CKA 1e8 / (1e8 + 767), standardised 1 / 768 = 0.0013.

    The standardised value's own spread is 0.0007 (0.0015 is published for another draw).
    """
    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((2000, 768)), rng.standard_normal((2000, 768))
    x[:, 5] *= 100
    y[:, 5] = x[:, 5]
    assert linear_cka(x, y) == pytest.approx(0.99999, abs=5e-6)
    assert linear_cka(*standardised(x, y)) == pytest.approx(1 / 768, abs=0.002)
    shares = variance_shares(x)
    assert shares.top_1 == pytest.approx(1e4 / (1e4 + 767), abs=0.01)
    assert shares.top_1 < shares.top_3 < shares.top_1 + 0.001


def test_a_dead_feature_does_not_outweigh_the_living_ones():
    """Three features of 1e-9 beside 20 living ones, as in MiniLM's last layer; training moves them by 1e-3."""
    rng = np.random.default_rng(0)
    x = np.hstack([rng.normal(size=(400, 20)), 1e-9 * rng.normal(size=(400, 3))])
    y = x + 1e-3 * rng.normal(size=x.shape)
    before, after = standardised(x, y)
    assert before.shape == after.shape == (400, 20)
    assert linear_cka(before, after) > 0.999
    kept, _ = standardised(x * np.r_[np.ones(20), 1e5 * np.ones(3)], y)  # 1e-4 of the others: small and alive
    assert kept.shape == (400, 23)


def test_both_sides_are_standardised_by_the_base():
    x = np.random.default_rng(8).normal(5, [1, 10, 100], (40, 3))
    before, after = standardised(x, 2 * x)
    assert before.mean(axis=0) == pytest.approx(np.zeros(3), abs=1e-12)
    assert before.std(axis=0) == pytest.approx(np.ones(3), abs=1e-12)
    assert after.std(axis=0) == pytest.approx(np.full(3, 2.0), abs=1e-12)
    assert after.mean(axis=0) == pytest.approx(x.mean(axis=0) / x.std(axis=0), abs=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6 / 3])
def test_a_column_that_does_not_vary_in_the_base_has_no_scale_and_is_left_out(constant):
    x = np.random.default_rng(9).standard_normal((30, 3))
    y = x + 1
    x[:, 1] = constant
    before, after = standardised(x, y)
    assert before.shape == after.shape == (30, 2)
    assert after[:, 0] == pytest.approx((y[:, 0] - x[:, 0].mean()) / x[:, 0].std())
    nothing, _ = standardised(np.full((30, 2), constant), y[:, :2])
    assert nothing.shape == (30, 0)
    assert linear_cka(nothing, y) is None


def test_variance_shares_of_known_variances():
    rows = np.array([[1.0, 2, 3, 0, 1], [-1, -2, -3, 0, -1]]) + 7
    assert variance_shares(rows) == (9 / 15, 14 / 15)
    assert variance_shares(rows[:, :1]) == (1.0, 1.0)


# ---- how sure a number is over rows ----------------------------------------------------------------------


def test_the_error_of_a_mean_is_the_classical_one():
    """s / sqrt(n), which the delete-d jackknife of a mean is over all subsets; 4,000 of them are drawn."""
    rng = np.random.default_rng(10)
    x = rng.standard_normal((40, 1))
    for share in (0.5, 0.75):
        error = subsample_error(lambda a, b: float(a.mean() + 0 * b.mean()), x, x, rng, share=share, times=4000)
        assert error == pytest.approx(float(x.std(ddof=1)) / math.sqrt(40), rel=0.04)


def test_the_error_of_a_cka_is_its_spread_over_samples_of_rows():
    """Its own spread over 150 samples of 100 rows; the error errs on the large side, here by a tenth."""
    rng = np.random.default_rng(11)
    values, errors = [], []
    for sample in range(150):
        x = rng.standard_normal((100, 20))
        y = x + rng.standard_normal((100, 20))
        values.append(linear_cka(x, y))
        if sample < 25:
            errors.append(subsample_error(linear_cka, x, y, rng, times=40))
    assert 0.9 < np.mean(errors) / np.std(values, ddof=1) < 1.35


def test_a_bootstrap_of_rows_finds_unrelated_data_alike_and_subsamples_do_not():
    rng = np.random.default_rng(12)
    x, y = rng.standard_normal((200, 512)), rng.standard_normal((200, 512))
    drawn_again = [rng.integers(200, size=200) for _ in range(10)]
    assert np.mean([linear_cka(x[rows], y[rows]) for rows in drawn_again]) > 0.65
    assert abs(linear_cka(x, y)) < 0.03
    assert subsample_error(linear_cka, x, y, rng, times=20) < 0.03


def test_the_error_comes_from_the_generator_alone(reference):
    x, y = reference
    errors = [subsample_error(linear_cka, x, y, np.random.default_rng(seed), times=10) for seed in (1, 1, 2)]
    assert errors[0] == errors[1] != errors[2]


# ---- what has no value -----------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6 / 3])
def test_rows_that_do_not_vary_have_no_similarity(constant):
    x = np.full((12, 3), constant)
    y = np.random.default_rng(4).standard_normal((12, 3))
    for first, second in ((x, y), (y, x)):
        assert procrustes(first, second) is None
        assert rsa(first, second) is None
        assert rsa(first, second, distance="euclidean") is None
        assert neighbour_overlap(first, second, k=3) is None
        assert subsample_error(linear_cka, first, second, np.random.default_rng(0)) is None
    assert relative_change(x, y) is None
    assert variance_shares(x) is None
    assert mean_cosine(np.zeros((12, 3)), y) is None


def test_equal_distances_have_no_order_though_rounding_gives_them_one():
    corners = np.eye(9) * 0.1 + 0.3
    y = np.random.default_rng(4).standard_normal((9, 9))
    assert rsa(corners, y, distance="euclidean") is None


def test_a_row_without_a_direction_is_left_out_on_both_sides():
    x, y = drawn(20, 5, 6, 13)
    flat, none = x.copy(), y.copy()
    flat[3], none[8] = 0.1, 0.0
    kept = [row for row in range(20) if row not in (3, 8)]
    assert rsa(flat, none) == pytest.approx(rsa(x[kept], y[kept]), abs=1e-12)
    none[3] = 0.0
    assert neighbour_overlap(x, none, k=4) == neighbour_overlap(x[kept], y[kept], k=4)


@pytest.mark.parametrize(
    "measure", [procrustes, rsa, neighbour_overlap, mean_cosine, relative_change, standardised]
)
def test_what_cannot_be_compared_is_refused(measure):
    ones = np.ones((20, 2))
    with pytest.raises(ValueError, match="same examples"):
        measure(ones, np.ones((21, 2)))
    with pytest.raises(ValueError, match="not finite"):
        measure(ones, np.full((20, 2), np.nan))
    with pytest.raises(ValueError, match="rows x features"):
        measure(ones, np.ones(20))


@pytest.mark.parametrize("measure", [mean_cosine, relative_change, standardised])
def test_what_goes_feature_by_feature_needs_the_same_features(measure):
    with pytest.raises(ValueError, match="one by one"):
        measure(np.ones((20, 2)), np.ones((20, 3)))


def test_settings_that_make_no_sense_are_refused():
    x, rng = np.random.default_rng(0).standard_normal((10, 3)), np.random.default_rng(0)
    for k in (0, 10):
        with pytest.raises(ValueError, match=f"{k} neighbours of 10 rows"):
            neighbour_overlap(x, x, k=k)
    for share, times in ((0.0, 9), (1.0, 9), (0.5, 1)):
        with pytest.raises(ValueError, match="subsamples"):
            subsample_error(linear_cka, x, x, rng, share=share, times=times)
    with pytest.raises(ValueError, match="no rows"):
        standardised(x[:0], x[:0])
