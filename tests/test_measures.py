"""Forgetting and the spectrum over replicates: what is averaged, what is judged, what is left out."""

from __future__ import annotations

import pytest
import scipy.stats

from finetrial.analyse import summarise
from finetrial.report_measures import spectrum_matrices
from finetrial.study import Claim
from made_records import (
    FULL,
    LORA,
    META,
    arm_of,
    baseline,
    ended,
    replicate,
    spec,
    study,
    toy_tasks,  # noqa: F401 - a fixture
    trials,
)

FORGETS = Claim(
    text="lora forgets less than full", kind="forgets_less", method="lora", reference="full", margin=0.0
)
LORA_LOST = [1.0, 1.2, 0.9, 1.1, 0.8]
FULL_LOST = [2.1, 2.5, 1.8, 2.2, 1.7]


def forgetting_json(lost, *, readable=True, text=None, sha="t"):
    task = {
        "base": 70.0, "tuned": 70.0 - lost, "forgotten": lost, "chance": 50.0, "readable": readable, "rows": 60,
        "input_sha256": sha,
    }  # fmt: skip
    words = (
        {"base": 3.0, "tuned": 3.0 + text, "forgotten": text, "tokens": 90, "input_sha256": "w"}
        if text
        else None
    )
    return {"tasks": {"mrpc": task}, "tasks_forgotten": lost if readable else None, "text": words}


def spectrum_json(rank, intruders, *, changed=True):
    matrix = {
        "name": "layer.0.query.weight", "shape": [4, 4], "update_norm": 2.0, "relative_change": 0.02,
        "spectral_norm": 1.0, "effective_rank": rank, "stable_rank": rank / 2, "rank_for_energy": 2,
        "energy_in_base_top": 0.1, "top_overlap": 0.9, "likeness": [0.9, 0.4], "intruders": intruders,
        "rounding_floor": None,
    }  # fmt: skip
    overall = {
        "changed": int(changed), "unchanged": int(not changed), "update_norm": 2.0, "relative_change": 0.02,
        "effective_rank_mean": rank if changed else None, "stable_rank_mean": rank / 2 if changed else None,
        "rank_for_energy_mean": 2.0 if changed else None, "energy_in_base_top_mean": None,
        "top_overlap_mean": None, "intruders": intruders, "directions": 2, "thresholds": [0.3, 0.5],
        "intruder_curve": [[0, 0], [0, intruders]], "rounding_floor": None,
    }  # fmt: skip
    return {"matrices": [matrix] if changed else [], "embeddings": [], "overall": overall}


def probe(method, number, **measures):
    subject = spec("replicate", number, method).run_id
    return ended(spec("probe", number, method, subject=subject), measures=measures)


def summary_of(made, claims=(FORGETS,), base=None):
    """A summary of five replicates of both arms; `made(method, number)` gives what is measured of each."""
    found = [baseline(), ended(spec("probe", 0), measures=base or {})]
    for method, scores in (("lora", LORA), ("full", FULL)):
        found += trials(method)
        found += [replicate(method, n, score) for n, score in enumerate(scores)]
        found += [probe(method, n, **made(method, n)) for n in range(5)]
    return summarise(study(claims, measure=("forgetting", "spectrum")), found, META)


def lost(method, number, **more):
    return {"forgetting": forgetting_json({"lora": LORA_LOST, "full": FULL_LOST}[method][number], **more)}


def test_forgets_less_is_a_paired_one_sided_t_test_of_the_plain_difference():
    summary = summary_of(lost, base={"forgetting": forgetting_json(0.0)})
    (claim,) = summary.claims
    by_scipy = scipy.stats.ttest_rel(LORA_LOST, FULL_LOST, alternative="less")
    assert claim.verdict == "supported"
    assert claim.p_t == pytest.approx(by_scipy.pvalue, rel=1e-9)
    assert claim.p_sign_flip == 1 / 32
    assert (claim.unit, claim.margin) == ("points", 0.0)
    assert claim.difference == claim.contrast
    assert claim.difference.estimate == pytest.approx(-1.06)
    assert claim.reason.startswith(
        "lora forgets less than full: forgetting of lora - forgetting of full is -1.06"
    )
    assert all(run.startswith("probe.toy") for run in claim.run_ids)
    forgot = arm_of(summary, "lora").forgetting
    assert forgot.judged_by == "tasks"
    assert forgot.forgotten.estimate == pytest.approx(1.0)
    assert forgot.parts[0].base == 70.0
    assert forgot.parts[0].tuned.estimate == pytest.approx(69.0)
    assert summary.tasks[0].controls[0].forgotten == {"mrpc": 0.0}


