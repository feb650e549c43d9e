"""Ranks, subspaces and intruder dimensions against published values, closed forms and NumPy's dense SVD."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetrial import spectrum
from finetrial.spectrum import (
    effective_rank,
    energy_within,
    intruder_curve,
    intruders,
    left_basis,
    likeness,
    low_rank_svd,
    rank_for_energy,
    stable_rank,
    subspace_overlap,
)

SIDE = 256  # of the matrices in which intruders are looked for


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def unit(size: int, seed: int) -> np.ndarray:
    vector = gaussian(size, seed=seed)
    return vector / np.linalg.norm(vector)


def orthonormal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(gaussian(rows, columns, seed=seed))[0]


def found(base: np.ndarray, tuned: np.ndarray, top: int = 10) -> np.ndarray:
    """m_j of the tuned matrix's largest directions."""
    return likeness(left_basis(tuned, top), left_basis(base))


def algorithm_1(base: np.ndarray, tuned: np.ndarray, top: int = 10) -> np.ndarray:
    """m_j as the paper's authors compute them: dense SVDs, every vector of the base."""
    u_base, u_tuned = (np.linalg.svd(matrix, full_matrices=False)[0] for matrix in (base, tuned))
    return np.abs(u_base.T @ u_tuned[:, :top]).max(axis=0)


# ---- ranks -----------------------------------------------------------------------------------------------


def test_ranks_of_halving_values():
    values = [1, 0.5, 0.25, 0.125]
    assert effective_rank(values) == pytest.approx(3.1171, abs=5e-5)
    assert stable_rank(values) == pytest.approx(1.3281, abs=5e-5)
    assert rank_for_energy(values) == 2


def test_ranks_of_a_gaussian_matrix():
    values = np.linalg.svd(gaussian(768, 768), compute_uv=False)
    assert effective_rank(values) == pytest.approx(617.8, rel=0.005)
    assert stable_rank(values) == pytest.approx(192.3, rel=0.02)
    assert rank_for_energy(values) == pytest.approx(392, abs=3)


@given(count=st.integers(1, 60), size=st.floats(1e-200, 1e200), zeros=st.integers(0, 5))
def test_equal_values_count_as_many_directions_as_there_are(count, size, zeros):
    values = [size] * count + [0.0] * zeros
    assert effective_rank(values) == pytest.approx(count)
    assert stable_rank(values) == pytest.approx(count)
    assert rank_for_energy(values) == math.ceil(0.9 * count - 1e-9)
    assert rank_for_energy(values, 1.0) == count


@pytest.mark.parametrize("count", [10, 20, 30])
def test_nine_tenths_of_equal_values_are_enough_however_they_are_rounded(count):
    for seed in range(30):
        values = np.linalg.svd(0.3 * orthonormal(80, count, seed), compute_uv=False)
        assert rank_for_energy(values) == 9 * count / 10


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1e6)), min_size=1, max_size=30).filter(any),
    st.floats(1e-3, 1e3),
)
def test_ranks_lie_between_one_and_the_count_and_ignore_scale_and_order(values, scale):
    others = [scale * value for value in reversed(values)]
    for rank in (effective_rank, stable_rank):
        assert 1 - 1e-12 <= rank(values) <= len(values) * (1 + 1e-12)
        assert rank(others) == pytest.approx(rank(values))
    # sum p^2 / max p^2 <= 1 / max p = exp(min-entropy) <= exp(entropy)
    assert stable_rank(values) <= effective_rank(values) * (1 + 1e-9)
    assert 1 <= rank_for_energy(values) <= np.count_nonzero(values)


@pytest.mark.parametrize("values", [[], [0.0, 0.0]])
def test_what_has_no_direction_has_no_rank(values):
    assert effective_rank(values) is None
    assert stable_rank(values) is None
    assert rank_for_energy(values) is None


# ---- bases and subspaces -----------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    top=st.one_of(st.none(), st.integers(1, 30)),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_the_left_basis_is_that_of_a_dense_svd_up_to_sign(shape, top, scale, seed):
    weight = scale * gaussian(*shape, seed=seed)
    vectors, values, _ = np.linalg.svd(weight, full_matrices=False)
    basis = left_basis(weight, top)
    count = min(*shape, top or 99)
    assert basis.vectors_MR.shape == (shape[0], count)
    np.testing.assert_allclose(basis.values_R, values[:count], atol=1e-7 * values[0])
    gaps = np.diff(values, prepend=np.inf, append=-np.inf)
    clear = (np.minimum(-gaps[:-1], -gaps[1:]) > 1e-3 * values[0])[
        :count
    ]  # a vector has a sign, and a gap to its next
    cosines = np.abs((basis.vectors_MR * vectors[:, :count]).sum(axis=0))
    np.testing.assert_allclose(cosines[clear & (values[:count] > 1e-3 * values[0])], 1.0, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (30, 30)])
