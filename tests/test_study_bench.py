"""`bench/study.py` compares scores by ranks where a few of them have collapsed."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.stats

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def study(bench_module) -> ModuleType:
    return bench_module("study")


def test_a_published_shift_and_its_interval_come_out(study):
    """Of the chorioamnion (Hollander and Wolfe 1973, p. 69), by R's `wilcox.test(x, y, conf.int = TRUE)`."""
    term = [0.80, 0.83, 1.89, 1.04, 1.45, 1.38, 1.91, 1.64, 0.73, 1.46]
    earlier = [1.15, 0.88, 0.90, 0.74, 1.21]
    found = study.by_ranks(term, earlier)
    assert [found[name] for name in ("estimate", "low", "high")] == pytest.approx([0.305, -0.15, 0.76])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("ours", "theirs"), [(5, 15), (5, 5), (8, 6)])
def test_the_interval_has_what_the_exact_test_does_not_reject(study, seed, ours, theirs):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(1.0, size=ours), rng.normal(size=theirs)
    found = study.by_ranks(x.tolist(), y.tolist())

    def rejected(shift: float) -> bool:
        return scipy.stats.mannwhitneyu(x - shift, y, method="exact").pvalue <= 0.05

    inside = 1e-9 * np.array([1, -1])
    ends = np.array([found["low"], found["high"]])
    assert [rejected(shift) for shift in ends + inside] == [False, False]
    assert [rejected(shift) for shift in ends - inside] == [True, True]
