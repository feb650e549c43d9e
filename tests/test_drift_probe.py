"""The drift probe: what it measures, as plain JSON, and that it keeps the probe protocol."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from finetrial.plugins import ProbeInput, load, names
from finetrial.updates import perturbed


def model(seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=24, max_position_embeddings=32)
    )  # fmt: skip


@pytest.fixture
def batches():
    rng = np.random.default_rng(0)
    ids = torch.tensor(rng.integers(3, 40, (20, 9)))
    mask = torch.ones_like(ids)
    pool = mask.clone()
    pool[:, 0] = 0
    return [
        {
            "input_ids": ids[i : i + 5],
            "attention_mask": mask[i : i + 5],
            "pool_mask": pool[i : i + 5],
        }
        for i in range(0, 20, 5)
    ]


def measure(given):
    probe = load("probes", "drift")
    measured = probe.measure(given, probe.Params())
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    return measured


def test_it_is_found_by_name_and_refuses_unknown_parameters():
    assert "drift" in names("probes")
    probe = load("probes", "drift")
    assert probe.Params().rows == 512
    with pytest.raises(ValueError, match="rowz"):
        probe.Params(rowz=3)


def test_the_control_is_exactly_zero_in_every_layer(batches):
    base = model()
    measured = measure(ProbeInput(base, base, None, batches, "abc"))
    assert [layer["layer"] for layer in measured["layers"]] == [0, 1, 2]
    assert [layer["cka"] for layer in measured["layers"]] == [1.0, 1.0, 1.0]
    assert measured["cka_drift_mean"] == 0.0
    assert measured["cosine_drift_mean"] == 0.0
    assert measured["rows"] == 20
    assert measured["input_sha256"] == "abc"
    assert measured["neighbour"] is None


def test_every_measure_of_the_control_is_exactly_zero_where_a_head_reads_too(batches):
    base = model()
    measured = measure(ProbeInput(base, base, None, batches, "abc"))
    assert set(measured["means"].values()) == {0.0}
    assert measured["read"]["cka_drift_mean"] == 0.0
    assert measured["perturbed"] is None  # there is no update to put noise in the place of


@pytest.mark.parametrize(("causal", "position"), [(False, 0), (True, -1)])
def test_a_head_reads_an_encoders_first_token_and_a_decoders_last(batches, causal, position):
    """Tokens that differ at that position alone: there everything varies, at the others nothing does."""
    given = []
    for batch in batches:
        ids = torch.full_like(batch["input_ids"], 7)
        ids[:, position] = batch["input_ids"][:, position]
        given.append({**batch, "input_ids": ids})
    measured = measure(ProbeInput(model(), model(1), None, given, "abc", causal=causal))
    assert measured["read"]["layers"][0]["cka"] is not None
    other = measure(ProbeInput(model(), model(1), None, given, "abc", causal=not causal))
    assert other["read"]["layers"][0]["cka"] is None


def test_noise_of_the_updates_norm_takes_their_place_matrix_by_matrix(batches):
    base, tuned = model(), model()
    generator = torch.Generator().manual_seed(0)
    changed = "bert.encoder.layer.1.intermediate.dense.weight"
    with torch.no_grad():
        parameter = tuned.get_parameter(changed)
        parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with perturbed(base, tuned, np.random.default_rng(0)) as matrices:
        assert matrices == 1
        for name, tensor in base.state_dict().items():
            assert torch.equal(tensor, before[name]) == (name != changed), name
        size = float((tuned.get_parameter(changed) - before[changed]).detach().norm())
        assert float((base.get_parameter(changed) - before[changed]).detach().norm()) == pytest.approx(
            size, rel=1e-5
        )
    measured = measure(ProbeInput(base, tuned, None, batches, "abc"))
    assert [layer["cka"] for layer in measured["perturbed"]["layers"]][:2] == [1.0, 1.0]
    assert measured["perturbed"]["cka_drift_mean"] > 1e-4
    assert measured["perturbed"]["cka_drift_mean"] != measured["cka_drift_mean"]
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_asked_for_its_means_alone_it_gives_the_same_ones_and_leaves_the_rest_out(batches):
    given = ProbeInput(model(), model(1), None, batches, "abc")
    whole, brief = measure(given), measure(replace(given, brief=True))
    for mean in ("cka_drift_mean", "cosine_drift_mean"):
        assert brief[mean] == whole[mean]
    assert whole["perturbed"]
    assert brief["perturbed"] is brief["rows_error"] is None
    assert "rsa" in whole["layers"][1]
    assert "rsa" not in brief["layers"][1]


def test_the_perturbation_can_be_left_out(batches):
    probe = load("probes", "drift")
    given = ProbeInput(model(), model(1), None, batches, "abc")
    assert probe.measure(given, probe.Params(perturbation=False))["perturbed"] is None


def test_the_means_are_over_the_blocks_and_leave_the_embeddings_out(batches):
    measured = measure(ProbeInput(model(), model(1), None, batches, "abc"))
    blocks = measured["layers"][1:]
    for key in ("cka", "cosine"):
        expected = np.mean([1 - layer[key] for layer in blocks])
        assert measured[f"{key}_drift_mean"] == pytest.approx(expected, abs=1e-12)
    assert measured["cka_drift_mean"] > 0.05
    for key, value in measured["means"].items():
        each = [layer[key] if key in ("angle", "relative_change") else 1 - layer[key] for layer in blocks]
        assert value == pytest.approx(np.mean(each), abs=1e-12), key
    assert set(measured["means"]) == {"cka_standardised", "rsa", "neighbours", "angle", "relative_change"}
    assert all(layer["cka_floor"] > 0 for layer in blocks)  # a biased CKA is never without it


def test_the_neighbour_is_compared_with_the_tuned_model_and_not_with_the_base(batches):
    base, tuned = model(), model(1)
    same = measure(ProbeInput(base, tuned, model(1), batches, "abc"))
    assert same["neighbour"]["cka_drift_mean"] == 0.0
    assert same["cka_drift_mean"] > 0.05
    apart = measure(ProbeInput(base, tuned, model(2), batches, "abc"))
    alone = measure(ProbeInput(tuned, model(2), None, batches, "abc"))
    for layer, whole in zip(apart["neighbour"]["layers"], alone["layers"], strict=True):
        assert layer == {key: whole[key] for key in ("layer", "cka", "cosine")}


def test_a_layer_that_does_not_vary_is_absent_and_so_is_the_mean(batches):
    collapsed = model()
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(collapsed.bert.encoder.layer[1].output.LayerNorm, name).zero_()
    measured = measure(ProbeInput(model(), collapsed, None, batches, "abc"))
    assert measured["layers"][2]["cka"] is None
    assert measured["layers"][1]["cka"] == 1.0
    assert measured["cka_drift_mean"] is None


def test_reading_its_parameters_does_not_import_torch():
    code = (
        "import sys; from finetrial.plugins import load; load('probes', 'drift').Params(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
