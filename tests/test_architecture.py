"""What is told of an architecture is what a forward pass shows, of encoders and decoders of many types."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetrial.architecture import check_inputs, is_causal, most_positions
from finetrial.errors import ModelError
from finetrial.models import Built, build
from finetrial.records import ModelSource
from finetrial.sources import Location
from tiny_models import write_model

ENCODERS = (
    "bert", "roberta", "deberta", "deberta-v2", "big_bird", "convbert", "rembert", "roformer", "nystromformer",
    "fnet", "funnel", "flaubert", "squeezebert", "xlnet", "layoutlm", "modernbert",
)  # fmt: skip
DECODERS = ("gpt2", "gpt_neox", "bloom", "opt", "openai-gpt", "llama")


def built(folder: Path, kind: str = "question_answering") -> Built:
    options = {"num_labels": 3} if kind == "sequence_classification" else {}
    return build(ModelSource(name=str(folder)), Location(str(folder), None, True), kind, options, head_seed=0)


@pytest.mark.parametrize("model_type", ENCODERS + DECODERS)
def test_an_encoder_is_what_sees_a_later_token_at_an_earlier_place(model_type, tiny_bert, tmp_path):
    """Taken for a decoder, its pairs would be glued and its "no answer" put where nobody looks."""
    kind = "sequence_classification" if model_type in ("openai-gpt", "layoutlm") else "question_answering"
    found = built(write_model(tmp_path, model_type, tiny_bert), kind)
    ids = torch.arange(1000, 1012)[None]
    other = ids.clone()
    other[0, -1] = 2000  # the last token alone
    with torch.no_grad():
        body = found.model.eval().base_model
        states = [body(input_ids=each, attention_mask=torch.ones_like(each))[0][0, :4] for each in (ids, other)]
    seen = not torch.allclose(*states, atol=1e-7)
    assert seen == (model_type in ENCODERS)
    assert found.causal == (not seen)


def test_a_bert_that_is_to_be_a_decoder_is_one(tiny_bert, tmp_path):
    found = built(write_model(tmp_path, "bert", tiny_bert, is_decoder=True))
    assert found.causal
    assert is_causal(found.model)


@pytest.mark.parametrize(
    ("model_type", "most"),
    [
        ("bert", 64), ("roberta", 63), ("mpnet", 62), ("deberta", 64), ("roformer", 64), ("nystromformer", 64),
        ("flaubert", 64), ("gpt2", 64), ("openai-gpt", 64), ("opt", 64), ("funnel", None), ("bloom", None),
        ("llama", None), ("modernbert", None),
    ],
)  # fmt: skip
def test_an_input_may_be_as_long_as_the_model_takes_and_no_longer(model_type, most, tiny_bert, tmp_path):
    """What is foretold from its tables of positions is where the forward pass fails, in models of all kinds."""
    kind = "sequence_classification" if model_type == "openai-gpt" else "question_answering"
    model = built(write_model(tmp_path, model_type, tiny_bert), kind).model.eval()
    assert most_positions(model) == most
    fitting, longer = (torch.full((1, length), 1000) for length in (most or 80, (most or 80) + 1))
    with torch.no_grad():
        model.base_model(input_ids=fitting)
        if most is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model.base_model(input_ids=longer)
    check_inputs(model, fitting.tolist(), "max_length")
    if most is not None:
        with pytest.raises(
            ModelError, match=rf"has {most + 1} tokens.* ends at {most}; set max_length to {most}"
        ):
            check_inputs(model, longer.tolist(), "max_length")


def test_a_token_beyond_the_embeddings_is_refused(tiny_bert, tmp_path):
    model = built(write_model(tmp_path, "bert", tiny_bert, vocab_size=2000)).model
    check_inputs(model, [[101, 1999], []], "max_length")
    with pytest.raises(ModelError, match="gives token 2000, and the model's embeddings have 2000 rows"):
        check_inputs(model, [[101, 2000]], "max_length")
