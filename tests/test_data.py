"""Reading rows and cutting splits: five formats, one meaning; every fault named; nothing dropped."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from pydantic import ValidationError

from finetrial import data
from finetrial.data import DataSource, cap_rows, check_disjoint, group_split, stratified_split
from finetrial.errors import DataError
from finetrial.plugins import Splits, load

ROWS = [
    {"text": 'plain, with "quotes"', "label": "1"},
    {"text": "two\nlines \u2028 and one more", "label": "0"},
    {"text": "NA", "label": "1"},
    {"text": "café", "label": "0"},
]


def source(**fields) -> DataSource:
    return DataSource.model_validate(fields)


def write(folder: Path, suffix: str, rows=ROWS) -> str:
    path = folder / f"rows{suffix}"
    match suffix:
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        case ".csv":
            cells = (",".join('"' + v.replace('"', '""') + '"' for v in row.values()) for row in rows)
            path.write_text("\n".join(["text,label", *cells]) + "\n")
        case ".tsv":
            path.write_text("\n".join(["text\tlabel", *("\t".join(row.values()) for row in rows)]) + "\n")
        case ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.name


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    rows = data.load(source(train=write(tmp_path, suffix)), tmp_path)["train"]
    assert [row.values for row in rows] == ROWS


def test_tsv_knows_no_quoting(tmp_path):
    rows = [{"text": '"open quote', "label": "1"}, {"text": "it's 5\" long", "label": "0"}]
    read = data.load(source(train=write(tmp_path, ".tsv", rows)), tmp_path)["train"]
    assert [row.values for row in read] == rows


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    for name, text in (("a.csv", "text,label\nx,1\n"), ("b.jsonl", '{"text": "x", "label": "1"}\n')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        rows = data.load(source(train=name), tmp_path)["train"]
        assert rows[0].values == {"text": "x", "label": "1"}


def test_several_files_are_read_one_after_the_other(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "b.jsonl").write_text('\n{"n": 2}\n')
    rows = data.load(source(train=["a.jsonl", "b.jsonl"]), tmp_path)["train"]
    assert [(row.where, row.values["n"]) for row in rows] == [("a.jsonl line 1", 1), ("b.jsonl line 2", 2)]


def test_squad_json_becomes_flat_rows(tmp_path):
    question = {"id": "q1", "question": "Where?", "answers": [{"text": "Rome", "answer_start": 3}]}
    nothing = {"id": "q2", "question": "Who?", "answers": [], "is_impossible": True}
    paragraph = {"context": "In Rome.", "qas": [question, nothing]}
    whole = {"version": "v2.0", "data": [{"title": "Rome", "paragraphs": [paragraph]}]}
    (tmp_path / "s.json").write_text(json.dumps(whole))
    first, second = (row.values for row in data.load(source(train="s.json"), tmp_path)["train"])
    assert first["answers"] == {"text": ["Rome"], "answer_start": [3]}
    assert second == {
        "id": "q2",
        "title": "Rome",
        "context": "In Rome.",
        "question": "Who?",
        "answers": {"text": [], "answer_start": []},
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lines.json", '{"text": 1}\n{"text": 2}\n', r"one JSON value on every line; call it lines\.jsonl"),
        ("bad.jsonl", '{"text": 1}\n{"text": \n', r"bad.jsonl line 2 is not JSON"),
        ("list.jsonl", '{"text": 1}\n[1]\n', r"list.jsonl line 2 is not an object"),
        ("bad.json", '[\n{"a": 1},\n{"a" 2}]', r"bad.json line 3 is not JSON"),
        ("form.json", '{"rows": []}', r"form.json is neither a list of objects nor SQuAD's form"),
        ("half.json", '{"data": [{"paragraphs": [{"qas": [{"id": "q7"}]}]}]}', r"question q7.*'context'"),
        ("empty.jsonl", "\n", r"empty.jsonl has no rows"),
        ("empty.csv", "", r"empty.csv is empty; check"),
        ("blank.csv", "\n", r"blank.csv does not begin with a header"),
        ("wide.csv", 'text,label\n"a\nb",1\nb,1,2\n', r"wide.csv is not CSV: row 2: Expected 2 columns, got 3"),
        ("header.csv", "text,label\n", r"header.csv has no rows"),
        ("wide.csv", "text,label\na,1\nb,1,2\n", r"wide.csv is not CSV.*Expected 2 columns, got 3"),
        ("twice.csv", "text,text\na,b\n", r"column 'text' twice"),
        (
            "latin.jsonl",
            '{"text": "caf\xe9"}'.encode("latin-1"),
            r"latin.jsonl line 1 is not UTF-8 \(byte 0xe9 at column 14\)",
        ),
        ("fake.parquet", "text", r"fake.parquet is not Parquet"),
        ("rows.xlsx", "x", r"rows.xlsx has no known format; use one of .json"),
    ],
)
def test_files_that_do_not_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=f"(?s){message}"):
        data.load(source(train=name), tmp_path)


def test_paths_know_variables_defaults_and_home(tmp_path, monkeypatch):
    name = write(tmp_path, ".jsonl")
    monkeypatch.setenv("DATA_HERE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DATA_NOT_HERE", raising=False)
    wanted = [(tmp_path / name).resolve()]
    elsewhere = Path("/")
    assert data.files(source(train=f"${{DATA_HERE}}/{name}"), elsewhere) == wanted
    assert data.files(source(train=f"${{DATA_NOT_HERE:-{tmp_path}}}/{name}"), elsewhere) == wanted
    assert data.files(source(train=f"${{DATA_NOT_HERE:-.}}/{name}"), tmp_path) == wanted
    assert data.files(source(train=f"~/{name}"), elsewhere) == wanted
    with pytest.raises(DataError, match="DATA_NOT_HERE is not set; set it"):
        data.files(source(train=f"${{DATA_NOT_HERE}}/{name}"), elsewhere)


def test_a_missing_file_is_answered_with_the_nearest_one(tmp_path):
    write(tmp_path, ".jsonl")
    with pytest.raises(DataError, match=r"row.jsonl is not there; did you mean rows.jsonl\?"):
        data.files(source(train="row.jsonl"), tmp_path)


def test_one_file_cannot_serve_two_splits(tmp_path):
    name = write(tmp_path, ".jsonl")
    with pytest.raises(DataError, match="given as train and as test"):
        data.files(source(train=name, test=f"./{name}"), tmp_path)


def test_a_missing_column_is_answered_with_the_nearest_one(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"sentnce": "a", "label": 1}\n')
    row = data.load(source(train="rows.jsonl"), tmp_path)["train"][0]
    with pytest.raises(DataError, match=r"line 1 has no column 'sentence'; the nearest is 'sentnce'"):
        data.take(row, "text", {"text": "sentence"})
    assert data.take(row, "text", {"text": "sentnce"}) == "a"


def test_a_source_is_a_hub_name_or_a_mapping_and_survives_json():
    assert source(hub="a/b") == DataSource.model_validate("a/b")
    given = source(train="a.csv", test=["b.csv", "c.csv"], columns={"text": "t"})
    assert given.train == ["a.csv"]
    assert DataSource.model_validate(given.model_dump(mode="json")) == given
    assert DataSource.model_validate_json(given.model_dump_json()) == given
    for wrong, message in (
        ("rows.csv", "is a path"),
        ({"test": "a.csv"}, "neither hub nor train"),
        ({"train": "a.csv", "revision": "x"}, "belong to a Hub data set"),
        ({"train": []}, "at least 1 item"),
        ({"trian": "a.csv"}, "trian"),
    ):
        with pytest.raises(ValidationError, match=message):
            DataSource.model_validate(wrong)


def numbered(labels) -> list[dict]:
    return [{"id": str(n), "label": label} for n, label in enumerate(labels)]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.booleans(), st.integers(0, 9))
def test_raising_the_cap_only_adds_rows(labels, stratified, seed):
    rows = numbered(labels)
    key = "label" if stratified else None
    before: list = []
    for count in range(1, len(rows) + 1):
        chosen = cap_rows(rows, count, key, seed=seed)
        assert len(chosen) == count
        assert [row for row in rows if row in chosen] == chosen  # the order stays
        assert all(row in chosen for row in before)
        before = chosen
    assert cap_rows(rows, None) == rows == cap_rows(rows, len(rows) + 5)


def test_a_capped_subset_is_random_but_the_same_for_everyone():
    rows = numbered([0] * 100)
    ids = [int(row["id"]) for row in cap_rows(rows, 10)]
    assert ids == [int(row["id"]) for row in cap_rows(rows, 10)]
    assert ids != list(range(10))
    assert ids != [int(row["id"]) for row in cap_rows(rows, 10, seed=1)]


def test_labels_keep_their_shares():
    rows = numbered([0] * 700 + [1] * 200 + [2] * 100)
    rest, held = stratified_split(rows, "label", 0.1)
    assert Counter(row["label"] for row in held) == {0: 70, 1: 20, 2: 10}
    assert len(rest) == 900
    assert not {row["id"] for row in rest} & {row["id"] for row in held}
    assert Counter(row["label"] for row in cap_rows(rows, 50, "label")) == {0: 35, 1: 10, 2: 5}
    with pytest.raises(DataError, match="give more rows"):
        stratified_split(rows[:3], "label", 0.1)


@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=12),
    st.floats(0.05, 0.5),
    st.integers(0, 5),
)
def test_groups_stay_whole(sizes, share, seed):
    rows = [{"id": f"{g}-{n}", "title": g} for g, size in enumerate(sizes) for n in range(size)]
    rest, held = group_split(rows, "title", share, seed=seed)
    assert rest
    assert held
    assert not {row["title"] for row in rest} & {row["title"] for row in held}
    assert sorted(row["id"] for row in rest + held) == sorted(row["id"] for row in rows)


def test_groups_come_near_the_share():
    rows = [{"id": f"{g}-{n}", "title": g} for g in range(50) for n in range(g + 1)]
    for seed in range(20):
        _, held = group_split(rows, "title", 0.2, seed=seed)
        assert abs(len(held) - 0.2 * len(rows)) < 25  # within half the largest article


def test_one_group_cannot_be_split():
    with pytest.raises(DataError, match="all 2 rows have the same title"):
        group_split([{"id": "a", "title": "t"}, {"id": "b", "title": "t"}], "title", 0.5)


def test_splits_share_nothing():
    a, b, c = ({"id": name, "title": name.upper()} for name in "abc")
    check_disjoint(Splits([a], [b], [c]), "title")
    named_twice = [{"id": f"test-{n}", "text": f"text {n}"} for n in range(10)]
    train = [{**row, "id": f"train-{n}"} for n, row in enumerate(named_twice)]
    with pytest.raises(DataError, match="10 of the 10 different rows of test are also in train"):
        check_disjoint(Splits(train, [b], named_twice))
    check_disjoint(Splits(train, [b], [*named_twice[:2], *({"id": n, "text": str(n)} for n in range(2))]))
    with pytest.raises(DataError, match="the id 'a' is in train and in test"):
        check_disjoint(Splits([a], [b], [a]))
    with pytest.raises(DataError, match="the title 'A' is in train and in validation"):
        check_disjoint(Splits([a], [{"id": "d", "title": "A"}], [c]), "title")
    with pytest.raises(DataError, match="the validation split is empty"):
        check_disjoint(Splits([a], [], [c]))


def qa_rows(articles: int, each: int) -> list[dict]:
    return [
        {
            "id": f"{a}.{q}",
            "title": f"article {a}",
            "context": f"The answer of {a} is {q}.",
            "question": "What?",
            "answers": {"text": [f"{a}"], "answer_start": [14]} if q % 2 else {"text": [], "answer_start": []},
        }
        for a in range(articles)
        for q in range(each)
    ]


def squad(base: Path, **params):
    task = load("tasks", "squad_v2")
    checked = task.Params.model_validate(params)
    assert task.Params.model_validate(checked.model_dump(mode="json")) == checked
    return task.splits(checked, base)


def test_validation_is_whole_articles_of_train(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(qa_rows(10, 6)))
    dev = [{**row, "id": f"d{row['id']}", "title": f"dev {row['title']}"} for row in qa_rows(3, 6)]
    (tmp_path / "dev.json").write_text(json.dumps(dev))
    splits = squad(tmp_path, data={"train": "train.json", "test": "dev.json"}, test_rows=6)
    assert len(splits.train) == 54
    assert len({row["title"] for row in splits.validation}) == 1
    assert Counter(row["is_impossible"] for row in splits.test) == {True: 3, False: 3}
    (tmp_path / "dev.json").write_text(json.dumps([dev[0] | {"title": "article 4"}]))
    with pytest.raises(DataError, match="the title 'article 4' is in"):
        squad(tmp_path, data={"train": "train.json", "test": "dev.json"})


def test_without_a_test_split_the_next_step_is_named(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(qa_rows(10, 6)))
    with pytest.raises(DataError, match=r"no test split.*test_share: 0\.1"):
        squad(tmp_path, data={"train": "train.json"})
    splits = squad(tmp_path, data={"train": "train.json"}, test_share=0.2)
    assert [len(rows) for rows in (splits.train, splits.validation, splits.test)] == [42, 6, 12]


def test_an_answer_that_stands_elsewhere_is_refused(tmp_path):
    rows = qa_rows(3, 2)
    rows[1]["answers"] = {"text": ["answer"], "answer_start": [5]}
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"row 2: answer_start 5 does not point at 'answer'; it stands at 4"):
        squad(tmp_path, data={"train": "train.json"}, test_share=0.4)


def test_a_hub_data_set_uses_its_dev_set_where_test_is_not_to_be_had(tmp_path, monkeypatch):
    # `datasets` reads a folder the way it reads a repository of the Hub.
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "glue_like"
    folder.mkdir()

    def fill(name: str, labels: list[int]) -> None:
        rows = [{"sentence": f"{name} {n}", "label": label, "idx": n} for n, label in enumerate(labels)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    fill("train", [0, 1] * 20)
    fill("validation", [0, 1] * 3)
    fill("test", [-1] * 5)
    task = load("tasks", "sst2")
    params = task.Params.model_validate({"data": {"hub": str(folder)}})
    splits = task.splits(params, tmp_path)
    assert [row["text"] for row in splits.test] == [f"validation {n}" for n in range(6)]
    assert [len(splits.train), len(splits.validation)] == [36, 4]
    assert task.files(params, tmp_path) == []
    with pytest.raises(DataError, match=r"has no split 'dev'; it has train, validation, test"):
        task.splits(task.Params.model_validate({"data": {"hub": str(folder), "test": "dev"}}), tmp_path)

    shown = tmp_path / "labelled"
    folder.rename(shown)
    folder = shown
    fill("test", [0, 1, 1])
    splits = task.splits(task.Params.model_validate({"data": {"hub": str(shown)}}), tmp_path)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [40, 6, 3]


def test_a_data_set_that_cannot_be_reached_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read.*local files"):
        data.load(source(hub="nobody/there-is-no-such-set"), tmp_path)


def test_the_real_articles_are_kept_apart(real_data):
    splits = squad(
        real_data / "squad_v2", data={"train": "train.json", "test": "dev.json"}, validation_rows=100
    )
    titles = [{row["title"] for row in rows} for rows in (splits.train, splits.validation, splits.test)]
    assert [len(names) for names in titles] == [9, 1, 3]
    assert len(splits.validation) == 100
    assert len(splits.test) == 725


def classes_of(
    tmp_path: Path, values: list[object], suffix: str = "csv", test: object = None
) -> tuple[str, ...]:
    """The classes that training rows with those labels have."""
    rows = [{"text": f"text {n}", "label": value} for n, value in enumerate(values * 10)]
    others = [{"text": "another", "label": values[0] if test is None else test}]
    for name, content in (("train", rows), ("test", others)):
        lines = [json.dumps(row) for row in content]
        if suffix == "csv":
            lines = ["text,label", *(f"{row['text']},{row['label']}" for row in content)]
        (tmp_path / f"{name}.{suffix}").write_text("\n".join(lines))
    task = load("tasks", "classification")
    given = {"data": {role: f"{role}.{suffix}" for role in ("train", "test")}}
    return task.splits(task.Params.model_validate(given), tmp_path).train[0]["classes"]


def test_labels_that_look_like_numbers_are_texts_unless_all_are_written_as_numbers_are(tmp_path):
    assert classes_of(tmp_path, ["10", "9", "-1"]) == ("-1", "9", "10")
    assert classes_of(tmp_path, ["18-25", "60", "n/a"]) == ("18-25", "60", "n/a")
    assert classes_of(tmp_path, ["01", "1"]) == ("01", "1")
    assert classes_of(tmp_path, [0, "1"], "jsonl") == ("0", "1")
    with pytest.raises(DataError, match=r"labels are texts \('a'\) and numbers \(1\)"):
        classes_of(tmp_path, [1, "a"], "jsonl")
    with pytest.raises(DataError, match="the label is -1, which stands for a hidden label"):
        classes_of(tmp_path, ["no", "yes"], test="-1")


def test_a_second_text_that_only_some_rows_have_is_not_dropped(tmp_path):
    rows = [{"text": f"text {n}", "label": n % 2, "text_pair": "and"} for n in range(30)]
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "t", "label": 1, "text_pair": "u"}))
    task = load("tasks", "classification")
    params = task.Params.model_validate({"data": {"train": "train.jsonl", "test": "test.jsonl"}})
    for lacking, at in ((0, 1), (7, 8)):
        some = [
            {k: v for k, v in row.items() if n != lacking or k != "text_pair"} for n, row in enumerate(rows)
        ]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        with pytest.raises(DataError, match=f"train.jsonl line {at} has no column 'text_pair'"):
            task.splits(params, tmp_path)


def test_a_column_of_ids_or_titles_that_is_named_has_to_be_there(tmp_path):
    rows = [{"text": f"text {n}", "label": n % 2, "key": n} for n in range(30)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    task = load("tasks", "classification")
    named = {"train": "train.json", "columns": {"id": "kye"}}
    with pytest.raises(DataError, match=r"no column 'kye'; the nearest is 'key'. Write columns: {id: key}"):
        task.splits(task.Params.model_validate({"data": named, "test_share": 0.2}), tmp_path)
    rows = [{**row, "article": row["title"]} for row in qa_rows(10, 6)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"'artcle'; the nearest is 'article'. Write columns: {title: article}"):
        squad(tmp_path, data={"train": "train.json", "columns": {"title": "artcle"}}, test_share=0.2)
    with pytest.raises(DataError, match=r"no column 'idd'; .* Write columns: {id: id}"):
        squad(tmp_path, data={"train": "train.json", "columns": {"id": "idd"}}, test_share=0.2)


def test_a_column_that_yaml_would_strip_is_advised_in_quotes(tmp_path):
    (tmp_path / "train.csv").write_text("text, label\na,1\nb,0\n")
    task = load("tasks", "classification")
    params = task.Params.model_validate({"data": {"train": "train.csv"}, "test_share": 0.5})
    with pytest.raises(DataError, match=r'Write columns: {label: " label"}'):
        task.splits(params, tmp_path)


def test_articles_without_titles_are_told_apart_by_what_they_say(tmp_path):
    def write(name: str, words: list[str]) -> None:
        articles = [
            {"paragraphs": [
                {"context": f"{word} {part}", "qas": [{"id": f"{name} {word} {part} {n}", "question": "Who?"}
                                                      for n in range(3)]} for part in (1, 2)
            ]} for word in words
        ]  # fmt: skip
        (tmp_path / name).write_text(json.dumps({"data": articles}))

    write("train.json", ["red", "green", "blue"])
    write("test.json", ["black", "white"])
    data = {"train": "train.json", "test": "test.json"}
    splits = squad(tmp_path, data=data, validation_share=0.3)
    assert len(splits.validation) == 6  # both paragraphs of one article
    assert len({row["context"].split()[0] for row in splits.validation}) == 1
    write("test.json", ["black", "blue"])
    with pytest.raises(DataError, match=r"the context 'blue 1' is in .* a context serves one split only"):
        squad(tmp_path, data=data)
    rows = json.loads((tmp_path / "train.json").read_text())
    rows["data"][0]["title"] = "Red"  # some have titles
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="the context 'blue 1' is in "):
        squad(tmp_path, data=data)
    rows["data"][2]["title"] = "Blue"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "test.json").write_text(json.dumps({"data": [rows["data"][2]]}).replace("train", "test"))
    with pytest.raises(DataError, match="the title 'Blue' is in "):
        squad(tmp_path, data=data)


def test_rows_that_train_repeats_are_told_as_what_they_are(tmp_path):
    rows = [{"text": f"text {n % 3}", "label": n % 2} for n in range(60)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "test.json").write_text(json.dumps([{"text": "t", "label": 1}]))
    task = load("tasks", "classification")
    params = task.Params.model_validate({"data": {"train": "train.json", "test": "test.json"}})
    with pytest.raises(
        DataError, match=r"rows of validation are also in train.*; train repeats its rows under"
    ):
        task.splits(params, tmp_path)
