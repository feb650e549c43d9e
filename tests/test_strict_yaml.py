"""A study file's YAML: what is written is what is read, and no text at all ends in a traceback."""

from __future__ import annotations

import json
import math
import re
import string

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetrial.strict_yaml import LARGEST_WHOLE, dump, parse, parse_duration, parse_size

untimed = settings(deadline=None)  # a busy machine is no fault


def value_of(text: str) -> object:
    value, _, problems = parse(text)
    assert problems == []
    return value


def problems_of(text: str) -> list[str]:
    return [str(problem) for problem in parse(text)[2]]


# YAML 1.1 reads the left as text, text, text, false, true, eight, a number in base 60, a date, a number.
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-5", 1e-5), ("5E6", 5e6), ("-3e+2", -300.0), ("no", "no"), ("on", "on"), ("010", 10),
        ("12:30", "12:30"), ("2024-01-31", "2024-01-31"), ("1_000", "1_000"), (".5", 0.5), ("5.", 5.0),
        ("true", True), ("False", False), ("~", None), ("null", None), ("", None), ("'15'", "15"),
        ("'true'", "true"), (".inf", ".inf"), (".nan", ".nan"), ("0x10", "0x10"), ("24 GB", "24 GB"),
        ("+7", 7), ("-0", 0), ("v1.0", "v1.0"), ("e5", "e5"), ("1e", "1e"), ("٣", "٣"),
    ],
)  # fmt: skip
def test_a_plain_value_is_what_it_looks_like(written, meant):
    value = value_of(f"key: {written}\n")["key"]
    assert value == meant
    assert type(value) is type(meant)


def test_every_key_path_has_its_line():
    _, lines, _ = parse("a: 1\nb:\n  - x\n  - c: 2\n    d: 3\n")
    assert lines[("a",)] == 1
    assert lines[("b",)] == 2
    assert lines[("b", 1, "d")] == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "a (line 3): written twice, first on line 1; keep one"),
        ("a: {b: 1, b: 2}", "a.b (line 1): written twice, first on line 1; keep one"),
        ("a: &x 1\n", "line 1: anchors and aliases (& and *) are not used here; write it out"),
        ("a: !!python/object:os.system x", "the tag 'tag:yaml.org,2002:python/object:os.system' is not"),
        ("a: !!int foo", "the tag 'tag:yaml.org,2002:int' is not allowed; write the plain value"),
        ("a: 1\n---\nb: 2\n", "line 2: a second document begins here; keep one (remove the ---)"),
        ("a:\n\t- b\n", "line 2, column 1: not valid YAML: found character '\\t' that cannot start any token"),
        ("a: [1, 2\nb: 3\n", "(while parsing a flow sequence, begun on line 1); check indentation, brackets"),
        ("a: b: c", "line 1, column 5: not valid YAML: mapping values are not allowed here"),
        ("a: 'b", "not valid YAML: found unexpected end of stream"),
        ("? [a, b]\n: c\n", "line 1: a key is a list or a mapping; write one word"),
        ("a: \x00", "file: the character U+0000 at position 3 is not allowed in YAML; remove it"),
        ("a: \ud800", "file: the character U+D800 at position 3 is not allowed"),
        ("a: 1e400", "a (line 1): 1e400 is too large a number; write one of at most 18 digits"),
        ("a: [1, 99999999999999999999]", "a.1 (line 1): 99999999999999999999 is too large a number"),
        (f"a: {'9' * 5000}", "a (line 1): 99999999999999999... is too large a number"),
        ("[" * 3000, "line 1: more than 50 levels deep; a study file has about five"),
        ("", "file: empty; `finetrial init` writes a commented one"),
        ("# only a comment\n", "file: empty"),
        ("~", "file: empty"),
        ("a: 1\n" * 300_000, "file: larger than 1,000,000 bytes; a study file is a page or two"),
    ],
)
def test_what_a_study_file_may_not_have_is_named_with_its_line(text, message):
    assert message in "\n".join(problems_of(text))


def test_several_faults_of_form_are_told_together():
    assert len(problems_of("a: 1\na: 2\nb: 1e999\nb: 3\n")) == 3
    assert len(problems_of("a: &x 1\nb: *x\nc: !t 1\n")) == 3


def test_shared_nodes_cannot_expand_without_bound():
    laughs = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi"))  # noqa: B905
    value, _, problems = parse(laughs)
    assert value is None
    assert problems


# Beyond U+FFFF JSON's escapes are pairs, which YAML does not join.
TEXT = st.text(st.characters(max_codepoint=0xFFFD, exclude_categories=("Cs",)), max_size=20)
# PyYAML leaves 0E0 and 1e5 bare, as YAML 1.1 takes them for text; in a study file they are numbers.
WORDS = TEXT.filter(lambda text: not re.match(r"[-+]?[.]?[0-9]", text))


