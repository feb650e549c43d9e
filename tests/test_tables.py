"""A table of which few rows are read, trained by those rows alone, becomes what AdamW makes of all of it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetrial.assemble import open_workbench
from finetrial.plugins import Feature
from finetrial.tables import UsedRows, trained_parameters, used_rows
from tiny_runs import folder_of, make_spec


def model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Embedding(50, 6, padding_idx=0), torch.nn.Linear(6, 3))


def steps(trained, optimizer, net, batches, rates, after=lambda: None):
    losses = []
    for batch, rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        for part in batch.chunk(2):  # two micro-batches
            loss = net(part).pow(2).sum()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.7)
        optimizer.step()
        losses.append(float(loss.detach()))
        after()
    return losses


@settings(deadline=None)
@given(
    rows=st.sets(st.integers(0, 49), min_size=2, max_size=12), decay=st.sampled_from([0.0, 0.01, 0.5]),
    seed=st.integers(0, 1000), settle_at=st.integers(1, 12),
)  # fmt: skip
def test_losses_and_the_whole_table_are_those_of_adamw_on_all_of_it(rows, decay, seed, settle_at):
    generator = torch.Generator().manual_seed(seed)
    some = torch.tensor(sorted(rows | {0}))
    batches = [some[torch.randint(0, len(some), (4, 5), generator=generator)] for _ in range(12)]
    rates = [0.01 * (step + 1) for step in range(12)]
    whole = model(seed)
    optimizer = torch.optim.AdamW(whole.parameters(), weight_decay=decay, fused=True)
    wanted = steps(list(whole.parameters()), optimizer, whole, batches, rates)

    few = model(seed)
    used = UsedRows(few[0], some)
    trained = trained_parameters(few, used)
    assert used.parameter in set(trained)
    assert few[0].weight not in set(trained)
    ours, done = torch.optim.AdamW(trained, weight_decay=decay, fused=True), []

    def after():
        used.put_back(ours)
        done.append(used.owed)
        if len(done) == settle_at:
            used.settle()
            assert used.owed == 1.0
            assert torch.allclose(few[0].weight[some], used.parameter)

    found = steps(trained, ours, few, batches, rates, after)
    used.settle()
    assert found == pytest.approx(wanted, rel=1e-5)
    for one, other in zip(few.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)  # roundings of values near 1


def test_what_was_read_back_goes_on_as_if_nothing_had_been(tmp_path):
    some = torch.tensor([0, 3, 7])
    batches = [some[torch.randint(0, 3, (4, 5))] for _ in range(6)]
    found = []
    for cut in (None, 3):
        net = model()
        used = UsedRows(net[0], some)
        trained = trained_parameters(net, used)
        optimizer = torch.optim.AdamW(trained, weight_decay=0.5, fused=True)
        for index, batch in enumerate(batches):
            if index == cut:
                state, owed, weights = optimizer.state_dict(), used.owed, net.state_dict()
                net = model(1)
                net.load_state_dict(weights)
                used = UsedRows(net[0], some)
                used.read_again(owed)
                trained = trained_parameters(net, used)
                optimizer = torch.optim.AdamW(trained, weight_decay=0.5, fused=True)
                optimizer.load_state_dict(state)
            steps(trained, optimizer, net, [batch], [0.02], lambda u=used, o=optimizer: u.put_back(o))
        used.settle()
        found.append(net.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(*map(dict.values, found), strict=True))


def test_a_token_that_no_training_input_has_is_not_trained_unseen():
    net = model()
    used = UsedRows(net[0], torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="none of its training inputs"):
        net(torch.tensor([[1, 2]])).sum().backward()
    assert used.parameter.grad is None


@pytest.mark.parametrize(
    ("method", "params", "share"),
    [("full", {}, 0.1), ("lora", {}, None), ("full", {}, None), ("full", {"weights": "bf16_stochastic"}, None)],
)
def test_rows_are_told_apart_only_where_that_gains_something(tiny_bert, tmp_path, method, params, share):
    spec = make_spec(tiny_bert, method, method_params=params)
    tuned, built = open_workbench(spec, folder_of(spec, tmp_path).home).build_tuned()
    size = tuned.get_input_embeddings().num_embeddings
    count = int(size * (share or 0.9))
    features = [Feature(input_ids=list(range(count)), row=0, labels={})]
    if method == "full" and params:
        features = [Feature(input_ids=[1, 2], row=0, labels={})]
    used = used_rows(tuned, features, built.tokenizer.pad_token_id, spec)
    assert (used is not None) == (share is not None)


def test_a_table_that_is_another_modules_weight_stays_whole(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    spec = make_spec(tiny_llama, "full")
    tied = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tied.lm_head.weight = tied.get_input_embeddings().weight
    assert used_rows(tied, [Feature(input_ids=[1], row=0, labels={})], 0, spec) is None


def test_a_table_that_is_used_in_other_ways_too_is_given_all_of_its_gradient():
    rows, ids = torch.tensor([0, 1, 4]), torch.tensor([[1, 4]])
    found = []
    for few in (False, True):
        net = model()
        used = UsedRows(net[0], rows) if few else None
        (net(ids).sum() + 3 * net[0].weight[1].sum()).backward()
        found.append(used.parameter.grad if used else net[0].weight.grad[rows])
    assert torch.allclose(*found)


def test_a_table_goes_when_nothing_else_holds_it():
    net = model()
    used = UsedRows(net[0], torch.tensor([0, 1]))
    gone = weakref.ref(net[0].weight)
    del net, used
    gc.collect()
    assert gone() is None
