"""A wrong study file: every mistake in one message, each with key path, line, value, rule and next step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from finetrial.errors import StudyError
from finetrial.frozen import Frozen
from finetrial.problems import Collector
from finetrial.space import Choice, Fixed, Range
from finetrial.study_file import load_study, parse_study
from wrong_study_files import ONE_MISTAKE, text_of


def problems_of(text: str, base: Path = Path("/nowhere")) -> list[str]:
    try:
        parse_study(text, file="study.yaml", base=base)
    except StudyError as error:
        return [str(problem) for problem in error.problems]
    return []


def test_a_short_file_is_complete_with_defaults():
    study = parse_study(text_of(), file="study.yaml", base=Path("/somewhere"))
    assert [method.name for method in study.methods] == ["full", "lora"]
    assert study.search.trials == 15
    assert study.search.startup_trials == 5  # a third of the budget
    assert study.train.seeds == 5
    assert [claim.text for claim in study.claims] == [
        "lora within 3% of full",
        "lora drifts 20% less than full",
    ]
    assert study.claims[0].margin == pytest.approx(0.03)
    assert study.spaces["full"]["learning_rate"] == Range(low=5e-7, high=5e-5, log=True)
    assert study.spaces["lora"]["learning_rate"] == Range(low=5e-5, high=5e-3, log=True)


def test_each_measure_that_is_taken_brings_its_claim():
    text = """
study: s
model: ./model
tasks: {sst2: {data: {train: a.jsonl, test: b.jsonl}}, mrpc: {data: {train: c.jsonl, test: d.jsonl}}}
methods: [full, lora]
measure: [forgetting]
"""
    study = parse_study(text, file="study.yaml", base=Path("/nowhere"))
    assert [claim.text for claim in study.claims] == ["lora within 3% of full", "lora forgets less than full"]
    assert study.claims[1].margin == 0
    message = "forgetting is not measured; add `forgetting` under `measure:`"
    wrong = text.replace("[forgetting]", "[drift]") + "claims: [lora  forgets less than full]\n"
    assert [problem for problem in problems_of(wrong) if message in problem]


def test_numbers_and_units_are_read_as_such():
    study = parse_study(
        text_of(
            methods="{full: {search: {learning_rate: 1e-5}}, lora: {search: {rank: {low: 4, high: 64}}}}",
            search="{trials: 6, rows: all, space: {epochs: 1, weight_decay: [0, 0.1]}}",
            run="{memory: 24 GB, trial_limit: 30 min, checkpoint: 5 steps}",
        ),
        file="study.yaml",
        base=Path(),
    )
    assert study.spaces["full"]["learning_rate"] == Fixed(value=1e-5)
    assert study.spaces["lora"]["rank"] == Range(low=4, high=64, integer=True)
    assert study.spaces["lora"]["epochs"] == Fixed(value=1)
    assert study.spaces["full"]["weight_decay"] == Choice(choices=(0, 0.1))
    assert study.run.memory_bytes == 24_000_000_000
    assert study.run.limit_seconds == 1800
    assert (study.run.checkpoint_seconds, study.run.checkpoint_steps) == (None, 5)


@pytest.mark.parametrize("name", ONE_MISTAKE)
def test_one_mistake_gives_one_message(name):
    sections, message = ONE_MISTAKE[name]
    problems = problems_of(text_of(**sections))
    assert len(problems) == 1, problems
    assert problems[0].startswith(message)


def test_a_measure_does_not_ask_about_the_files_of_a_task_that_has_a_mistake(tmp_path):
    """Forgetting reads the study's own tasks: one with a mistake has no parameters to be read by."""
    data = "data: {train: a.jsonl, test: b.jsonl}"
    tasks = f"{{mine: {{use: classification, {data}, max_length: 3}}, rte: {{{data}}}}}"
    text = text_of(model="./nowhere", tasks=tasks, measure="[drift, forgetting]", claims="[]")
    with pytest.raises(StudyError) as raised:
        parse_study(text, file="study.yaml", base=tmp_path, list_missing=True)
    told = [str(problem) for problem in raised.value.problems]
    assert [line.partition(" ")[0] for line in told] == ["tasks.mine.max_length", "model:", "tasks.rte:"]


def test_all_mistakes_of_a_file_come_together_in_the_order_of_its_lines():
    text = """\
stduy: x
model: org/name
tasks: {squad_v2: {data: {hub: x, trian: a.json}, max_lenght: 5}}
methods:
  full: {search: {learning_rate: {low: 1e-3, high: 1e-5}}}
  lroa: {}
search: {trials: "15"}
claims: [dora within 3% of full, lroa within 3% of full]
run: {memory: lots}
"""
    starts = [
        "stduy (line 1): ", "model (line 2): ", "tasks.squad_v2.max_lenght (line 3): ",
        "tasks.squad_v2.data.trian (line 3): ", "methods.full.search.learning_rate (line 5): ",
        "methods.lroa (line 6): ", "search.trials (line 7): ", "claims.0 (line 8): 'dora'", "run.memory (l",
    ]  # fmt: skip
    problems = problems_of(text)
    assert [p[: len(s)] for p, s in zip(problems, starts, strict=True)] == starts


