"""The spectrum probe on tiny models: its matrices, how it reads adapters, and PEFT's own count."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from finetrial import spectrum
from finetrial.models import linear_names
from finetrial.plugins import ProbeInput, load, names
from finetrial.updates import matrix_updates

QUERY = "bert.encoder.layer.1.attention.self.query"


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36,
        max_position_embeddings=32,
    )  # fmt: skip
    return BertForQuestionAnswering(config)


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=36, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


MODELS = {"encoder": (bert, "qa_outputs", 6), "decoder": (llama, "score", 7)}  # its head; matrices in a block


def adapted(base: PreTrainedModel, rank: int = 2, spread: float = 0.05, **options) -> peft.PeftModel:
    """A LoRA on every linear layer of the blocks, with B as large as `spread`."""
    torch.manual_seed(1)
    head = next(head for _, head, _ in MODELS.values() if hasattr(base, head))
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=linear_names(base, (head,), attention_only=False),
        modules_to_save=[head], **options,
    )  # fmt: skip
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=spread) if spread else parameter.zero_()
    return model


def measure(base, tuned, **params):
    """What the probe finds; it is plain JSON, and neither model is another one afterwards."""
    before = [{key: value.clone() for key, value in m.state_dict().items()} for m in (base, tuned)]
    probe = load("probes", "spectrum")
    measured = probe.measure(ProbeInput(base, tuned, None, [], ""), probe.Params(**params))
    for model, state in zip((base, tuned), before, strict=True):
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    return measured


def weight(model, name):
    return model.get_submodule(name).weight.detach().double().numpy()


def test_it_is_found_by_name_and_asks_for_no_rows():
    assert "spectrum" in names("probes")
    params = load("probes", "spectrum").Params()
    assert params.top == 10
    assert not hasattr(params, "rows")


@pytest.mark.parametrize("kind", MODELS)
def test_the_control_has_no_update_at_all(kind):
    make, _, in_block = MODELS[kind]
    measured = measure(make(), make())
    overall = measured["overall"]
    assert measured["matrices"] == []
    assert (overall["changed"], overall["unchanged"]) == (0, 2 * in_block)
    assert overall["update_norm"] == overall["relative_change"] == overall["intruders"] == 0
    assert overall["effective_rank_mean"] is None
    assert not np.any(overall["intruder_curve"])
    assert all(embedding["update_norm"] == 0 for embedding in measured["embeddings"])


def test_a_change_of_one_matrix_made_by_hand_is_found_with_its_rank():
    base, tuned = bert(), bert()
    u, s, v = np.linalg.svd(weight(base, QUERY))
    change = 0.3 * np.outer(u[:, 0], v[3]) + 0.4 * np.outer(u[:, 20], v[5])  # within and outside of the top ten
    with torch.no_grad():
        tuned.get_submodule(QUERY).weight += torch.tensor(change, dtype=torch.float32)
    measured = measure(base, tuned)
    (matrix,) = measured["matrices"]
    assert matrix["name"] == f"{QUERY}.weight"
    assert matrix["shape"] == [24, 24]
    assert matrix["update_norm"] == pytest.approx(0.5, abs=1e-6)
    assert matrix["spectral_norm"] == pytest.approx(0.4, abs=1e-6)
    assert matrix["relative_change"] == pytest.approx(0.5 / np.linalg.norm(s), abs=1e-6)
    assert matrix["stable_rank"] == pytest.approx(0.25 / 0.16, abs=1e-5)
    assert matrix["effective_rank"] == pytest.approx(spectrum.effective_rank([0.3, 0.4]), abs=1e-3)
    assert matrix["rank_for_energy"] == 2
    assert matrix["energy_in_base_top"] == pytest.approx(0.36, abs=1e-5)
    assert measured["overall"]["unchanged"] == 11
    assert measured["overall"]["effective_rank_mean"] == matrix["effective_rank"]
    total = np.sqrt(sum(np.linalg.norm(update.before_MN) ** 2 for update in matrix_updates(base, tuned)))
    assert measured["overall"]["relative_change"] == pytest.approx(0.5 / total, abs=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_a_lora_that_has_learnt_nothing_has_changed_nothing(kind):
    make, _, in_block = MODELS[kind]
    measured = measure(make(), adapted(make(), spread=0.0))
    assert measured["matrices"] == []
    assert measured["overall"]["unchanged"] == 2 * in_block


@pytest.mark.parametrize("kind", MODELS)
def test_a_loras_update_is_pefts_own_and_has_its_rank(kind):
    make, head, in_block = MODELS[kind]
    base, tuned = make(), adapted(make(), use_rslora=True)
    updates = {update.name: update for update in matrix_updates(base, tuned)}
    layers = linear_names(base, (head,), attention_only=False)
    assert list(updates) == [f"{layer}.weight" for layer in layers]
    for layer in layers:
        delta = tuned.get_base_model().get_submodule(layer).get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(updates[f"{layer}.weight"].update_MN, delta, rtol=1e-4, atol=1e-8)
    measured = measure(base, tuned)
    assert len(measured["matrices"]) == 2 * in_block
    for matrix in measured["matrices"]:
        assert matrix["effective_rank"] <= 2 + 1e-9
        assert matrix["rank_for_energy"] <= 2
        update_MN = updates[matrix["name"]].update_MN
        assert matrix["update_norm"] == pytest.approx(np.linalg.norm(update_MN))
        assert matrix["spectral_norm"] == pytest.approx(np.linalg.norm(update_MN, 2))
        assert matrix["rounding_floor"] is None


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("spread", [0.1, 0.5])
def test_intruders_are_those_that_peft_finds(kind, spread):
    make = MODELS[kind][0]
    base, tuned = make(), adapted(make(), rank=3, spread=spread)
    measured = measure(base, tuned)
    said: list[str] = []
    reduce_intruder_dimension(tuned, logging_sink=said.append)
    line = re.compile(r"base_model\.model\.(\S+): (?:No intruders|Intruders: (\d+))")
    found = dict(match.groups() for text in said if (match := line.fullmatch(text)))
    assert {m["name"]: m["intruders"] for m in measured["matrices"]} == {
        f"{layer}.weight": int(count or 0) for layer, count in found.items()
    }
    assert measured["overall"]["intruders"] > 0
    assert measured["overall"]["intruder_curve"][4][9] == measured["overall"]["intruders"]
    assert measured["overall"]["directions"] == sum(len(m["likeness"]) for m in measured["matrices"])


VARIANTS = [
    "lora",
    "dora",
    "weights trained as well",
    "merged in place",
    "two adapters",
    "the second alone",
    "ia3",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_adapter_measures_as_the_model_it_merges_into(variant):
    base = bert()
    tuned = adapted(base, use_dora=variant == "dora")
    if variant in ("two adapters", "the second alone"):
        tuned.add_adapter("second", peft.LoraConfig(r=3, target_modules=["query"], init_lora_weights=False))
        tuned.base_model.set_adapter(["default", "second"] if variant == "two adapters" else "second")
    if variant == "weights trained as well":
        with torch.no_grad():
            tuned.get_base_model().get_submodule(QUERY).base_layer.weight[3] += 0.1
    if variant == "ia3":
        config = peft.IA3Config(
            target_modules=["query", "value"], feedforward_modules=[], init_ia3_weights=False
        )
        tuned = peft.get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "ia3_l" in name:
                    parameter.uniform_(0.5, 1.5)
    through_weights = measure(base, copy.deepcopy(tuned).merge_and_unload())
    if variant == "merged in place":
        tuned.merge_adapter()
    through_adapter = measure(base, tuned)
    assert len(through_adapter["matrices"]) == {"ia3": 4, "the second alone": 2}.get(variant, 12)
    for own, dense in zip(through_adapter["matrices"], through_weights["matrices"], strict=True):
        assert own["name"] == dense["name"]
        for key in ("update_norm", "spectral_norm", "stable_rank", "energy_in_base_top", "top_overlap"):
            assert own[key] == pytest.approx(dense[key], rel=1e-3), key
        assert own["likeness"] == pytest.approx(dense["likeness"], abs=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_every_method_has_the_same_matrices_and_neither_head_nor_embeddings(kind):
    make, head, in_block = MODELS[kind]
    base, full, lora = make(), make(), adapted(make())
    with torch.no_grad():
        for parameter in full.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    of_full, of_lora = measure(base, full), measure(base, lora)
    matrices = [matrix["name"] for matrix in of_full["matrices"]]
    assert matrices == [matrix["name"] for matrix in of_lora["matrices"]]
    assert matrices == [f"{layer}.weight" for layer in linear_names(base, (head,), attention_only=False)]
    assert len(matrices) == 2 * in_block
    embeddings = {embedding["name"]: embedding for embedding in of_full["embeddings"]}
    assert len(embeddings) == {"encoder": 3, "decoder": 1}[kind]
    for name, embedding in embeddings.items():
        change = (full.get_parameter(name) - base.get_parameter(name)).detach().double().norm()
        assert embedding["update_norm"] == pytest.approx(float(change))
    assert [e["name"] for e in of_lora["embeddings"]] == list(embeddings)
    assert all(e["update_norm"] == 0 for e in of_lora["embeddings"])


def test_a_model_whose_head_alone_was_trained_has_changed_nothing():
    base, tuned = bert(), bert()
    with torch.no_grad():
        tuned.qa_outputs.weight += 1
    overall = measure(base, tuned)["overall"]
    assert (overall["changed"], overall["relative_change"], overall["intruders"]) == (0, 0.0, 0)


def test_weights_kept_in_bf16_come_with_the_noise_of_rounding_them():
    base = bert()
    rounded = copy.deepcopy(base).bfloat16().float()  # as a model saved in bf16 is loaded
    measured = measure(base, rounded)
    assert len(measured["matrices"]) == 12
    for matrix in measured["matrices"]:
        assert matrix["rounding_floor"] == pytest.approx(matrix["update_norm"])
        assert matrix["effective_rank"] > 15  # what training did not do
    assert measured["overall"]["rounding_floor"] == pytest.approx(measured["overall"]["update_norm"])
    half = copy.deepcopy(base).bfloat16()
    assert measure(base, half)["overall"] == measured["overall"]


def test_top_says_how_many_directions_are_looked_at():
    base, tuned = bert(), adapted(bert())
    measured = measure(base, tuned, top=3)
    assert all(len(matrix["likeness"]) == 3 for matrix in measured["matrices"])
    assert [len(counts) for counts in measured["overall"]["intruder_curve"]] == [3] * 9
    ten = measure(base, tuned)
    assert ten["matrices"][0]["likeness"][:3] == pytest.approx(measured["matrices"][0]["likeness"], abs=1e-6)
    assert all(len(m["likeness"]) == 24 for m in measure(base, tuned, top=100)["matrices"])


def test_weights_that_are_not_finite_are_refused():
    broken = bert()
    with torch.no_grad():
        broken.get_submodule(QUERY).weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=rf"{QUERY}\.weight has values that are not finite"):
        measure(bert(), broken)
