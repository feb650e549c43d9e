"""`bench/halving.py`: its curves come back as they were kept, and those of the published figures replay."""

from __future__ import annotations

import pytest


def test_curves_come_back_to_three_digits_one_that_diverged_too(bench_module, tmp_path):
    module = bench_module("halving_curves")
    whole = ({"b": 0.6931, "a": 1.25}, {"b": 0.5, "a": 1.0}, {"b": 100.0, "a": 0.0})
    curves = [
        module.Curve({"learning_rate": 1e-3, "batch_size": 8}, whole, (10, 30, 90)),
        module.Curve({"learning_rate": 1e-2, "batch_size": 8}, (whole[0], {}, {}), (10, 30, 30)),
    ]
    module.keep(tmp_path / "sst2-0.npz", curves)
    back = module.kept(tmp_path / "sst2-0.npz")
    assert [curve.settings for curve in back] == [curve.settings for curve in curves]
    assert [curve.tokens for curve in back] == [(10, 30, 90), (10, 30, 30)]
    assert [list(end.values()) for end in back[0].examples] == [
        pytest.approx([1.25, 0.6931], rel=1e-3), [1.0, 0.5], [0.0, 100.0]
    ]  # fmt: skip
    assert [bool(end) for end in back[1].examples] == [True, False, False]


def test_settings_that_all_diverged_are_not_kept(bench_module, tmp_path):
    module = bench_module("halving_curves")
    with pytest.raises(SystemExit, match=r"no setting for sst2-0\.npz reached its end"):
        module.keep(tmp_path / "sst2-0.npz", [module.Curve({"batch_size": 8}, ({}, {}, {}), (1, 1, 1))])
    assert not list(tmp_path.iterdir())


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


def test_what_is_chosen_is_told_apart_by_its_replicates_too(bench_module):
    """Two recordings: the first's orders differ by 0 and +2 anew, the second has no replicates."""
    halving = bench_module("halving")
    curves = bench_module("halving_curves")
    ends = ({"a": 0.7}, {"a": 0.6}, {"a": 50.0})
    recorded = [curves.Curve({}, ends, (1, 2, 3)), curves.Curve({}, (*ends[:2], {"a": 60.0}), (1, 2, 3))]
    accuracy = halving.Metric(name="accuracy", higher_is_better=True, worst=0.0, best=100.0)
    whole, other = halving.Chosen(0, 30), halving.Chosen(1, 10)
    orders = [halving.Order(whole, whole, other, ["a"], 30), halving.Order(whole, other, other, ["a"], 30)]
    first = halving.replayed(recorded, orders, accuracy, {0: 70.0, 1: 72.0})
    assert first["halved_minus_whole"] == {"search": [10.0, 10.0], "choice": [0.0, 10.0]}
    assert first["trained_anew"] == {"search": [2.0, 2.0], "choice": [0.0, 2.0]}
    none = halving.Order(whole, halving.Chosen(None, 10), other, ["a"], 30)
    partly = halving.replayed(
        recorded, [none], accuracy, {0: 70.0}
    )  # nothing chosen is the worst; 1 not trained
    assert partly["trained_anew"] == {"search": [], "choice": [-70.0]}
    found = halving.together([first, halving.replayed(recorded, orders, accuracy, {})], 2)
    assert found["halved_minus_whole"]["search"]["standard_error"] == 0.0
    assert found["trained_anew"]["choice"]["mean"] == 1.0
    assert found["trained_anew"]["choice"]["orders"] == [2, 0]
    assert found["trained_anew"]["choice"]["standard_error"] is None  # of one recording none
