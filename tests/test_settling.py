"""When a search has settled: the gain that is left, the noise, and a study that stops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetrial.halving import LOSS, Standing
from finetrial.plugins import Metric
from finetrial.settling import expected_gain, noise, settled
from finetrial.store import Home
from test_pipeline import run_study

F1 = Metric(name="f1", higher_is_better=True, worst=0.0, best=100.0)


def test_the_gain_by_hand():
    """Best third of six: 10 and 8 over 6; scale 3; two more trials: 1/7 + 1/8."""
    assert expected_gain([1, 2, 5, 6, 8, 10], 8) == pytest.approx(3 * (1 / 7 + 1 / 8))
    assert expected_gain([-1, -2, -5, -6, -8, -10], 8, higher_is_better=False) == pytest.approx(
        3 * (1 / 7 + 1 / 8)
    )
    assert expected_gain([1, 2, 3], 3) == 0
    with pytest.raises(ValueError, match="spacing"):
        expected_gain([1], 3)


def test_for_an_exponential_tail_the_gain_is_right_in_the_mean():
    rng = np.random.default_rng(0)
    draws = rng.exponential(2.0, size=(4000, 15))
    foretold = np.mean([expected_gain(row[:9], 15) for row in draws])
    found = np.mean(draws.max(axis=1) - draws[:, :9].max(axis=1))
    assert foretold == pytest.approx(found, rel=0.06)  # four standard errors


@given(st.lists(st.floats(0, 100), min_size=2, max_size=30), st.integers(0, 30))
def test_a_gain_is_never_negative_and_grows_with_what_is_planned(scores, more):
    n = len(scores)
    assert 0 <= expected_gain(scores, n + more) <= expected_gain(scores, n + more + 1)


def standing(number: int, score: float | None, right: list[int]) -> Standing:
    return Standing(number, score, {f"e{i}": 100.0 * value for i, value in enumerate(right)})


def test_noise_is_of_the_best_and_the_first_below_the_best_third():
    best = standing(0, 75.0, [1, 1, 1, 0])
    second = standing(1, 50.0, [1, 1, 0, 0])
    worst = standing(2, 25.0, [0, 0, 0, 1])
    differences = [0.0, 0.0, 100.0, 0.0]
    assert noise([worst, second, best], F1) == pytest.approx(np.std(differences, ddof=1) / 2)
    assert noise([worst, second, best], LOSS) == pytest.approx(np.std([-100.0, -100.0, 0.0, 100.0], ddof=1) / 2)
    twin = standing(3, 75.0, [1, 1, 1, 0])
    assert noise([best, twin, second], F1) == pytest.approx(np.std(differences, ddof=1) / 2)
    assert noise([best, twin], F1) is None
    assert noise([best, Standing(1, None)], F1) is None
    assert noise([best, Standing(1, 50.0)], F1) is None
    between = standing(4, 74.0, [0, 0, 1, 0])
    assert noise([best, between, second, worst], F1) == pytest.approx(np.std(differences, ddof=1) / 2)


def test_a_search_has_settled_where_the_gain_is_below_the_noise():
    close = [standing(n, 60.0 - n / 100, [1, 0, 1, 1, 0, n % 2]) for n in range(6)]
    apart = [standing(n, 60.0 - 10 * n, [1, 0, 1, 1, 0, n % 2]) for n in range(6)]
    stop = settled(close, 15, F1)
    assert stop is not None
    assert (stop.after, stop.planned) == (6, 15)
    assert stop.gain < stop.noise == noise(close, F1)
    assert not settled([one._replace(examples={}) for one in close], 15, F1)
    assert settled(apart, 6, F1)  # nothing is left
    assert not settled(apart[:1], 15, F1)


STUDY = """\
study: settled
model: {model}
tasks:
  synthetic_qa: {{rows: 48, validation_rows: 24, test_rows: 24, max_length: 64}}
methods:
  full: {{search: {{learning_rate: {{low: 5e-3, high: 1e-2}}}}}}
search: {{trials: 12, startup: 3, early_stop: true, {halving}space: {{epochs: 3, batch_size: 8}}}}
train: {{seeds: 1}}
run: {{threads: 1, log_steps: 1}}
"""


@pytest.mark.parametrize("halving", ["", "halving: 3, "], ids=["whole", "halved"])
def test_a_study_that_has_settled_stops_and_is_complete(tiny_bert: Path, tmp_path: Path, halving: str):
    study = tmp_path / "study.yaml"
    study.write_text(STUDY.format(model=tiny_bert, halving=halving))
    done = run_study(study, tmp_path / "home")
    summary = json.loads((tmp_path / "home" / "analysis" / "summary.json").read_text())
    assert summary["complete"]
    (row,) = summary["ledger"]
    assert 3 <= row["trials_done"] == row["search_stop"]["after"] < row["search_stop"]["planned"] == 12
    assert row["search_stop"]["gain"] < row["search_stop"]["noise"]
    assert "more trials would gain less than noise" in done.stdout + done.stderr
    run_study(study, tmp_path / "home")
    again = json.loads((tmp_path / "home" / "analysis" / "summary.json").read_text())
    assert again["ledger"] == summary["ledger"]
    if not halving:
        (last,) = Home(tmp_path / "home").find(
            f"trial.synthetic_qa.full.{row['search_stop']['after'] - 1:03d}-"
        )
        shutil.rmtree(last.path)
        run_study(study, tmp_path / "home")
        assert last.result() is not None  # done anew, though the search had ended after it
        again = json.loads((tmp_path / "home" / "analysis" / "summary.json").read_text())
        assert again["complete"]
