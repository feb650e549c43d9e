"""Attention of rows of different lengths: every row's is that of the row alone, whatever is done together."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetrial import ragged
from finetrial.dropout import bernoulli_
from finetrial.ragged import Lengths, of_rows

HEADS, FEATURES = 2, 3
lengths_of = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def tokens(count, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(count, HEADS, FEATURES, generator=made)


def inputs(lengths, *, one_query, seed=0):
    counts = (len(lengths) if one_query else sum(lengths), sum(lengths), sum(lengths))
    query, key, value = (tokens(count, seed + i).requires_grad_() for i, count in enumerate(counts))
    return query, key, value


def attended(query, key, value, kept):
    """One row's: [length, heads, features] in float64, its probabilities multiplied by `kept`."""
    query, key, value = (each.transpose(0, 1).double() for each in (query, key, value))
    return ((query @ key.mT * 0.7).softmax(-1) * kept @ value).transpose(0, 1)


def expected(tensors, lengths, masks):
    """Row by row, as written in a textbook."""
    query, key, value = tensors
    ends = list(itertools.accumulate(lengths))
    found = []
    for row, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        own = slice(end - length, end)
        mine = slice(row, row + 1) if len(query) < len(key) else own
        found.append(attended(query[mine], key[own], value[own], masks[row]))
    return torch.cat(found)


def assert_alike(tensors, ours, theirs):
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    own = torch.autograd.grad((ours * weights).sum(), tensors)
    other = torch.autograd.grad((theirs * weights).sum(), tensors)
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=[1, 300, 1 << 20])
def piece(request, monkeypatch):
    monkeypatch.setattr(ragged, "PIECE_BYTES", request.param)


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("one_query", [False, True])
@settings(max_examples=40, deadline=None)
@given(lengths_of, st.integers(0, 99))
def test_every_rows_values_and_gradients_are_those_of_the_row_alone(one_query, lengths, seed):
    tensors = inputs(lengths, one_query=one_query, seed=seed)
    ours = of_rows(*tensors, Lengths(lengths), 0.0, 0.7)
    assert_alike(tensors, ours, expected(tensors, lengths, [1.0] * len(lengths)))


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("one_query", [False, True])
@settings(max_examples=40, deadline=None)
@given(lengths_of, st.integers(0, 99), st.floats(0.05, 0.9))
def test_what_is_dropped_is_drawn_piece_by_piece_in_order(one_query, lengths, seed, p):
    tensors = inputs(lengths, one_query=one_query, seed=seed)
    torch.manual_seed(seed)
    ours = of_rows(*tensors, Lengths(lengths), p, 0.7)
    torch.manual_seed(seed)
    masks, rows = [], iter(lengths)
    for each in Lengths(lengths).pieces(HEADS, one_query=len(tensors[0]) < len(tensors[1])):
        shape = (each.queries.rows, HEADS, each.queries.length, each.keys.length)
        for drawn in bernoulli_(torch.empty(shape), 1 - p):
            length = next(rows)
            masks.append(drawn[:, :length, :length].double() / (1 - p))
    assert next(rows, None) is None
    assert_alike(tensors, ours, expected(tensors, lengths, masks))


@given(lengths_of, st.integers(0, 5), st.integers(0, 5), st.integers(0, 99))
def test_a_part_of_the_rows_is_what_these_rows_are_alone(lengths, start, count, seed):
    """As a stack does it: each training's rows by themselves, with the draws that they have alone."""
    first = min(start, len(lengths) - 1)
    part, before = slice(first, first + 1 + count), sum(lengths[:first])
    whole = Lengths(lengths)
    query, key, value = inputs(lengths, one_query=False, seed=seed)
    cut = slice(before, before + sum(lengths[part]))
    torch.manual_seed(seed)
    alone = of_rows(query[cut], key[cut], value[cut], Lengths(lengths[part]), 0.5, 0.7)
    whole.pieces(HEADS, one_query=False)
    torch.manual_seed(seed)
    assert torch.equal(of_rows(query[cut], key[cut], value[cut], whole.part(part), 0.5, 0.7), alone)


def test_rows_are_together_as_far_as_their_scores_fit():
    """Of four bytes each: two rows of 8 by 8 in two heads are 1,024 bytes, and three would be too many."""
    before, ragged.PIECE_BYTES = ragged.PIECE_BYTES, 1024
    try:
        pieces = Lengths([8, 8, 8, 5, 5, 5, 30]).pieces(2, one_query=False)
    finally:
        ragged.PIECE_BYTES = before
    assert [(each.queries.rows, each.queries.length) for each in pieces] == [(2, 8), (2, 8), (2, 5), (1, 30)]
    assert [each.mask is None for each in pieces] == [True, False, True, True]
