"""A rehearsal's parts: which ten samples, which contradictions; and the frozen body to compare with."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from finetrial.plugins import Feature
from finetrial.rehearsal import SAMPLES, contradictions, pick_samples
from tiny_runs import make_spec, run

features = st.lists(
    st.builds(
        Feature,
        input_ids=st.lists(st.integers(0, 3), min_size=1, max_size=4),
        row=st.integers(0, 30),
        labels=st.integers(0, 2).map(lambda label: {"label": label}),
    ),
    max_size=60,
)


@given(features)
def test_ten_samples_are_of_ten_rows_and_none_is_there_twice(given_features):
    found = pick_samples(given_features)
    assert len(found) <= SAMPLES
    assert len({feature.row for feature in found}) == len(found)
    assert len({tuple(feature.input_ids) for feature in found}) == len(found)
    assert bool(found) == bool(given_features)


def test_no_label_has_more_than_half_if_there_are_others():
    many = [Feature([1, 2, n], n, {"label": int(n >= 40)}) for n in range(50)]
    assert sorted(feature.labels["label"] for feature in pick_samples(many)) == [0] * 5 + [1] * 5
    alone = [Feature([1, 2, n], n, {"label": 0}) for n in range(50)]
    assert len(pick_samples(alone)) == SAMPLES


def test_inputs_that_occur_with_two_labels_are_counted_once_each():
    rows = [([1], 0), ([1], 1), ([1], 1), ([2], 0), ([2], 0), ([3], 1), ([3], 0)]
    assert contradictions([Feature(ids, n, {"label": label}) for n, (ids, label) in enumerate(rows)]) == 2


def test_a_frozen_body_trains_the_head_alone(tiny_bert, tmp_path):
    result = run(make_spec(tiny_bert, "frozen"), tmp_path)
    assert result.proof.void is None
    assert set(result.proof.groups) == {"head"}
    assert result.cost.trainable_parameters == 32 * 2 + 2  # hidden size to start and end
    assert result.settings_used["learning_rate"] == 3e-3