def test_a_shared_mistake_is_told_once_though_every_method_has_it():
    assert len(problems_of(text_of(search="{space: {epochs: 0, batch_size: [8, 8]}}"))) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "file: not found; give the path of a study file; `finetrial init` writes one"),
        (b"", "file: empty; `finetrial init` writes a commented one"),
        (b"study: \xff", "file: is not UTF-8 text (byte 0xff at position 7); save it as UTF-8"),
        (b"[1, 2]", "file: [1, 2] is not a mapping; write key: value pairs (study, model, tasks"),
        (b"study: [", "line 1, column 9: not valid YAML"),
        (b"#" * 1_000_001, "file: larger than 1,000,000 bytes"),
    ],
)
def test_a_file_that_is_none(tmp_path, content, message):
    path = tmp_path / "study.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StudyError) as raised:
        load_study(path)
    assert len(raised.value.problems) == 1
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"{path} has 1 problem\n")


def test_a_folder_or_a_misspelt_name_leads_to_the_study_file_that_is_there(tmp_path):
    (tmp_path / "squad.yaml").write_text("study: x")
    for named in (tmp_path, tmp_path / "sqaud.yaml"):
        with pytest.raises(StudyError, match=rf"did you mean {tmp_path}/squad.yaml\?"):
            load_study(named)


def test_a_folder_taken_for_a_hub_name_is_pointed_at(tmp_path):
    (tmp_path / "bert").mkdir()
    assert problems_of(text_of(model="bert"), tmp_path) == [
        "model (line 2): 'bert' is a folder here; write ./bert (else it is a Hub name)"
    ]


class Inner(Frozen):
    depth: int = 1
    words: list[str] = []


class Unions(Frozen):
    """Parameters as a plug-in may have them."""

    label: int | str = 0
    share: float | Literal["all"] = "all"
    inner: Inner | str = "none"
    table: dict[str, Inner] = {}
    nested: Inner | None = None
    several: list[Inner] | None = None
    bounded: int | None = Field(default=None, ge=1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"label": [1]}, "p.label: [1] is not a whole number or text; write one of these"),
        ({"share": "most"}, "p.share: 'most' is not a number or 'all'; write one of these"),
        ({"inner": 5}, "p.inner: 5 is not a mapping or text; write one of these"),
        ({"inner": {"dpeth": 2}}, "p.inner.dpeth: unknown key; did you mean 'depth'? known: depth, words"),
        ({"inner": {"depth": "2"}}, "p.inner.depth: '2' is not a whole number; write 2, without quotes"),
        (
            {"table": {"int": {"dpt": 1}}},
            "p.table.int.dpt: unknown key; did you mean 'depth'? known: depth, words",
        ),
        ({"nested": {"words": "a"}}, "p.nested.words: 'a' is not a list; write [a, b]"),
        (
            {"several": [{}, {"wrds": []}]},
            "p.several.1.wrds: unknown key; did you mean 'words'? known: depth, words",
        ),
        ({"bounded": 0}, "p.bounded: 0 is below the least allowed, 1; raise it"),
    ],
)
def test_a_value_that_could_be_several_things_gives_one_message(given, expected):
    collector = Collector({})
    assert collector.build(("p",), Unions, given) is None
    assert [str(problem) for problem in collector.problems] == [expected]


def test_a_key_that_would_upset_the_terminal_is_quoted():
    collector = Collector({})
    collector.add(("a", "\x1b[31m"), "wrong")
    assert str(collector.problems[0]) == r"a.'\x1b[31m': wrong"


WORDS = st.sampled_from(["full", "lora", "drift", "../x", "", "3 GB", "a:b"])
KEYS = st.sampled_from(["full", "use", "search", "rows", "data", "learning_rate", "low", "x"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 50) | st.floats(-1, 1) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
SECTIONS = ["study", "model", "tasks", "methods", "search", "train", "measure", "claims", "run", "track"]


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from([*SECTIONS, "other"]), VALUES, max_size=6))
def test_no_file_ends_in_anything_but_a_study_or_problems(sections):
    text = json.dumps(sections)
    try:
        study = parse_study(text, file="study.yaml", base=Path("/nowhere"))
    except StudyError as error:
        wrong = error
    else:
        assert study.identity()
        return
    assert wrong.problems
    assert all(problem.where and problem.message for problem in wrong.problems)
