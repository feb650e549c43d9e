"""Batches: every input once per epoch, order a function of (seed, epoch), little padding and on the right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetrial.batching import (
    EVALUATION_TOKENS,
    collate,
    epoch_batches,
    evaluation_batches,
    heaviest,
    model_inputs,
)
from finetrial.plugins import Feature
from fragile import QA

LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=300)


def padding(lengths: list[int], batches: list[list[int]]) -> int:
    return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches) - sum(lengths)


@given(LENGTHS, st.integers(1, 40), st.integers(0, 2**62), st.integers(0, 5))
def test_every_input_is_in_one_batch_and_only_the_last_batch_may_be_short(lengths, batch_size, seed, epoch):
    batches = epoch_batches(lengths, batch_size, seed=seed, epoch=epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size
    assert epoch_batches(lengths, batch_size, seed=seed, epoch=epoch) == batches


@pytest.mark.parametrize("lengths", [[7] * 96, list(range(96))], ids=["equal lengths", "all different"])
def test_no_two_epochs_and_no_two_seeds_have_the_same_batches(lengths):
    """Not only in another order: which rows share a batch changes."""
    kinds = [
        {frozenset(batch) for batch in epoch_batches(lengths, 4, seed=seed, epoch=epoch)}
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len(kinds[0]) == 24
    assert len(kinds[0] & kinds[1]) < 6
    assert len(kinds[0] & kinds[2]) < 6


def test_rows_of_one_length_are_mixed():
    batches = epoch_batches([7] * 96, 8, seed=0, epoch=0)
    assert sum(batch == sorted(batch) for batch in batches) < 3


def test_batches_are_not_in_order_of_length():
    lengths = np.random.default_rng(0).integers(10, 400, size=4000).tolist()
    means = [np.mean([lengths[i] for i in b]) for b in epoch_batches(lengths, 16, seed=0, epoch=0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_grouping_leaves_a_small_part_of_the_padding_of_random_batches():
    random = np.random.default_rng(0)
    lengths = random.integers(10, 400, size=4000).tolist()
    grouped = padding(lengths, epoch_batches(lengths, 16, seed=0, epoch=0))
    order = random.permutation(4000).tolist()
    assert grouped < 0.1 * padding(lengths, [order[i : i + 16] for i in range(0, 4000, 16)])


@given(LENGTHS, st.integers(1, 2000))
def test_evaluation_batches_hold_every_input_and_are_bounded(lengths, budget):
    batches = evaluation_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= budget for b in batches)


def test_the_usual_evaluation_budget_is_used():
    assert [len(batch) for batch in evaluation_batches([EVALUATION_TOKENS // 4] * 6)] == [4, 2]


def test_collate_pads_on_the_right_to_the_longest_and_marks_it():
    features = [
        Feature([5, 6, 7], 0, {"labels": 1}, [0, 0, 1], (1, 2)),
        Feature([8], 1, {"labels": 0}, [0], (0, 1)),
    ]
    batch = collate(features, 99)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 99, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert batch["pool_mask"].tolist() == [[0, 1, 0], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert set(model_inputs(batch)) == {"input_ids", "attention_mask", "token_type_ids"}
    assert "token_type_ids" not in collate([Feature([1], 0, {})], 0)


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
def test_padding_changes_no_loss(model, request, tmp_path):
    from finetrial.assemble import open_workbench
    from tiny_runs import folder_of, make_spec

    spec = make_spec(request.getfixturevalue(model))
    bench = open_workbench(spec, folder_of(spec, tmp_path).home)
    built = bench.build_base()
    built.model.eval()
    features = sorted(bench.encode(bench.splits.train, built), key=lambda feature: len(feature.input_ids))
    short, long = features[0], features[-1]
    assert len(long.input_ids) > len(short.input_ids) + 5

    def loss(*chosen: Feature) -> float:
        batch = collate(chosen, built.tokenizer.pad_token_id)
        with torch.no_grad():
            return float(QA.head.losses(built.model(**model_inputs(batch)), batch).sum())

    assert loss(short, long) == pytest.approx(loss(short) + loss(long), rel=1e-6)


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=8))
def test_no_batch_has_more_tokens_or_attention_than_the_heaviest(batches):
    def of(batch):
        squares = sum(length * length for length in batch)
        return len(batch) * max(batch), len(batch) * max(batch) ** 2, sum(batch), squares

    made = [[Feature([0] * length, row=0, labels={}) for length in b] for b in batches]
    found = [of([len(feature.input_ids) for feature in batch]) for batch in heaviest(made)]
    assert len(found) <= 4
    for which in range(4):
        assert max(each[which] for each in found) == max(of(batch)[which] for batch in batches)
