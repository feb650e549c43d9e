"""`bench/halving.py`: its curves come back as they were kept, and those of the published figures replay."""

from __future__ import annotations

import pytest


def test_curves_come_back_to_three_digits_one_that_diverged_too(bench_module, tmp_path):
    halving = bench_module("halving")
    whole = ({"b": 0.6931, "a": 1.25}, {"b": 0.5, "a": 1.0}, {"b": 100.0, "a": 0.0})
    curves = [
        halving.Curve({"learning_rate": 1e-3, "batch_size": 8}, whole, (10, 30, 90)),
        halving.Curve({"learning_rate": 1e-2, "batch_size": 8}, (whole[0], {}, {}), (10, 30, 30)),
    ]
    halving.keep(tmp_path / "sst2-0.npz", curves)
    back = halving.kept(tmp_path / "sst2-0.npz")
    assert [curve.settings for curve in back] == [curve.settings for curve in curves]
    assert [curve.tokens for curve in back] == [(10, 30, 90), (10, 30, 30)]
    assert [list(end.values()) for end in back[0].examples] == [
        pytest.approx([1.25, 0.6931], rel=1e-3), [1.0, 0.5], [0.0, 100.0]
    ]  # fmt: skip
    assert [bool(end) for end in back[1].examples] == [True, False, False]


def test_the_published_curves_replay(bench_module):
    """Whole trials of equal length would take 15 / (15/9 + 5 * 2/9 + 2 * 2/3) = 3.65 times the tokens."""
    halving = bench_module("halving")
    (row,) = halving.replay(halving.PUBLISHED, 2, ["sst2"]).values()
    assert all(3 < row["times_fewer_tokens"][than]["median"] < 5 for than in row["times_fewer_tokens"])
    assert len(row["halved_minus_whole"]["choice"]["recordings"]) == len(row["settings"])


def test_a_folder_without_recordings_is_refused(bench_module, tmp_path):
    halving = bench_module("halving")
    with pytest.raises(SystemExit, match="`record` makes them"):
        halving.replay(tmp_path, 2)
