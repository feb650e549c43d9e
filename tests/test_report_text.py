"""Numbers and the opening paragraph, as a reader sees them: known values, and nobody misled."""

from __future__ import annotations

import pytest

from finetrial import report_checks
from finetrial import report_text as text
from finetrial.summary_measures import Interval
from summary_example import example_summary


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.fixed(-0.04, 1), "0.0"),  # no minus sign on a rounded zero
        (text.fixed(-1.25, 1, signed=True), "−1.2"),
        (text.fixed(1234.5, 1), "1,234.5"),
        (text.significant(1.9e-5), "1.9e-5"),
        (text.significant(0.0001), "1e-4"),
        (text.significant(0.05), "0.05"),
        (text.significant(300.0), "300"),
        (text.setting(True), "true"),
        (text.setting("cosine"), "cosine"),
        (text.size(999), "999 B"),
        (text.size(1_240_000_000), "1.24 GB"),
        (text.size(None), "– (not measured)"),
        (text.count(9_999), "9,999"),
        (text.count(22_565_378), "22.6 M"),
        (text.count(6.5e14), "650 T"),
        (text.duration(95.1), "95.1 s"),
        (text.duration(119.0), "119 s"),
        (text.duration(7512.0), "2.09 h"),
        (text.times(0.4), "0.4×"),
        (text.times(1 / 240), "1/240"),
        (text.times(12.3), "12×"),
        (text.p_value(0.0), "< 0.001"),
        (text.p_value(0.03125), "0.031"),
        (text.percent(-0.38), "−38\u00a0%"),
        (text.percent(0.005), "0.5\u00a0%"),
        (text.interval(Interval(estimate=57.94, low=57.1, high=58.66, sd=0.6, n=5), 1), "57.9 (57.1 to 58.7)"),
        (
            text.interval(Interval(estimate=57.94, low=None, high=None, sd=None, n=1), 1),
            "57.9 (no interval, n = 1)",
        ),
        (text.interval(None, 1), "– (no valid run)"),
        (text.decimals_for([0.84, 0.5]), 3),  # shares of one
        (text.decimals_for([84.2, 0.5]), 1),  # points of a hundred
        (text.decimals_for([0.0, 0.9], 100.0), 1),  # points, though all are small
        (text.decimals_for([0.3, 0.5], 0.0), 3),  # a loss
        (text.decimals_for([26.2, 30.1], 1.0), 1),  # a perplexity
        (text.decimals_for([0.8, 0.9], 1e9), 3),  # no bound, or as good as none
        (text.places_of(Interval(estimate=2.5e-6, low=None, high=None, sd=None, n=1), 3), 7),
        (text.places_of(Interval(estimate=0.0012, low=None, high=None, sd=None, n=1), 3), 4),
        (text.places_of(None, 3), 3),
        (text.places_of(Interval(estimate=0.0, low=None, high=None, sd=None, n=1), 3), 3),
        (text.places_of(Interval(estimate=0.38, low=None, high=None, sd=None, n=1), 3), 3),
    ],
)
def test_numbers_are_written_for_people(shown: object, expected: object) -> None:
    assert shown == expected


# ---- the opening paragraph --------------------------------------------------------------------------


def test_the_paragraph_tells_every_verdict_n_failures_and_doubt() -> None:
    summary = example_summary()
    four = tuple(claim for claim in summary.claims if claim.kind != "forgets_less")
    said = text.paragraph(summary.model_copy(update={"claims": four})).replace("\u00a0", " ")
    assert said.startswith("Of 4 claims, 1 supported, 1 refuted, 1 inconclusive and 1 not assessable.")
    assert "On squad_v2, lora drifts at least 20 % less than full (−44 %, 4 of 5 paired seeds)." in said
    assert (
        "it stays open whether lora is at most 3 % worse than full (−2.5 points, 4 of 5 paired seeds)" in said
    )
    assert "about 9 seeds would settle it with 80 % power" in said
    assert "could not be judged: full beats the no_answer baseline by 2.2 points" in said
    assert "it is refuted that lora drifts at least 20 % less" in said
    assert "2 of 20 replicates gave no valid score" in said
    assert "3 of 36 search trials failed (2 diverged and 1 out of memory)" in said
    assert "2 fairness notes" in said


