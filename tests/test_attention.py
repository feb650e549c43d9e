"""Attention with dropout by pieces: the library's own values, gradients and masks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from finetrial import attention, dropout, ragged
from finetrial.memory import LiveBytes

MODULE = SimpleNamespace(is_causal=False)


def inputs(rows=3, heads=2, length=9, keys=9, features=4, dtype=torch.float32, seed=0):
    made = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads, n, features) for n in (length, keys, keys)]
    return [torch.randn(s, generator=made).to(dtype).requires_grad_() for s in shapes]


def found(call, tensors, mask, p=0.3, seed=7, **options):
    """Output and gradients of it, weighted so that every element has its own part."""
    torch.manual_seed(seed)
    output, _ = call(MODULE, *tensors, mask, dropout=p, **options)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype)
    return [output, *torch.autograd.grad((output * weights).sum(), tensors)]


def assert_alike(ours, theirs, most):
    for own, other in zip(ours, theirs, strict=True):
        assert own.shape == other.shape
        assert own.dtype == other.dtype
        torch.testing.assert_close(own, other, rtol=most, atol=most)


@settings(max_examples=40)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.floats(0.01, 0.9),
    st.sampled_from([None, "keys", "square", "added"]), st.integers(0, 99), st.integers(1, 40_000),
)  # fmt: skip
def test_values_and_gradients_are_the_librarys_whatever_the_pieces(
    rows, heads, length, keys, p, kind, seed, piece
):
    tensors = inputs(rows, heads, length, keys, seed=seed)
    made = torch.Generator().manual_seed(seed)
    mask = None
    if kind is not None:
        mask = torch.rand(rows, 1, 1 if kind == "keys" else length, keys, generator=made) < 0.7
        mask[..., 0] = True  # a query without any key: see below
        if kind == "keys":
            mask = mask.expand(rows, 1, length, keys)  # as transformers makes it
        if kind == "added":
            mask = torch.where(mask, torch.randn(mask.shape, generator=made), -1e30)
    dropout.install()  # pieces break off between words of its random bits
    before = ragged.PIECE_BYTES
    try:
        ragged.PIECE_BYTES = piece
        ours = found(attention.attention, tensors, mask, p, seed)
    finally:
        ragged.PIECE_BYTES = before
    assert_alike(ours, found(sdpa_attention_forward, tensors, mask, p, seed), 2e-5)


def test_in_bf16_too_to_its_precision():
    tensors = inputs(length=40, keys=40, dtype=torch.bfloat16)
    assert_alike(
        found(attention.attention, tensors, None), found(sdpa_attention_forward, tensors, None), 1 / 64
    )


def test_autocast_changes_nothing_within():
    tensors = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        ours = found(attention.attention, tensors, None)
    assert_alike(ours, found(attention.attention, tensors, None), 0)


def test_gradients_are_those_of_finite_differences():
    def call(query, key, value):
        torch.manual_seed(1)
        return attention.dropped(query, key, value, None, 0.4, 0.5)

    tensors = inputs(1, 1, 3, 4, 2)
    assert torch.autograd.gradcheck(call, tensors, eps=1e-2, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("added", [False, True])
def test_a_query_without_keys_has_finite_values_and_gradients(added):
    mask = torch.ones(3, 1, 9, 9, dtype=torch.bool)
    mask[1, :, 4] = False
    if added:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    assert all(bool(torch.isfinite(each).all()) for each in found(attention.attention, inputs(), mask))


def test_what_is_counted_of_it_is_what_all_its_pieces_take():
    """Only the first two pieces are counted (`fit.py`); memory does not depend on how many follow."""

    def peak() -> int:
        with FakeTensorMode(), LiveBytes() as live:
            tensors = [torch.empty(16, 2, 40, 8, requires_grad=True) for _ in range(3)]
            query, key, value = tensors
            attention.attention(MODULE, query, key, value, None, dropout=0.1)[0].sum().backward()
        return live.peak

    before, ragged.PIECE_BYTES = ragged.PIECE_BYTES, 4 * 2 * 40 * 40
    try:
        short = peak()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ragged, "detect_fake_mode", lambda _: None)
            assert short == peak()
    finally:
        ragged.PIECE_BYTES = before


def test_a_second_derivative_is_refused_and_not_wrong():
    query, key, value = inputs()
    output = attention.dropped(query, key, value, None, 0.3, 0.5)
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "case",
    [
        "no dropout", "all dropped", "causal without a mask", "no word on being causal", "fewer heads of keys",
        "a bias of positions", "a mask that learns", "a mask of two dimensions",
    ],
)  # fmt: skip
def test_what_it_is_not_made_for_is_the_librarys(case):
    tensors = inputs(heads=2)
    options: dict[str, Any] = {}
    p = {"no dropout": 0.0, "all dropped": 1.0}.get(case, 0.3)
    module = SimpleNamespace(is_causal=case == "causal without a mask")
    mask = None
    if case == "no word on being causal":
        del module.is_causal
    if case == "a mask that learns":
        mask = torch.zeros(3, 1, 9, 9, requires_grad=True)
    if case == "a mask of two dimensions":
        mask = torch.ones(9, 9, dtype=torch.bool)
    if case == "fewer heads of keys":
        tensors[1:] = inputs(heads=1)[1:]
        module.num_key_value_groups = 2
    if case == "a bias of positions":
        options["position_bias"] = torch.randn(1, 2, 9, 9)
    outputs = []
    for call in (attention.attention, sdpa_attention_forward):
        torch.manual_seed(0)
        given = {"dropout": p} | options
        query, key, value = tensors
        outputs.append(call(module, query, key, value, mask, **given)[0])
    assert torch.equal(*outputs)


def test_one_tensor_of_all_pairs_is_kept_for_the_backward_pass():
    kept: list[int] = []
    query, key, value = inputs(2, 3, 20, 30, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        attention.attention(MODULE, query, key, value, None, dropout=0.1)
    assert sorted(kept)[-1] == 2 * 3 * 20 * 30
    assert sum(size >= 2 * 3 * 20 * 30 for size in kept) == 1


def test_models_use_it_once_it_is_installed():
    before = AttentionInterface()["sdpa"]
    try:
        attention.install()
        attention.install()
        assert AttentionInterface()["sdpa"] is attention.attention
    finally:
        AttentionInterface.register("sdpa", before)


def test_the_masks_are_those_of_our_dropout_where_that_is_installed():
    dropout.install()
    torch.manual_seed(3)
    mask = torch.empty(6, 9, 9).bernoulli_(0.7)
    torch.manual_seed(3)
    query, key, _ = inputs()
    value = torch.eye(9).expand(3, 2, 9, 9)  # the output is the dropped probabilities themselves
    output = attention.dropped(query, key, value, None, 0.3, 1.0).transpose(1, 2)
    assert torch.equal(output == 0, mask.view(3, 2, 9, 9) == 0)
