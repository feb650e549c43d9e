"""A small calibration of the verdicts (`bench/calibration.py`): false ones at the margin, families, layers."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"


@pytest.fixture(scope="module")
def calibration(bench_module) -> ModuleType:
    return bench_module("calibration")


def test_at_the_margin_a_claim_is_supported_and_refuted_in_5_of_100_studies(calibration):
    rows = calibration.false_verdicts(400)
    assert len(rows) == 2 * 2 * len(calibration.KINDS) + 2
    assert {row.what: row.figure for row in rows if abs(row.figure - 0.05) > 0.045} == {}  # 4 standard errors


def test_of_many_claims_at_their_margins_any_is_supported_or_refuted_in_5_of_100_studies(calibration):
    rows = [row for row in calibration.families(150) if row.high is not None]
    assert len(rows) == 12
    assert {row.what: row.figure for row in rows if row.figure > 0.05 + 4 * 0.0178} == {}
    assert any(row.figure > 0 for row in rows)


def test_a_mean_over_layers_keeps_the_level_and_layers_as_samples_do_not(calibration):
    rows = calibration.layers(200)
    kept, lost = ([row.figure for row in rows if row.what.startswith(how)] for how in ("mean", "wrong"))
    assert max(kept) < 0.05 + 4 * 0.0154
    assert min(lost) > 0.2


def test_the_table_has_every_figure_and_marks_what_is_outside_its_bar(calibration):
    rows = [calibration.Row(part, "x", 5, 100, 0.123, 0.0, 0.05) for part in calibration.PARTS]
    text = calibration.table(rows)
    assert text.count("| x | 0.123 at 5 NOT HELD | at most 0.050 |") == len(calibration.PARTS)


def test_the_page_shows_the_figures_that_were_measured_and_they_hold(calibration):
    kept = json.loads((BENCH / "results" / "calibration.json").read_text())
    rows = [calibration.Row(**row) for row in kept["rows"]]
    assert kept["seed"] == calibration.SEED
    assert all(row.holds for row in rows)
    assert calibration.table(rows).rstrip() in (ROOT / "docs" / "statistics.md").read_text()
