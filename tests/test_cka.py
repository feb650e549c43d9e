"""Linear CKA against published values, another library and identities; streamed and tabled against two-pass."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from ckatorch import cka_base
from hypothesis import given, settings
from hypothesis import strategies as st

from finetrial import cka
from finetrial.cka import CkaAccumulator, cka_floor, cka_table, linear_cka


@pytest.fixture(scope="module")
def reference() -> tuple[np.ndarray, np.ndarray]:
    """The data of the CKA authors' notebook, whose printed values are the known answers below."""
    legacy = np.random.RandomState(1337)  # the published values come from this generator
    x = legacy.randn(100, 10)
    return x, legacy.randn(100, 10) + x


def streamed(x, y, sizes=(32,)) -> CkaAccumulator:
    accumulator = CkaAccumulator((x.shape[1], y.shape[1]))
    start, turn = 0, 0
    while start < len(x):
        size = sizes[turn % len(sizes)]
        accumulator.add(x[start : start + size], y[start : start + size])
        start, turn = start + size, turn + 1
    return accumulator


def test_cka_gives_the_values_that_its_authors_published(reference):
    x, y = reference
    assert linear_cka(x, y, debiased=False) == pytest.approx(0.55761, abs=5e-6)
    assert linear_cka(x, y) == pytest.approx(0.51346, abs=5e-6)
    assert streamed(x, y).value(debiased=False) == pytest.approx(0.55761, abs=5e-6)
    assert streamed(x, y).value() == pytest.approx(0.51346, abs=5e-6)


def test_biased_cka_of_a_circle_and_its_first_coordinate_is_one_over_root_two():
    x = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    y = x[:, :1]
    assert linear_cka(x, y, debiased=False) == pytest.approx(1 / math.sqrt(2), abs=1e-12)
    assert streamed(x, y, (1, 3)).value(debiased=False) == pytest.approx(1 / math.sqrt(2), abs=1e-12)


def test_identical_inputs_give_exactly_one_where_the_flawed_formula_gave_almost_zero():
    """A formula with tr K tr L below the line, once in use, gives 1 / participation ratio: 0.0018."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((750, 2048))
    centred = x - x.mean(axis=0)
    gram = centred @ centred.T
    assert (gram * gram).sum() / gram.trace() ** 2 == pytest.approx(0.0018, abs=5e-5)
    assert linear_cka(x, x.copy()) == 1.0
    accumulator = streamed(x, x.copy(), (200,))
    assert accumulator.value() == 1.0
    assert accumulator.value(debiased=False) == 1.0


@given(
    rows=st.integers(4, 60),
    features=st.integers(1, 40),
    size=st.integers(1, 20),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_bit_identical_inputs_give_exactly_one(rows, features, size, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, features)) * rng.lognormal(size=features) + 100 * rng.standard_normal()
    accumulator = streamed(x, x.copy(), (size,))
    assert accumulator.value() == 1.0
    assert accumulator.value(debiased=False) == 1.0
    assert linear_cka(x, x.copy()) == 1.0
    table = cka_table([x, x[:, :1]], [x.copy(), x[:, :1].copy()])
    assert table[0][0] == table[1][1] == 1.0


@pytest.mark.parametrize("features", [2, 5, 31, 33, 100, 384])
@pytest.mark.parametrize("rows", [20, 200, 512, 750])
def test_identical_inputs_give_exactly_one_in_sizes_where_blas_changes_its_routine(rows, features):
    """x'x of one array twice and of an array and its copy round differently in most of these sizes."""
    x = np.random.default_rng(rows + features).standard_normal((rows, features))
    accumulator = streamed(x, x.copy(), (512,))
    assert accumulator.value() == 1.0
    assert accumulator.value(debiased=False) == 1.0


