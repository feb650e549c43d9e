"""Pooling and layer-wise drift on tiny models built in memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    FunnelConfig,
    FunnelModel,
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
)

from finetrial.cka import linear_cka
from finetrial.errors import DataError
from finetrial.represent import (
    Pooled,
    compare,
    layer_drift,
    masked_mean,
    pool,
    pooled_layers,
)
from finetrial.similarity import mean_cosine, relative_change

VOCABULARY, PAD, ROWS = 60, 0, 24
LAYERS = 3  # embeddings and two blocks


def bert(cls=BertForSequenceClassification, seed=0):
    torch.manual_seed(seed)
    return cls(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=64, pad_token_id=PAD,
        )
    )  # fmt: skip


def llama(cls=LlamaForSequenceClassification, seed=0):
    torch.manual_seed(seed)
    return cls(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, intermediate_size=48, max_position_embeddings=64, pad_token_id=PAD,
        )
    )  # fmt: skip


MODELS = {
    "bert": (bert, ["query", "value"]),
    "bert-qa": (lambda seed=0: bert(BertForQuestionAnswering, seed), ["query", "value"]),
    "llama": (llama, ["q_proj", "v_proj"]),
    "llama-qa": (lambda seed=0: llama(LlamaForQuestionAnswering, seed), ["q_proj", "v_proj"]),
}


@pytest.fixture(params=sorted(MODELS))
def family(request):
    return MODELS[request.param]


def batches(size=8, extra_padding=0, seed=5):
    """Rows of 6 to 14 tokens; the first and last token are special, so not pooled."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 15, ROWS)
    rows = [rng.integers(3, VOCABULARY, length) for length in lengths]
    made = []
    for start in range(0, ROWS, size):
        chunk = rows[start : start + size]
        width = max(map(len, chunk)) + extra_padding
        batch = {
            name: torch.zeros(len(chunk), width, dtype=torch.long)
            for name in ("input_ids", "attention_mask", "pool_mask")
        }
        for index, row in enumerate(chunk):
            batch["input_ids"][index, : len(row)] = torch.tensor(row)
            batch["attention_mask"][index, : len(row)] = 1
            batch["pool_mask"][index, 1 : len(row) - 1] = 1
        made.append({**batch, "labels": torch.zeros(len(chunk)), "row": list(range(len(chunk)))})
    return made


def with_lora(model, targets):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=targets))


def assert_no_drift(layers):
    assert len(layers) == LAYERS
    for layer in layers:
        assert 1 - layer["cka_debiased"] == 0.0
        assert 1 - layer["cka_biased"] == 0.0
        assert 1 - layer["cosine_mean_subtracted"] == 0.0
        assert 1 - layer["cosine_raw"] == 0.0
        assert layer["relative_change"] == 0.0
        assert 1 - layer["cka_standardised"] == 0.0
        assert (1 - layer["rsa"], layer["angle"], 1 - layer["neighbours"]) == (0.0, 0.0, 0.0)
        assert 0 < layer["cka_floor"] < 1
        assert 0 < layer["top_1"] < layer["top_3"] < 1


def test_a_lora_whose_b_is_zero_drifts_by_exactly_nothing(family):
    make, targets = family
    base = make()
    assert_no_drift(layer_drift(base, with_lora(copy.deepcopy(base), targets), batches()))


def test_the_base_against_itself_drifts_by_exactly_nothing(family):
    base = family[0]()
    assert_no_drift(layer_drift(base, base, batches()))


def test_a_lora_that_moved_changes_the_blocks_and_not_the_embeddings(family):
    make, targets = family
    base = make()
    tuned = with_lora(copy.deepcopy(base), targets)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layers = layer_drift(base, tuned, batches())
    assert [layer["layer"] for layer in layers] == [0, 1, 2]
    assert layers[0]["cka_debiased"] == 1.0
    assert layers[0]["relative_change"] == 0.0
    for layer in layers[1:]:
        assert layer["cka_debiased"] < 1 - 1e-6
        assert layer["cosine_mean_subtracted"] < 1 - 1e-6
        assert layer["relative_change"] > 1e-3


def test_the_streamed_measures_equal_the_two_pass_ones(family):
    base, other = family[0](), family[0](seed=7)
    given = batches()
    layers = layer_drift(base, other, given)
    for index, layer in enumerate(layers):
        x, y = (
            np.concatenate([pooled_layers(model, batch)[index] for batch in given]).astype(np.float64)
            for model in (base, other)
        )
        assert layer["cka_debiased"] == pytest.approx(linear_cka(x, y), abs=1e-8)
        assert layer["cka_biased"] == pytest.approx(linear_cka(x, y, debiased=False), abs=1e-8)
        assert layer["cosine_mean_subtracted"] == pytest.approx(mean_cosine(x, y), abs=1e-12)
        assert layer["relative_change"] == pytest.approx(relative_change(x, y), abs=1e-12)
        assert layer["cka_debiased"] < 0.9


