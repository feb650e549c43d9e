"""Search spaces: how a study file writes them, which values make sense, and where an edge is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetrial.space import COMMON_SPACE, Choice, Fixed, Range, edge_of, override, parse_dimension

RATE = Range(low=5e-5, high=5e-3, log=True)
RANK = Choice(choices=(4, 8, 16, 32))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"low": 1e-5, "high": 1e-3}, Range(low=1e-5, high=1e-3)),
        ({"low": 1e-5, "high": 1e-3, "log": True}, Range(low=1e-5, high=1e-3, log=True)),
        ({"low": 1, "high": 3, "integer": True}, Range(low=1, high=3, integer=True)),
        ([4, 8, 16], Choice(choices=(4, 8, 16))),
        (["a", "b"], Choice(choices=("a", "b"))),
        (2, Fixed(value=2)),
        ("a", Fixed(value="a")),
        (True, Fixed(value=True)),
    ],
)
def test_the_three_forms(written, meant):
    assert parse_dimension(written) == meant


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"low": 1e-3, "high": 1e-5}, "low 0.001 is above high 1e-05; swap them"),
        ({"low": 1, "high": 1}, "low and high are both 1; write the number alone to fix it"),
        ({"low": 0, "high": 1, "log": True}, "low 0 is not above 0, and the range goes by ratio; raise it"),
        ({"low": 0.5, "high": 3, "integer": True}, "0.5 .. 3 is a range of whole numbers; give whole ends"),
        ({"lo": 1, "high": 3}, "unknown key 'lo'; did you mean 'low'? known: low, high, log, integer"),
        ({"high": 3}, "low is missing; write {low: 1e-5, high: 1e-3}"),
        ({"low": "1e-5", "high": 3}, "low '1e-5' is not a number; write 1e-5, without quotes"),
        ({"low": True, "high": 3}, "low true is not a number"),
        ({"low": 1, "high": None}, "high null is not a number"),
        ({"low": 1, "high": 3, "log": "yes"}, "log 'yes' is not true or false; write one of them"),
        ([4], "a choice needs at least two values; write the value alone to fix it"),
        ([], "a choice needs at least two values"),
        ([4, 4], "a value is listed twice; list each once"),
        ([4, None], "null cannot be a choice; list numbers or words"),
        ([[4], 8], "[4] cannot be a choice"),
        (None, "null is no setting; write {low: 1e-5, high: 1e-3}, a list of choices, or one value"),
    ],
)
def test_a_wrong_dimension_says_what_to_write(wrong, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is compared below
        parse_dimension(wrong)
    assert message in str(raised.value)


def test_all_faults_of_a_range_are_told_together():
    with pytest.raises(ValueError, match=r"unknown key 'steps'.*; low 'a' is not a number.*; high is missing"):
        parse_dimension({"low": "a", "steps": 3})


def test_a_rate_s_range_stays_spaced_by_ratio_unless_the_file_says_otherwise():
    assert override("learning_rate", RATE, {"low": 1e-4, "high": 1e-2}).log
    assert not override("learning_rate", RATE, {"low": 1e-4, "high": 1e-2, "log": False}).log
    assert not override("weight_decay", COMMON_SPACE["weight_decay"], {"low": 0, "high": 1}).log


def test_a_range_of_a_counted_setting_holds_whole_numbers_only():
    assert override("rank", RANK, {"low": 4, "high": 64}).integer
    with pytest.raises(ValueError, match="rank is a whole number; leave `integer: false` out"):
        override("rank", RANK, {"low": 4, "high": 64, "integer": False})


@pytest.mark.parametrize(
    ("name", "before", "wrong", "message"),
    [
        ("learning_rate", RATE, -1e-5, "-1e-05 is outside 0 .. 10; give a value within"),
        ("learning_rate", RATE, {"low": -1e-5, "high": 1e-3}, "-1e-05 is outside 0 .. 10"),
        ("learning_rate", RATE, [0, 1e-3], "0 trains nothing; give a value above 0 for learning_rate"),
        ("epochs", COMMON_SPACE["epochs"], 0, "0 trains nothing; give a value above 0 for epochs"),
        ("learning_rate", RATE, "fast", "'fast' is not a number; learning_rate lies between 0 and 10"),
        ("learning_rate", RATE, True, "true is not a number"),
        (
            "batch_size",
            COMMON_SPACE["batch_size"],
            [8, 16.5],
            "16.5 is not a whole number; batch_size is counted",
        ),
        ("rank", RANK, 0, "0 is outside 1 .. 65536"),
        ("warmup_ratio", COMMON_SPACE["warmup_ratio"], {"low": 0, "high": 2}, "2 is outside 0 .. 1"),
        ("dropout", Fixed(value=0.1), 1.0, "1 is outside 0 .. 0.99"),
        ("my_setting", Range(low=0, high=1), "a", "'a' is not a number; give one"),
    ],
)
def test_values_that_make_no_sense_for_a_setting_are_refused(name, before, wrong, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is compared below
        override(name, before, wrong)
    assert message in str(raised.value)


def test_a_plug_in_s_own_setting_of_words_takes_words():
    assert override("target", Choice(choices=("a", "b")), "c") == Fixed(value="c")


@pytest.mark.parametrize(
    ("value", "edge"),
    # 5 % of two decades is a tenth of a decade: a factor of 10^0.1 = 1.259 from either end.
    [(5e-5, "low"), (6.2e-5, "low"), (6.4e-5, None), (5e-4, None), (3.9e-3, None), (4.1e-3, "high")],
)  # fmt: skip
def test_an_optimum_within_five_percent_of_an_end_is_at_the_edge(value, edge):
    assert RATE.edge(value) == edge


@pytest.mark.parametrize(
    ("name", "low", "high", "value", "edge"),
    [
        ("warmup_ratio", 0.0, 0.1, 0.001, None),  # below 0 there is nothing to search
        ("warmup_ratio", 0.0, 0.1, 0.099, "high"),
        ("warmup_ratio", 0.01, 0.1, 0.011, "low"),
        ("warmup_ratio", 0.5, 1.0, 0.99, None),  # nor above 1
        ("of_its_own", 0.0, 0.1, 0.001, "low"),  # a plug-in's: nobody knows where it ends
    ],
)
def test_an_end_that_is_the_setting_s_own_is_no_edge(name, low, high, value, edge):
    assert edge_of(name, Range(low=low, high=high), value) == edge


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["low", "high", "log", "integer", "x"]), inner, max_size=4)
    ),
    max_leaves=6,
)


@settings(deadline=None)  # a busy machine is no fault
@given(st.sampled_from(["learning_rate", "rank", "epochs", "mine"]), ANY)
def test_any_value_is_a_dimension_or_a_value_error(name, value):
    before = {"learning_rate": RATE, "rank": RANK}.get(name, Choice(choices=(1, 2)))
    try:
        dimension = override(name, before, value)
    except ValueError:
        return
    assert isinstance(dimension, Range | Choice | Fixed)
    assert type(dimension).model_validate_json(dimension.model_dump_json()) == dimension
