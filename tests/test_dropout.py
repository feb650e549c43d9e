"""Masks of dropout: their share of ones, their independence, their reproducibility."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetrial import dropout
from finetrial.dropout import PIECE, bernoulli_


def drawn(shape, p, seed=0, dtype=torch.float32):
    return bernoulli_(torch.empty(shape, dtype=dtype), p, generator=torch.Generator().manual_seed(seed))


@given(p=st.floats(0.001, 0.999), seed=st.integers(0, 2**32))
def test_ones_and_zeros_in_the_share_asked_for(p, seed):
    count = 200_000
    mask = drawn(count, p, seed)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert float(mask.double().mean()) == pytest.approx(p, abs=5.5 * math.sqrt(p * (1 - p) / count))


@pytest.mark.parametrize("p", [1e-5, 1 - 1e-5])
def test_a_rare_outcome_has_its_own_share_and_not_that_of_the_nearest_16_bits(p):
    count = 1 << 24
    rare = float((drawn(count, p) == (p < 0.5)).double().mean())
    assert rare == pytest.approx(1e-5, abs=5 * math.sqrt(1e-5 / count))


def test_certain_outcomes_and_no_probability():
    assert drawn(1000, 0.0).sum() == 0
    assert drawn(1000, 1.0).sum() == 1000
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(RuntimeError, match=r"\[0, 1\]"):
            drawn(10, wrong)


def test_neighbours_and_the_lanes_of_one_word_are_independent():
    """Correlations at every lag up to two words, and of each lane with itself: within five standard errors."""
    mask = drawn(1 << 21, 0.1).double() - 0.1
    for lag in range(1, 9):
        found = float((mask[:-lag] * mask[lag:]).mean()) / 0.09
        assert abs(found) < 5 / math.sqrt(len(mask))
    lanes = mask.view(-1, 4).mean(0).tolist()
    assert lanes == pytest.approx([0.0] * 4, abs=5 * math.sqrt(0.09 / (len(mask) // 4)))


@pytest.mark.parametrize("size", [1, 3, 4, 5, PIECE - 1, PIECE, 2 * PIECE + 3])
def test_a_mask_is_a_function_of_the_seed_whatever_the_layout_or_the_threads(size):
    one, threads = drawn(size, 0.3, 5), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(one, drawn(size, 0.3, 5))
    finally:
        torch.set_num_threads(threads)
    apart = torch.empty(size, 2)[:, 0]
    assert torch.equal(one, bernoulli_(apart, 0.3, generator=torch.Generator().manual_seed(5)))
    assert size < 64 or not torch.equal(one, drawn(size, 0.3, 6))
    assert torch.equal(one, drawn(size, 0.3, 5, torch.bfloat16).float())


def test_all_of_pytorchs_dropout_uses_it_once_it_is_installed():
    dropout.install()
    dropout.install()
    torch.manual_seed(3)
    values = torch.ones(40_000, requires_grad=True)
    kept = torch.nn.functional.dropout(values, 0.1)
    torch.manual_seed(3)
    assert torch.equal(kept.detach(), bernoulli_(torch.empty(40_000), 0.9) / 0.9)
    kept.sum().backward()
    assert torch.equal(values.grad, kept.detach())
    torch.manual_seed(4)
    query = torch.randn(1, 2, 16, 8)
    torch.manual_seed(5)
    found = torch.nn.functional.scaled_dot_product_attention(query, query, query, dropout_p=0.5)
    torch.manual_seed(5)
    shares = torch.softmax(query @ query.transpose(-1, -2) / math.sqrt(8), -1)
    by_hand = (shares * bernoulli_(torch.empty_like(shares), 0.5) / 0.5) @ query
    assert torch.allclose(found, by_hand, atol=1e-6)