def test_pooled_vectors_do_not_change_when_padding_is_added(family):
    model = family[0]()
    for tight, padded in zip(batches(), batches(extra_padding=9), strict=True):
        for before, after in zip(pooled_layers(model, tight), pooled_layers(model, padded), strict=True):
            np.testing.assert_allclose(after, before, rtol=0, atol=1e-6)


def test_pooled_vectors_do_not_depend_on_the_batch_that_a_row_is_in(family):
    model = family[0]()
    by_eight, alone = (
        np.concatenate([pooled_layers(model, batch)[-1] for batch in batches(size)]) for size in (8, 1)
    )
    np.testing.assert_allclose(by_eight, alone, rtol=0, atol=1e-6)


def test_the_masked_mean_is_over_content_tokens_alone():
    hidden = torch.tensor([[[100.0], [1.0], [3.0], [100.0]], [[5.0], [7.0], [100.0], [100.0]]])
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]])
    assert masked_mean(hidden, mask).tolist() == [[2.0], [6.0]]


def test_a_model_that_shortens_its_sequences_is_refused_with_what_to_do():
    torch.manual_seed(0)
    sizes = {
        "d_model": 16,
        "n_head": 2,
        "d_head": 8,
        "d_inner": 32,
        "block_sizes": [1, 1],
        "num_decoder_layers": 1,
    }
    model = FunnelModel(FunnelConfig(vocab_size=VOCABULARY, pad_token_id=PAD, **sizes)).eval()
    with pytest.raises(DataError, match="leave out of `measure`"):
        pool(model, batches())


def test_special_tokens_are_left_out_of_the_embedding_layer():
    model = llama()
    batch = batches(ROWS)[0]
    table = model.get_input_embeddings().weight.detach()
    expected = [
        table[ids[mask.bool()]].mean(dim=0)
        for ids, mask in zip(batch["input_ids"], batch["pool_mask"], strict=True)
    ]
    np.testing.assert_allclose(pooled_layers(model, batch)[0], torch.stack(expected), atol=1e-6)


def test_the_last_layer_of_a_llama_is_taken_after_its_final_norm():
    model = llama()
    batch = batches(ROWS)[0]
    model.eval()
    with torch.no_grad():
        body = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    expected = masked_mean(body.last_hidden_state, batch["pool_mask"])
    np.testing.assert_allclose(pooled_layers(model, batch)[-1], expected, atol=1e-6)


def test_dropout_is_off_even_for_a_model_left_in_training_mode():
    model = bert()
    model.train()
    assert_no_drift(layer_drift(model, model, batches()))


def test_a_row_without_content_is_left_out_of_both_sides():
    model = bert()
    given = batches()
    given[0]["pool_mask"][2] = 0
    compared = compare(pool(model, given), pool(model, given))
    assert compared.rows == ROWS - 1
    assert_no_drift(compared.layers)


def test_too_few_rows_different_depths_and_infinite_states_are_refused():
    model = bert()
    with pytest.raises(DataError, match="of which there are 3, and 4 are needed; give more of them"):
        layer_drift(model, model, batches(3)[:1])
    deeper = BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
                   intermediate_size=48, max_position_embeddings=64)
    )  # fmt: skip
    with pytest.raises(ValueError, match="different depth"):
        layer_drift(model, deeper, batches())
    broken = bert()
    with torch.no_grad():
        broken.bert.encoder.layer[0].output.dense.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="layer 1 has hidden states that are not finite"):
        layer_drift(model, broken, batches())


def test_the_error_over_rows_is_that_of_the_mean_over_blocks_by_subsamples_without_replacement():
    """By `linear_cka` of the rows themselves, drawn by the same generator."""
    rng = np.random.default_rng(3)
    before = [rng.standard_normal((40, 8)) + 5 for _ in range(3)]
    after = [x + 0.5 * rng.standard_normal(x.shape) for x in before]
    sides = [Pooled([x.astype(np.float32) for x in layers], None) for layers in (before, after)]
    draws, found = np.random.default_rng(0), []
    for _ in range(50):
        rows = np.sort(draws.choice(40, 30, replace=False))
        blocks = zip(sides[0].mean[1:], sides[1].mean[1:], strict=True)
        found.append(1 - np.mean([linear_cka(x[rows], y[rows]) for x, y in blocks]))
    assert compare(*sides).rows_error == pytest.approx(np.std(found, ddof=1) * np.sqrt(30 / 10))
    assert compare(sides[0], sides[0]).rows_error == 0
    assert compare(*sides, whole=False).rows_error is None


def test_a_block_that_does_not_vary_has_no_error_over_rows():
    flat = Pooled([np.ones((8, 3), np.float32)] * 2, None)
    assert compare(flat, flat).rows_error is None