def test_unrelated_data_are_near_zero_debiased_and_at_the_known_floor_biased():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((750, 2048)), rng.standard_normal((750, 2048))
    assert linear_cka(x, y, debiased=False) == pytest.approx(0.7312, abs=0.003)
    assert linear_cka(x, y) == pytest.approx(0, abs=0.01)


@given(
    rows=st.integers(5, 80),
    dims=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    sizes=st.lists(st.integers(1, 25), min_size=1, max_size=6),
    offset=st.sampled_from([0.0, 1e3]),
    shared=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_streamed_equals_two_pass_in_any_batching_even_far_from_the_origin(
    rows, dims, sizes, offset, shared, seed
):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, dims[0]))
    y = rng.standard_normal((rows, dims[1])) + shared * x[:, :1]
    x, y = x + offset, y - offset
    for debiased in (True, False):
        expected = linear_cka(x, y, debiased=debiased)
        got = streamed(x, y, sizes).value(debiased=debiased)
        assert got == pytest.approx(expected, abs=1e-8)


@given(cut=st.integers(0, 60), offset=st.sampled_from([0.0, 50.0]), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_merged_shards_equal_one_accumulator_though_they_sum_about_different_means(cut, offset, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((60, 5))
    y = rng.standard_normal((60, 7)) + x[:, :1]
    x[cut:] += offset
    first, second = streamed(x[:cut], y[:cut], (9,)), streamed(x[cut:], y[cut:], (11,))
    first.merge(second)
    assert first.rows == 60
    for debiased in (True, False):
        expected = linear_cka(x, y, debiased=debiased)
        assert first.value(debiased=debiased) == pytest.approx(expected, abs=1e-8)


def test_merging_leaves_the_other_accumulator_as_it_was(reference):
    x, y = reference
    shard = streamed(x[:50], y[:50])
    before = shard.value()
    whole = CkaAccumulator((10, 10))
    whole.merge(shard)
    whole.add(x[50:], y[50:])
    assert shard.value() == before
    assert whole.value() == pytest.approx(linear_cka(x, y), abs=1e-10)


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_cka_ignores_rotation_scale_and_shift_but_not_a_general_map(scale, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((40, 6))
    rotation, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    moved = scale * x @ rotation + 3.0
    assert linear_cka(x, moved) == pytest.approx(1, abs=1e-10)
    assert streamed(x, moved, (7,)).value() == pytest.approx(1, abs=1e-10)
    assert linear_cka(x, x @ np.diag([10, 1, 1, 1, 1, 0.1])) < 0.99
    assert linear_cka(moved, x) == pytest.approx(linear_cka(x, moved), abs=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6 / 3])
def test_rows_that_do_not_vary_have_no_similarity(constant):
    x = np.full((9, 3), constant)
    y = np.random.default_rng(4).standard_normal((9, 3))
    assert linear_cka(x, y) is None
    assert streamed(x, y, (2,)).value() is None
    assert streamed(y, x, (3,)).value(debiased=False) is None
    assert cka_floor(x, y) is None
    assert streamed(x, y, (2,)).floor() is None
    table = cka_table([x, y], [y, x])
    assert table == [[None, None], [1.0, None]]


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.zeros((3, 2)), np.zeros((3, 2)), "at least 4"),
        (np.zeros((5, 2)), np.zeros((6, 2)), "same examples"),
        (np.full((5, 2), np.nan), np.zeros((5, 2)), "not finite"),
        (np.zeros(5), np.zeros(5), "rows x features"),
    ],
)
def test_what_cannot_be_compared_is_refused(x, y, words):
    with pytest.raises(ValueError, match=words):
        linear_cka(x, y)
    if x.ndim == 2:
        with pytest.raises(ValueError, match=words):
            streamed(x, y).value()


# ---- another library -------------------------------------------------------------------------------------