def test_text_is_judged_where_it_is_measured_and_in_its_own_unit():
    summary = summary_of(
        lambda method, n: lost(method, n, text=0.1 * (n + 1) + (0.5 if method == "lora" else 0.0)),
        base={"forgetting": forgetting_json(0.0, text=None)},
    )
    (claim,) = summary.claims
    assert claim.verdict == "refuted"  # lora loses half a nat more in every pair, whatever the tasks say
    assert claim.unit == "nats"
    assert claim.difference.estimate == pytest.approx(0.5)
    assert arm_of(summary, "full").forgetting.judged_by == "text"
    assert [part.name for part in arm_of(summary, "full").forgetting.parts] == ["mrpc", "text"]


def test_what_the_base_cannot_read_is_shown_and_not_judged():
    summary = summary_of(
        lambda method, n: lost(method, n, readable=False), base={"forgetting": forgetting_json(0.0)}
    )
    (claim,) = summary.claims
    assert claim.verdict == "not_assessable"
    assert "nothing forgettable: the base reads no task above chance" in claim.reason
    forgot = arm_of(summary, "lora").forgetting
    assert (forgot.judged_by, forgot.forgotten, forgot.per_replicate) == (None, None, {})
    assert not forgot.parts[0].readable


def test_measured_on_other_inputs_than_the_control_does_not_count():
    summary = summary_of(lost, base={"forgetting": forgetting_json(0.0, sha="other")})
    assert summary.claims[0].verdict == "not_assessable"
    assert "probe on other inputs" in summary.claims[0].reason
    assert arm_of(summary, "lora").forgetting is None


def test_without_the_control_nothing_is_judged():
    summary = summary_of(lost)
    assert summary.claims[0].verdict == "not_assessable"
    assert "the base was not measured against itself" in summary.claims[0].reason


def test_the_spectrum_is_averaged_over_replicates_by_matrix_and_over_all():
    summary = summary_of(lambda method, n: {"spectrum": spectrum_json(3.0 + n, n)}, claims=())
    found = arm_of(summary, "lora").spectrum
    assert found.overall["effective_rank_mean"].estimate == 5.0
    assert found.overall["intruders"].estimate == 2.0
    assert "energy_in_base_top_mean" not in found.overall
    assert found.per_matrix["layer.0.query.weight"]["effective_rank"] == 5.0
    assert found.per_matrix["layer.0.query.weight"]["replicates"] == 5
    assert found.thresholds == (0.3, 0.5)
    assert found.intruder_curve == ((0.0, 0.0), (0.0, 2.0))
    assert (found.matrices, found.directions) == (1, 2)


def test_a_matrix_that_some_replicates_left_alone_says_how_many_its_means_are_of():
    summary = summary_of(lambda method, n: {"spectrum": spectrum_json(3.0, 0, changed=n > 1)}, claims=())
    assert arm_of(summary, "lora").spectrum.per_matrix["layer.0.query.weight"]["replicates"] == 3
    cells = spectrum_matrices(summary, summary.tasks[0]).rows[0]
    assert str(cells[1]).endswith("(3 of 5 seeds)")


def test_models_that_did_not_change_have_a_spectrum_without_ranks():
    summary = summary_of(lambda method, n: {"spectrum": spectrum_json(1.0, 0, changed=False)}, claims=())
    found = arm_of(summary, "full").spectrum
    assert (found.matrices, found.per_matrix) == (0, {})
    assert set(found.overall) == {"update_norm", "relative_change", "intruders"}


def test_a_study_without_these_measures_has_none_of_them():
    summary = summary_of(lambda method, n: {}, claims=())
    for arm in summary.arms:
        assert (arm.drift, arm.spectrum, arm.forgetting) == (None, None, None)
