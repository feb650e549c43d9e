"""`bench/regression.py` finds what has become slower, and takes no noise for it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def regression(bench_module) -> ModuleType:
    return bench_module("regression")


def ratios(seed, factor=1.0, noise=0.04, count=9):
    return (factor * (1 + noise * np.random.default_rng(seed).standard_normal(count))).tolist()


def test_a_fifth_slower_is_found_and_named(regression):
    for seed in range(20):
        recorded = {"data": ratios(seed), "step": ratios(seed + 100), "gone": [1.0]}
        now = {"data": ratios(seed + 200, 1.2), "step": ratios(seed + 300), "new": [5.0]}
        (found,) = regression.compare(recorded, now)
        assert found.item == "data"
        assert 0.1 < found.by < 0.35
        assert 0 < found.low < found.by < found.high


def test_noise_and_what_is_faster_are_no_regression(regression):
    for seed in range(50):
        recorded = {"data": ratios(seed), "faster": ratios(seed + 100)}
        assert regression.compare(recorded, {"data": ratios(seed + 200), "faster": ratios(seed, 0.7)}) == []


def test_slow_but_unsure_is_no_regression(regression):
    assert regression.compare({"data": ratios(1, noise=0.5)}, {"data": ratios(2, 1.2, noise=0.5)}) == []


def test_what_is_measured_runs_again_and_again(regression, real_data, tmp_path, monkeypatch):
    """Each time from nothing; what is left of the time before would be measured as fast."""
    monkeypatch.setenv("FINETRIAL_DATA", str(real_data))
    recorded = json.loads((BENCH / "results" / "regression.json").read_text())["ratios"]
    measured = []
    for name, (ours, yardstick) in regression.items(tmp_path):
        for work in (ours, ours, yardstick):
            work()
        measured.append(name)
    assert measured == list(recorded)