def test_a_matrix_of_low_rank_has_so_many_directions(shape):
    basis = left_basis(gaussian(shape[0], 3) @ gaussian(3, shape[1], seed=1))
    assert basis.vectors_MR.shape == (shape[0], 3)
    np.testing.assert_allclose(basis.vectors_MR.T @ basis.vectors_MR, np.eye(3), atol=1e-10)
    assert left_basis(np.zeros(shape)).vectors_MR.shape == (shape[0], 0)


@given(
    outputs=st.integers(1, 20),
    inputs=st.integers(1, 20),
    rank=st.integers(1, 24),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_the_svd_from_factors_is_that_of_their_product(outputs, inputs, rank, seed):
    left, right = gaussian(outputs, rank, seed=seed), gaussian(rank, inputs, seed=seed + 1)
    u, values, v = low_rank_svd(left, right)
    count = min(outputs, rank, inputs)
    dense = np.linalg.svd(left @ right, compute_uv=False)
    np.testing.assert_allclose(values, dense[:count], atol=1e-12 * (1 + dense[0]))
    np.testing.assert_allclose(u * values @ v, left @ right, atol=1e-11 * (1 + dense[0]))
    np.testing.assert_allclose(u.T @ u, np.eye(count), atol=1e-12)
    np.testing.assert_allclose(v @ v.T, np.eye(count), atol=1e-12)


def test_the_svd_of_a_zero_factor_is_zero():
    assert not low_rank_svd(np.zeros((9, 2)), gaussian(2, 7))[1].any()


def test_a_subspace_overlaps_itself_by_one_and_a_random_one_by_chance():
    a, b = orthonormal(256, 8), orthonormal(256, 64, seed=1)
    assert subspace_overlap(a, a, 8, 8) == pytest.approx(1.0)
    assert subspace_overlap(a, a @ orthonormal(8, 8, seed=2), 8, 8) == pytest.approx(1.0)
    assert subspace_overlap(a, -a, 3, 8) == pytest.approx(1.0)  # one holds the other
    assert subspace_overlap(a[:, :4], a[:, 4:], 4, 4) == pytest.approx(0.0, abs=1e-12)
    chance = np.mean([subspace_overlap(orthonormal(256, 8, seed=s), b, 8, 8) for s in range(2, 22)])
    assert chance == pytest.approx(8 / 256, rel=0.1)
    chance = np.mean([subspace_overlap(orthonormal(256, 8, seed=s), b, 8, 64) for s in range(2, 22)])
    assert chance == pytest.approx(64 / 256, rel=0.1)


def test_the_energy_of_an_update_within_a_basis():
    vectors = orthonormal(64, 6)
    along, across = np.outer(vectors[:, 0], unit(40, 1)), np.outer(vectors[:, 5], unit(40, 2))
    assert energy_within(along, vectors[:, :3]) == pytest.approx(1.0)
    assert energy_within(across, vectors[:, :3]) == pytest.approx(0.0, abs=1e-12)
    assert energy_within(3e-170 * along + 4e-170 * across, vectors[:, :3]) == pytest.approx(0.36)
    assert energy_within(gaussian(64, 4000, seed=3), vectors) == pytest.approx(6 / 64, rel=0.02)
    assert energy_within(np.zeros((64, 40)), vectors) is None


# ---- intruder dimensions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (300, 100), (100, 300)])
def test_a_matrix_and_its_multiple_have_no_intruders_and_are_wholly_alike(shape):
    base = gaussian(*shape)
    np.testing.assert_allclose(found(base, base), 1.0, atol=1e-9)
    np.testing.assert_allclose(found(base, 1.1 * base), 1.0, atol=1e-9)
    np.testing.assert_allclose(found(base, -base), 1.0, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("share", "expected"), [(0.5, 0), (1.1, 1), (2.0, 1), (4.0, 1)])
def test_a_new_direction_intrudes_once_it_is_larger_than_the_old_ones(share, expected, seed):
    base = gaussian(SIDE, SIDE, seed=seed)
    strength = share * np.linalg.norm(base, 2)
    tuned = base + strength * np.outer(unit(SIDE, seed + 10), unit(SIDE, seed + 20))
    assert intruders(found(base, tuned)) == expected


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (300, 200), (200, 300)])
def test_every_direction_of_a_strong_update_of_rank_8_intrudes(shape):
    base = gaussian(*shape)
    update = gaussian(shape[0], 8, seed=1) @ gaussian(8, shape[1], seed=2)
    update *= 2 * np.linalg.norm(base, 2) / np.linalg.norm(update, 2)
    m = found(base, base + update)
    np.testing.assert_allclose(m, algorithm_1(base, base + update), atol=1e-7)
    assert intruders(m) == 8
    assert intruders(m, top=5) == 5
    # An unrelated vector's largest cosine: about sqrt(2 ln M / M), and never below 1 / sqrt(M) in a full basis.
    assert m[0] == pytest.approx(math.sqrt(2 * math.log(shape[0]) / shape[0]), rel=0.5)


