"""The line from a base to a tuned model: its models, its points, and what a study makes of them."""

from __future__ import annotations

import copy

import pytest
import torch

from finetrial.analyse import summarise
from finetrial.errors import ModelError
from finetrial.plugins import ProbeInput, load
from finetrial.report_effects import at_equal_score
from finetrial.updates import interpolated, matrix_updates
from made_records import META, claim_of, drift_json, ended, records, replaced, spec, study, toy_tasks  # noqa: F401
from test_spectrum_probe import MODELS, adapted
from tiny_runs import make_spec, run

INTERPOLATION = load("probes", "interpolation")
KINDS = pytest.mark.parametrize("kind", MODELS)


def trained(base, head):
    """As full fine-tuning leaves it: everything has moved, the head too."""
    torch.manual_seed(2)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def updates_of(base, model):
    return {update.name: update.update_MN for update in matrix_updates(base, model)}


@KINDS
@pytest.mark.parametrize("way", [trained, lambda base, head: adapted(base)], ids=["full", "lora"])
def test_a_share_of_the_update_is_that_of_every_matrix_and_the_head_stays(kind, way):
    make, head, _ = MODELS[kind]
    base = make()
    tuned = way(base, head)
    before = {name: p.clone() for name, p in tuned.named_parameters()}
    whole = updates_of(base, tuned)
    seen = []
    for share, model in interpolated(base, tuned, (head,), [0.25, 0.0, 0.5]):
        seen.append(share)
        for name, update in updates_of(base, model).items():
            assert abs(update - share * whole[name]).max() < 1e-6
        own = tuned.get_submodule(head) if way is trained else tuned.get_base_model().get_submodule(head)
        own = getattr(own, "modules_to_save", {"default": own})["default"]
        for mine, theirs in zip(own.parameters(), model.get_submodule(head).parameters(), strict=True):
            assert torch.equal(mine, theirs)
        if share == 0:
            body = [n for n, _ in base.named_parameters() if not n.startswith(head)]
            assert all(torch.equal(base.get_parameter(n), model.get_parameter(n)) for n in body)
    assert seen == [0.5, 0.25, 0.0]
    assert all(torch.equal(before[name], p) for name, p in tuned.named_parameters())


def test_a_model_with_other_parameters_is_refused():
    make, head, _ = MODELS["encoder"]
    base, tuned = make(), torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"has no bert\.embeddings"):
        list(interpolated(base, tuned, (head,), [0.5]))


@pytest.mark.parametrize("shares", [[0.0], [1.0], [0.5, 2.0]])
def test_shares_at_the_ends_are_refused(shares):
    with pytest.raises(ValueError, match="between 0 and 1"):
        INTERPOLATION.Params(shares=shares)


def test_the_ends_are_scored_and_the_other_measures_are_taken_between_them():
    make, head, _ = MODELS["encoder"]
    base = make()
    asked = []

    def drift(model):
        asked.append(model)
        return {"cka_drift_mean": 0.125}

    given = ProbeInput(
        base, trained(base, head), None, [], "x", head_names=(head,), others={"drift": drift},
        score=lambda model: {"f1": model.get_parameter(f"{head}.bias").sum().item()},
    )  # fmt: skip
    found = INTERPOLATION.measure(given, INTERPOLATION.Params(shares=[0.5]))
    assert [point["share"] for point in found["points"]] == [0.0, 0.5, 1.0]
    assert [point["drift"] for point in found["points"]] == [None, 0.125, None]
    assert [point["forgetting"] for point in found["points"]] == [None] * 3
    assert len({point["scores"]["f1"] for point in found["points"]}) == 1  # the head is the same
    assert len(asked) == 1
    unmoved = ProbeInput(base, make(), None, [], "x")
    assert INTERPOLATION.measure(unmoved, INTERPOLATION.Params())["points"] == []


