"""The loss on general text: the base's own head on another model's body."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from finetrial.language import token_loss, windows
from finetrial.models import build, language_model
from finetrial.records import ModelSource
from finetrial.sources import Location

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Where there is a will there is a way, they say."] * 20


@pytest.fixture(scope="module")
def parts(tiny_llama):
    source, location = ModelSource(name=str(tiny_llama)), Location(str(tiny_llama), None, True)

    def make(kind="question_answering"):
        return build(source, location, kind, {}, head_seed=0)

    inputs = windows(TEXTS, make().tokenizer, length=32, tokens=320)
    return language_model(source, location), make, inputs


def test_windows_begin_anew_and_go_on_where_the_last_one_ended(parts):
    _, make, inputs = parts
    tokenizer = make().tokenizer
    whole = [i for text in TEXTS for i in tokenizer(text + "\n", add_special_tokens=False)["input_ids"]]
    assert len(inputs) == 320 // 31
    assert all(len(window) == 32 and window[0] == tokenizer.cls_token_id for window in inputs)
    assert [i for window in inputs for i in window[1:]] == whole[: 31 * len(inputs)]
    with pytest.raises(ValueError, match="do not fill a window of 500"):
        windows(TEXTS[:1], tokenizer, length=500, tokens=1000)


@pytest.mark.parametrize("kind", ["question_answering", "sequence_classification"])
def test_an_untrained_body_gives_the_language_models_own_loss(parts, kind):
    own, make, inputs = parts
    ids = torch.tensor(inputs)
    with torch.no_grad():
        expected = float(own.eval()(input_ids=ids, labels=ids).loss)  # transformers shifts the labels itself
    found = token_loss(own, make(kind).model.eval(), inputs)
    assert found.tokens == ids[:, 1:].numel()
    assert found.mean == pytest.approx(expected, rel=1e-6)


def test_adapters_and_changed_weights_count_and_nothing_is_left_changed(parts):
    own, make, inputs = parts
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    base = token_loss(own, make().model.eval(), inputs).mean
    adapted = get_peft_model(make().model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).eval()
    assert token_loss(own, adapted, inputs).mean == base  # B is zero
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    assert token_loss(own, adapted, inputs).mean != base
    changed = make().model.eval()
    with torch.no_grad():
        changed.transformer.norm.weight.zero_()  # every token is then as likely as any other
    assert token_loss(own, changed, inputs).mean == pytest.approx(torch.tensor(30522.0).log().item(), rel=1e-5)
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_loss_that_is_no_number_is_said(parts):
    own, make, inputs = parts
    broken = make().model.eval()
    with torch.no_grad():
        broken.transformer.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not a finite number"):
        token_loss(own, broken, inputs)
