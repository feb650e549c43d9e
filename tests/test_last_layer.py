"""A last layer that is done for the first token alone: loss and gradients are those of the whole layer."""

from __future__ import annotations

import pytest
import torch
import transformers

from finetrial.last_layer import narrow

pytestmark = pytest.mark.usefixtures("as_in_a_run")

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 32, "num_labels": 3, "attn_implementation": "sdpa",
}  # fmt: skip
KINDS = ["bert", "roberta", "xlm-roberta", "electra"]


def model_of(kind: str, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SIZES | changes))
    return transformers.AutoModelForSequenceClassification.from_config(config)


def batch(padded: bool):
    ids = torch.randint(5, 40, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
        mask[3, 2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1, 1])}


def gradients(model, given):
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_whole_layer(kind, padded):
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    whole, part = (model_of(kind, **none).train() for _ in range(2))
    assert narrow(part)
    (loss, wanted), (again, found) = (gradients(model, batch(padded)) for model in (whole, part))
    assert again == pytest.approx(loss, rel=1e-6)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_less_in_training_and_all_in_evaluation(kind):
    model, seen = model_of(kind), []
    assert narrow(model)
    last = getattr(model, model.base_model_prefix).encoder.layer[-1]
    last.register_forward_hook(lambda module, given, out: seen.append(tuple(out.shape)))
    for mode in (True, False):
        model.train(mode)(**batch(padded=True))
    assert seen == [(4, 1, 16), (4, 9, 16)]


def test_dropout_keeps_the_mean_of_the_loss():
    """Each draw differs; over many, both means lie within four standard errors of each other."""
    losses = []
    for narrowed in (False, True):
        model = model_of("bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
        assert not narrowed or narrow(model)
        with torch.no_grad():
            losses.append(torch.stack([model(**batch(padded=True)).loss for _ in range(400)]))
    error = sum(float(loss.var()) / len(loss) for loss in losses) ** 0.5
    assert abs(float(losses[0].mean() - losses[1].mean())) < 4 * error


def test_other_models_are_left_alone():
    assert not narrow(model_of("bert", is_decoder=True))
    assert not narrow(model_of("bert", chunk_size_feed_forward=4))
    config = transformers.AutoConfig.for_model("bert", **SIZES)
    assert not narrow(transformers.AutoModelForQuestionAnswering.from_config(config))
    small = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32}
    config = transformers.AutoConfig.for_model("distilbert", **small)
    assert not narrow(transformers.AutoModelForSequenceClassification.from_config(config))
