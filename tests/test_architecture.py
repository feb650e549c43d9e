"""What is told of an architecture is what a forward pass shows, of encoders and decoders of many types."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetrial.architecture import is_causal
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