def test_a_trained_run_is_measured_on_its_line(tiny_bert, tmp_path):
    measures = {
        "drift": {"use": "drift", "params": {"rows": 8, "perturbation": False}},
        "interpolation": {"use": "interpolation", "params": {"shares": [0.5], "rows": 8}},
    }
    subject = make_spec(tiny_bert, "full", stage="replicate")
    result = run(subject, tmp_path)
    probe = subject.model_copy(update={"stage": "probe", "subject": result.run_id, "measures": measures})
    points = run(probe, tmp_path).measures["interpolation"]["points"]
    whole = run(probe, tmp_path).measures["drift"]["cka_drift_mean"]
    assert [point["share"] for point in points] == [0.0, 0.5, 1.0]
    assert 0 < points[1]["drift"] < whole
    assert all("f1" in point["scores"] for point in points)


def lined(method, number, end, half):
    """A probe of a method: half-way it scores 70 and has drifted `half`; it ends at drift `end`."""
    scores = {"full": (0.5, 0.7, 0.9), "lora": (0.5, 0.6, 0.7)}[method]
    points = [
        {"share": share, "scores": {"f1": score}, "drift": half if share == 0.5 else None, "forgetting": None}
        for share, score in zip((0.0, 0.5, 1.0), scores, strict=True)
    ]
    subject = spec("replicate", number, method).run_id
    return ended(
        spec("probe", number, method, subject=subject),
        measures={"drift": drift_json(end, 0.01), "interpolation": {"points": points, "input_sha256": "y"}},
    )


def test_a_study_says_how_far_each_method_drifted_where_both_score_the_same():
    """LoRA ends at 0.7 with drift 0.1; full fine-tuning has 0.7 half-way, with 0.15 and not 0.4."""
    probes = [lined("lora", n, 0.1, 0.04) for n in range(5)] + [lined("full", n, 0.4, 0.15) for n in range(5)]
    summary = summarise(study(), replaced(records(), *probes), META)
    found = claim_of(summary, "drifts_less").at_equal_score
    assert found.method.estimate == pytest.approx(0.1)
    assert found.reference.estimate == pytest.approx(0.15)
    assert found.difference.estimate == pytest.approx(-0.05)
    assert found.shares == pytest.approx((1.0, 0.5))
    assert found.score == pytest.approx(0.7)
    assert len(found.run_ids) == 10
    assert claim_of(summary, "within").at_equal_score is None
    [row] = at_equal_score(summary).rows
    assert row[3:6] == ("1.00 / 0.50", "0.1 (0.1 to 0.1)", "0.15 (0.15 to 0.15)")


def test_without_the_measure_nothing_is_said():
    summary = summarise(study(), records(), META)
    assert claim_of(summary, "drifts_less").at_equal_score is None
    assert at_equal_score(summary).rows == ()


def test_the_control_has_no_line(tiny_bert, tmp_path):
    control = make_spec(tiny_bert, None, stage="probe", settings={}).model_copy(
        update={"measures": {"interpolation": {"use": "interpolation", "params": {"rows": 8}}}}
    )
    assert run(control, tmp_path).measures["interpolation"]["points"] == []


def test_what_the_base_does_not_have_and_could_not_go_back_is_refused():
    make, head, _ = MODELS["encoder"]
    base, tuned = make(), make()
    tuned.bert.encoder.layer[0].added = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"the base has no bert\.encoder\.layer\.0\.added"):
        list(interpolated(base, tuned, (head,), [0.5]))


def test_a_line_of_biases_alone_is_a_line():
    make, head, _ = MODELS["encoder"]
    base, tuned = make(), make()
    with torch.no_grad():
        tuned.bert.embeddings.LayerNorm.bias.add_(1.0)
    assert [share for share, _ in interpolated(base, tuned, (head,), [0.5, 0.0])] == [0.5, 0.0]
    assert list(interpolated(base, make(), (head,), [0.5])) == []