def plain(text):
    """Any value that a study file can hold, with strings from `text`."""
    return st.recursive(
        st.none() | st.booleans() | st.integers(-LARGEST_WHOLE, LARGEST_WHOLE) | text
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
        max_leaves=12,
    )  # fmt: skip


@untimed
@given(st.dictionaries(TEXT, plain(TEXT), min_size=1, max_size=4))
@example({"a": 1e-05, "b": [True, None, "no"], "c": {"0": "010"}})
def test_what_another_writer_writes_is_read_back(value):
    """JSON is YAML: with its strings quoted, every plain value comes back equal and of the same kind."""
    read, _, problems = parse(json.dumps(value))
    assert problems == []
    assert json.dumps(read) == json.dumps(value)


@untimed
@given(
    st.dictionaries(st.text(string.ascii_letters, min_size=1, max_size=8), plain(WORDS), min_size=1, max_size=4)
)
def test_what_pyyaml_writes_is_read_back_but_for_its_spelling_of_numbers(value):
    """safe_dump writes 1.0e-05 and quotes whatever YAML 1.1 would take for something else."""
    read, _, problems = parse(yaml.safe_dump(value))
    assert problems == []
    assert read == value


@untimed
@given(st.text(max_size=200))
@example("- ? - :")
@example("!<tag:yaml.org,2002:int> x")
@example("%YAML 9.9\n--- a")
@example("{a: b}: c")
@example("\ufeffa: 1")
@example("? ? ? a")
@example(": x")
def test_no_text_crashes_and_a_text_without_a_value_has_a_problem(text):
    value, lines, problems = parse(text)
    assert value is not None or problems
    assert all(problem.where and problem.message for problem in problems)
    assert all(line >= 1 for line in lines.values())


@untimed
@given(st.text("[]{}:,-?&*!|>'\"%@`#~ \n\tabc019.eE+", max_size=60))
def test_no_text_of_yaml_s_own_signs_crashes(text):
    value, _, problems = parse(text)
    assert value is not None or problems


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [("24 GB", 24_000_000_000), ("512 MiB", 536_870_912), ("1.5kb", 1500), ("7B", 7)],
)
def test_sizes(written, size_bytes):
    assert parse_size(written) == size_bytes


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("30 min", 1800), ("2 h", 7200), ("1.5h", 5400), ("0.5 s", 0.5), ("1 day", 86400), ("3 Hours", 10800)],
)
def test_durations(written, seconds):
    assert parse_duration(written) == seconds


@pytest.mark.parametrize(
    "wrong", ["5 parsecs", "lots", "", "GB", "-3 GB", "1e3 GB", "3 GB 4", True, None, [3], 30, 0.5]
)
def test_what_is_no_quantity_is_refused_with_an_example(wrong):
    with pytest.raises(ValueError, match=r"write e\.g\. 24 GB or 512 MiB"):
        parse_size(wrong)
    with pytest.raises(ValueError, match=r"write e\.g\. 30 min or 2 h"):
        parse_duration(wrong)


def test_an_unknown_unit_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'5 parsecs' has an unknown unit, 'parsecs'.*units: s, sec"):
        parse_duration("5 parsecs")


@pytest.mark.parametrize("wrong", ["0 GB", "0.0 B"])
def test_a_quantity_is_above_zero(wrong):
    with pytest.raises(ValueError, match=r"not above 0"):
        parse_size(wrong)


@untimed
@given(st.text(max_size=30) | st.integers() | st.floats() | st.booleans() | st.none())
@example("9" * 400 + " GB")
@example(math.inf)
@example(10**400)
def test_any_value_is_a_size_above_zero_or_a_value_error(value):
    for convert in (parse_size, parse_duration):
        try:
            quantity = convert(value)
        except ValueError:
            continue
        assert math.isfinite(quantity)
        assert quantity >= 0


@untimed
@given(st.integers(1, 10**6), st.sampled_from(["kB", "MB", "GB", "TB"]))
def test_a_thousand_of_a_unit_is_one_of_the_next(count, unit):
    following = {"kB": "MB", "MB": "GB", "GB": "TB", "TB": "TB"}[unit]
    factor = 1 if unit == "TB" else 1000
    assert parse_size(f"{count * factor} {unit}") == parse_size(f"{count} {following}")


PLAIN = (
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)
)
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=20) | st.sampled_from(
    ["1e-4", "1e5", ".5e3", "010", "no", "1_000", "12:30", "2026-01-01", "null", "~", "true", "0x1f", "1.", ""]
)


@untimed
@given(st.dictionaries(TEXT.filter(bool), PLAIN | TEXT | st.lists(TEXT, max_size=3), max_size=4))
def test_what_is_dumped_is_parsed_back(value):
    parsed, _, problems = parse(dump(value))
    assert problems == []
    assert parsed == value
    assert all(type(parsed[key]) is type(value[key]) for key in value)
