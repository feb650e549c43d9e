"""Layers without padding, a last one for the first token alone: losses and gradients are of whole rows."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from finetrial.trimmed import Packed, trim

pytestmark = pytest.mark.usefixtures("as_in_a_run")

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 32, "num_labels": 3, "attn_implementation": "sdpa",
}  # fmt: skip
KINDS = ["bert", "roberta", "xlm-roberta", "electra"]


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def model_of(kind: str, make=transformers.AutoModelForSequenceClassification, **changes):
    torch.manual_seed(0)
    return make.from_config(transformers.AutoConfig.for_model(kind, **(SIZES | changes)))


def answering(kind: str, **changes):
    return model_of(
        kind, transformers.AutoModelForQuestionAnswering, **(NO_DROPOUT | {"num_labels": 2} | changes)
    )


def batch(padded: bool):
    ids = torch.randint(5, 40, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
        mask[3, 2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1, 1])}


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(found, wanted):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def of_answers(model, inputs):
    """Logits at what is no padding, and the gradients of a sum of them in which each has its own part."""
    model.zero_grad()
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    real = inputs["attention_mask"] == 1
    logits = torch.stack([outputs.start_logits[real], outputs.end_logits[real]])
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return {"": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def products(call):
    """Floating-point operations of the products by weights, forwards."""
    with FlopCounterMode(display=False) as counter:
        call()
    found = counter.get_flop_counts()["Global"]
    return found[torch.ops.aten.addmm]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_without_padding_logits_and_gradients_are_those_of_whole_rows(kind, checkpointing):
    whole, part = (answering(kind).train() for _ in range(2))
    assert trim(part)
    if checkpointing:
        part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_alike(of_answers(part, batch(padded=True)), of_answers(whole, batch(padded=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_of_as_many_tokens_as_there_are(kind):
    model, inputs = answering(kind).train(), batch(padded=True)
    assert trim(model)
    own = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    layers = sum(p.numel() for p in getattr(model, model.base_model_prefix).encoder.parameters() if p.ndim == 2)
    tokens, places = int(own["attention_mask"].sum()), own["input_ids"].numel()
    around = 2 * 16 * 2 * places + (2 * 16 * 128 * places if kind == "electra" else 0)  # head, embeddings
    assert products(lambda: model(**own)) == 2 * layers * tokens + around
    assert products(lambda: model.eval()(**own)) == 2 * layers * places + around


@pytest.mark.parametrize("case", ["a hook", "a module of one's own", "left padding"])
def test_rows_stay_whole_where_tokens_could_be_something_else(case):
    class Own(torch.nn.Linear):
        def forward(self, input):
            assert input.ndim == 3
            return super().forward(input)

    model, inputs = answering("bert").train(), batch(padded=True)
    assert trim(model)
    dense = model.bert.encoder.layer[1].intermediate.dense
    if case == "a hook":
        dense.register_forward_hook(lambda *_: None)
    elif case == "a module of one's own":
        dense.__class__ = Own
    else:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    own = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    layers = sum(p.numel() for p in model.bert.encoder.parameters() if p.ndim == 2)
    assert products(lambda: model(**own)) == (2 * layers + 2 * 16 * 2) * own["input_ids"].numel()


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 99))
def test_tokens_laid_out_in_rows_again_are_where_they_were(lengths, seed):
    torch.manual_seed(seed)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rows = torch.randn(*real.shape, 3, requires_grad=True)
    packed = Packed(real)
    tokens = packed.pack(rows)
    assert torch.equal(tokens, rows[real])
    again = packed.unpack(tokens)
    assert torch.equal(again[real], rows[real])
    assert torch.equal(tokens[packed.firsts], rows[:, 0])
    weights = torch.randn_like(rows)
    (again * weights).sum().backward()
    assert torch.equal(rows.grad, torch.where(real[..., None], weights, 0))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_whole_layer(kind, padded):
    whole, part = (model_of(kind, **NO_DROPOUT).train() for _ in range(2))
    assert trim(part)
    (loss, wanted), (again, found) = (gradients(model, batch(padded)) for model in (whole, part))
    assert again == pytest.approx(loss, rel=1e-6)
    assert_alike(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_less_in_training_and_all_in_evaluation(kind):
    model, seen = model_of(kind), []
    assert trim(model)
    last = getattr(model, model.base_model_prefix).encoder.layer[-1]
    last.register_forward_hook(lambda module, inputs, out: seen.append(tuple(out.shape)))
    for mode in (True, False):
        model.train(mode)(**batch(padded=True))
    assert seen == [(4, 1, 16), (4, 9, 16)]


def test_dropout_keeps_the_mean_of_the_loss():
    """Each draw differs; over many, both means lie within four standard errors of each other."""
    losses = []
    for narrowed in (False, True):
        model = model_of("bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
        assert not narrowed or trim(model)
        with torch.no_grad():
            losses.append(torch.stack([model(**batch(padded=True)).loss for _ in range(400)]))
    error = sum(float(loss.var()) / len(loss) for loss in losses) ** 0.5
    assert abs(float(losses[0].mean() - losses[1].mean())) < 4 * error


def test_other_models_are_left_alone():
    assert not trim(model_of("bert", is_decoder=True))
    assert not trim(model_of("bert", chunk_size_feed_forward=4))
    small = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32}
    config = transformers.AutoConfig.for_model("distilbert", **small)
    assert not trim(transformers.AutoModelForSequenceClassification.from_config(config))