def test_a_study_without_failures_says_so_and_one_without_claims_gives_no_verdict() -> None:
    summary = example_summary()
    arms = tuple(
        arm.model_copy(update={"failed": 0, "search": arm.search.model_copy(update={"trials": ()})})
        for arm in summary.arms
    )
    said = text.paragraph(summary.model_copy(update={"arms": arms, "claims": (), "fairness_notes": ()}))
    assert "declares no claims" in said
    assert "All 20 replicates" in said
    assert "averaged" not in said


def test_a_failed_baseline_or_probe_is_a_run_that_failed() -> None:
    summary = example_summary()
    arms = tuple(
        arm.model_copy(update={"failed": 0, "search": arm.search.model_copy(update={"trials": ()})})
        for arm in summary.arms
    )
    row = summary.failures[0].model_copy(update={"run_id": "probe.squad_v2.lora.001-1234abcd"})
    for complete in (True, False):
        changed = {"arms": arms, "failures": (row,), "complete": complete}
        said = text.paragraph(summary.model_copy(update=changed)).replace("\u00a0", " ")
        assert "1 probe failed; failures are counted and listed" in said
        assert "No run has failed" not in said


def test_a_method_that_does_not_beat_the_best_baseline_is_named() -> None:
    summary = example_summary()
    assert "baseline." not in text.paragraph(summary)
    task = summary.tasks[0].model_copy(
        update={"baselines": {"no_answer": {"f1": 58.3}, "untrained": {"f1": 9.0}}}
    )
    said = text.paragraph(summary.model_copy(update={"tasks": (task, summary.tasks[1])}))
    assert "On squad_v2, lora does not beat the no_answer baseline." in said


def test_forgetting_is_told_in_its_own_unit() -> None:
    summary = example_summary()
    claim = next(claim for claim in summary.claims if claim.kind == "forgets_less")
    said = text.paragraph(summary.model_copy(update={"claims": (claim,)}))
    assert "On sst2, lora forgets less than full (−1.3 points, 4 of 5 paired seeds)." in said
    nats = claim.model_copy(update={"unit": "nats"})
    assert text.difference(nats, 1) == "−1.350 nats (−1.555 to −1.145)"  # scipy: t.interval of the four values


def test_many_claims_are_grouped_and_none_is_lost() -> None:
    summary = example_summary()
    more = tuple(claim.model_copy(update={"task": f"{claim.task}_b"}) for claim in summary.claims)
    said = text.paragraph(summary.model_copy(update={"claims": summary.claims + more}))
    assert "Of 10 claims, 4 supported" in said
    assert (
        "“lora within 3% of full” is inconclusive on sst2 (4 of 5 seeds) and sst2_b (4 of 5 seeds); "
        "not assessable on squad_v2 (4 of 5 seeds) and squad_v2_b (4 of 5 seeds)."
    ) in said


def test_a_small_drift_keeps_its_digits_and_its_sign() -> None:
    summary = example_summary()
    claim = next(claim for claim in summary.claims if claim.kind == "drifts_less")
    contrast = claim.contrast.model_copy(update={"estimate": -1.4e-5, "low": -2.1e-5, "high": -7e-6})
    small = claim.model_copy(update={"contrast": contrast, "contrast_bound": -9e-6})
    (row,) = report_checks.claim_details(summary.model_copy(update={"claims": (small,)})).rows
    assert row[1] == f"{text.MINUS}0.0000140 ({text.MINUS}0.0000210 to {text.MINUS}0.0000070)"
    assert row[2] == f"{text.MINUS}0.0000090"