@given(
    rows=st.integers(4, 50),
    dims=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    shared=st.floats(0, 2),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_ckatorch_gives_the_same_biased_and_debiased(rows, dims, shared, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, dims[0])) + 3
    y = rng.standard_normal((rows, dims[1])) + shared * x[:, :1]
    for debiased in (True, False):
        expected = cka_base(torch.from_numpy(x), torch.from_numpy(y), unbiased=debiased).item()
        assert linear_cka(x, y, debiased=debiased) == pytest.approx(expected, abs=1e-9)


# ---- the floor of the biased value -----------------------------------------------------------------------


@given(rows=st.integers(4, 6), dims=st.tuples(st.integers(1, 8), st.integers(1, 8)), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_the_floor_is_the_mean_biased_value_over_all_orders_of_one_side(rows, dims, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, dims[0])) + 2
    y = rng.standard_normal((rows, dims[1])) * rng.lognormal(size=dims[1]) + x[:, :1]
    values = [linear_cka(x, y[list(order)], debiased=False) for order in permutations(range(rows))]
    assert cka_floor(x, y) == pytest.approx(np.mean(values), abs=1e-10)
    assert streamed(x, y, (3,)).floor() == pytest.approx(np.mean(values), abs=1e-10)


def test_the_floor_of_isotropic_unrelated_data_is_about_d_over_n_plus_d():
    """750 rows of 2,048 features, where 0.7312 was simulated."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((750, 2048)), rng.standard_normal((750, 2048))
    floor = cka_floor(x, y)
    assert floor == pytest.approx(2048 / (750 + 2048), abs=0.002)
    assert linear_cka(x, y, debiased=False) == pytest.approx(floor, abs=0.002)


def test_the_floor_of_one_feature_is_one_over_rows_less_one():
    """Of one feature, biased CKA is a squared correlation, whose mean over orders is 1 / (n - 1)."""
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((50, 1)), rng.standard_normal((50, 1))
    assert cka_floor(x, y) == pytest.approx(1 / 49, abs=1e-12)


# ---- all pairs of layers ---------------------------------------------------------------------------------


@given(
    rows=st.integers(4, 60),
    widths=st.lists(st.integers(1, 50), min_size=2, max_size=6),
    offset=st.sampled_from([0.0, 1e3]),
    held=st.sampled_from([0, 2**30]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_the_table_holds_the_values_of_all_pairs_by_gram_matrices_or_by_features(
    rows, widths, offset, held, seed
):
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((rows, 1))
    layers = [offset + common + rng.standard_normal((rows, width)) for width in widths]
    before, after = layers[: len(layers) // 2], layers[len(layers) // 2 :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cka, "MOST_GRAM_BYTES", held)  # 0: features always
        table = cka_table(before, [*after, before[0].copy()])
    for row, x in zip(table, before, strict=True):
        expected = [linear_cka(x, y) for y in [*after, before[0]]]
        assert row == pytest.approx(expected, abs=1e-8 if offset else 1e-9)
    assert table[0][-1] == 1.0


@pytest.mark.parametrize("features", [2, 31, 100, 384])
@pytest.mark.parametrize("rows", [20, 200, 750])
def test_the_table_of_a_model_with_itself_has_ones_on_its_diagonal(rows, features):
    rng = np.random.default_rng(rows + features)
    layers = [rng.standard_normal((rows, features)) for _ in range(5)]
    table = cka_table(layers, [layer.copy() for layer in layers])
    assert [table[i][i] for i in range(5)] == [1.0] * 5
    assert np.array(table) == pytest.approx(np.array(table).T, abs=1e-12)


def test_a_table_with_no_layers_on_a_side_is_empty():
    x = np.random.default_rng(0).standard_normal((9, 3))
    assert cka_table([], [x]) == []
    assert cka_table([x, x], []) == [[], []]


def test_a_table_of_layers_with_other_rows_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="same examples"):
        cka_table([rng.standard_normal((9, 3))], [rng.standard_normal((8, 3))])
    with pytest.raises(ValueError, match="at least 4"):
        cka_table([rng.standard_normal((3, 3))], [rng.standard_normal((3, 3))])