def test_weak_noise_has_no_intruders():
    base, noise = gaussian(SIDE, SIDE), gaussian(SIDE, SIDE, seed=1)
    noise *= 0.1 * np.linalg.norm(base, 2) / np.linalg.norm(noise, 2)
    assert intruders(found(base, base + noise)) == 0


@given(
    shape=st.tuples(st.integers(2, 24), st.integers(2, 24)),
    rank=st.integers(1, 6),
    strength=st.floats(0.1, 4.0),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_likeness_is_that_of_the_authors_algorithm(shape, rank, strength, seed):
    base = gaussian(*shape, seed=seed)
    update = strength * gaussian(shape[0], rank, seed=seed + 1) @ gaussian(rank, shape[1], seed=seed + 2)
    tuned = base + update / rank
    m = found(base, tuned)
    assert len(m) == min(10, *shape)
    assert ((m > 0) & (m <= 1)).all()
    np.testing.assert_allclose(m, algorithm_1(base, tuned), atol=1e-4)


@given(seed=st.integers(0, 10**6), wide=st.booleans())
@settings(max_examples=20, deadline=None)
def test_tied_directions_of_the_base_count_as_their_span(seed, wide):
    """All singular values equal, as after an orthogonal start: any basis is one of singular vectors."""
    base = orthonormal(40, 40, seed)[:, : 40 if wide else 20]
    rounded = (1.1 * base.astype(np.float32)).astype(np.float64)
    np.testing.assert_allclose(found(base, rounded), 1.0, atol=1e-5)
    new = np.linalg.svd(base, full_matrices=True)[0][:, -1]  # orthogonal to the narrow base
    tuned = base + 3 * np.outer(new, unit(base.shape[1], seed))
    assert intruders(found(base, tuned)) == (0 if wide else 1)


def test_what_the_base_has_no_direction_for_is_like_none_of_it():
    low = gaussian(30, 2) @ gaussian(2, 30, seed=1)
    new = np.linalg.svd(low)[0][:, 20]  # of the null space: any such vector, so no direction of the base's
    assert found(low, low + 100 * np.outer(new, unit(30, 3)))[0] < 0.2
    np.testing.assert_array_equal(found(np.zeros((30, 30)), low), [0.0, 0.0])
    assert found(low, np.zeros((30, 30))).size == 0


def test_the_curve_counts_over_thresholds_and_directions():
    curve = intruder_curve([[0.95, 0.15], [0.35, 0.45, 0.85]], top=4)
    assert len(curve) == len(spectrum.THRESHOLDS) == 9
    by_threshold = dict(zip(spectrum.THRESHOLDS, curve, strict=True))
    assert by_threshold[0.1] == [0, 0, 0, 0]
    assert by_threshold[0.2] == [0, 1, 1, 1]
    assert by_threshold[0.5] == [1, 3, 3, 3]
    assert by_threshold[0.9] == [1, 3, 4, 4]
    assert intruder_curve([]) == [[0] * 10] * 9


@given(st.lists(st.lists(st.floats(0, 1), max_size=12), max_size=5))
def test_counts_never_fall_with_the_threshold_or_with_more_directions(matrices):
    curve = np.array(intruder_curve(matrices))
    assert (np.diff(curve, axis=0) >= 0).all()
    assert (np.diff(curve, axis=1) >= 0).all()
    assert curve[4, 9] == sum(intruders(m) for m in matrices)


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: left_basis(np.zeros(3)), "matrix is needed"),
        (lambda: left_basis(np.zeros((0, 3))), "matrix is needed"),
        (lambda: left_basis([[1.0, np.nan]]), "not finite"),
        (lambda: low_rank_svd(np.ones((3, 2)), np.ones((3, 2))), "do not multiply"),
        (lambda: subspace_overlap(np.eye(3), np.eye(4), 1, 1), "no common space"),
        (lambda: subspace_overlap(np.eye(3), np.eye(3), 1, 4), "columns were asked of"),
        (lambda: energy_within(np.ones((3, 2)), np.eye(2)), "3 outputs"),
        (lambda: effective_rank([-1.0]), "not negative"),
        (lambda: stable_rank([np.inf]), "finite"),
    ],
)
def test_what_has_no_spectrum_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
