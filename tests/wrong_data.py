"""Data files with one fault each (and a study that names them), and what has to be said of each."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow
from pyarrow import parquet

Content = str | bytes | None  # None: a folder of that name


class Wrong(NamedTuple):
    """Files beside the study file, the study's task, and what the message has to say, in this order."""

    files: dict[str, Content]
    task: str
    said: tuple[str, ...]


def rows_of(label: str = "{n}", count: int = 12, word: str = "train") -> list[dict[str, Any]]:
    return [{"text": f"{word} text {n}", "label": n % 2} for n in range(count)]


def csv_of(rows: Sequence[dict[str, Any]], separator: str = ",") -> str:
    lines = [separator.join(rows[0]), *(separator.join(map(str, row.values())) for row in rows)]
    return "\n".join(lines) + "\n"


def jsonl_of(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet_of(columns: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def zip_of(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, "<sheet/>")
    return stream.getvalue()


TRAIN, TEST = rows_of(), rows_of(word="test", count=6)


def labels(
    suffix: str, train: Content, *said: str, test: Content = "", more: str = "", keys: str = ""
) -> Wrong:
    """A classification study whose train file is wrong (or the test file, if given, or `more` of `data`)."""
    named = f"train: train{suffix}, test: test.csv{more}"
    content = {f"train{suffix}": train, "test.csv": csv_of(TEST) if test == "" else test}
    return Wrong(content, f"{{classification: {{max_length: 16{keys}, data: {{{named}}}}}}}", said)


def question(**changes: Any) -> dict[str, Any]:
    answers = [{"text": "Rome", "answer_start": 3}]
    return {"id": "q1", "question": "Where?", "answers": answers, **changes}


def squad_of(*questions: dict[str, Any], title: str = "Rome", **changes: Any) -> str:
    article = {"title": title, "paragraphs": [{"context": "In Rome.", "qas": list(questions)}], **changes}
    other = {"title": "Oslo", "paragraphs": [{"context": "In Rome.", "qas": [question(id="o1")]}]}
    return json.dumps({"version": "v2.0", "data": [article, other]})


SQUAD_TEST = json.dumps(
    {
        "data": [
            {"title": "Bonn", "paragraphs": [{"context": "In Bonn.", "qas": [question(id="t", answers=[])]}]}
        ]
    }
)


def squad(train: Content, *said: str, test: str = SQUAD_TEST) -> Wrong:
    task = "{squad_v2: {max_length: 32, stride: 8, data: {train: train.json, test: test.json}}}"
    return Wrong({"train.json": train, "test.json": test}, task, said)


def changed(where: int, rows: Sequence[dict[str, Any]] = TRAIN, **values: Any) -> list[dict[str, Any]]:
    return [{**row, **values} if n == where else row for n, row in enumerate(rows)]


def without(key: str, rows: Sequence[dict[str, Any]] = TRAIN) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != key} for row in rows]


GOOD_CSV = csv_of(TRAIN)
LINES = GOOD_CSV.splitlines(keepends=True)

DATA: dict[str, Wrong] = {
    # CSV
    "no label column": labels(".csv", csv_of(without("label")), "'label'"),
    "neither column": labels(".csv", "a,b\nx,1\ny,0\n", "'text'", "'label'"),
    "semicolons": labels(".csv", csv_of(TRAIN, ";"), "'text'", "'label'"),
    "a cell too many": labels(
        ".csv", "".join(LINES[:3]) + "one,two,1\n", "train.csv", "Expected 2 columns, got 3"
    ),
    "a cell too few": labels(".csv", "".join(LINES[:3]) + "one\n", "train.csv", "Expected 2 columns, got 1"),
    "open quote": labels(".csv", "".join(LINES[:3]) + '"never closed,1\n', "train.csv", "mend"),
    "Latin-1": labels(".csv", GOOD_CSV.replace("text 3", "caf\xe9").encode("latin-1"), "train.csv", "UTF-8"),
    "Latin-1 header": labels(".csv", "t\xe9xt,label\na,1\nb,0\n".encode("latin-1"), "train.csv", "UTF-8"),
    "UTF-16": labels(".csv", GOOD_CSV.encode("utf-16"), "train.csv", "UTF-8"),
    "NUL bytes": labels(".csv", GOOD_CSV.replace("text 3", "te\0xt"), "train.csv", "NUL"),
    "nothing but NUL": labels(".csv", bytes(4096), "train.csv"),
    "empty": labels(".csv", "", "train.csv", "empty"),
    "a blank line": labels(".csv", "\n", "train.csv does not begin with a header"),
    "a header without end": labels(".csv", "x" * 200_000, "train.csv has no header that can be read"),
    "a label too long": labels(".jsonl", jsonl_of(changed(3, label="9" * 5000)), "train.jsonl line 4", "texts"),
    "header only": labels(".csv", "text,label\n", "train.csv has no rows"),
    "a column twice": labels(".csv", "text,label,text\na,1,b\n", "train.csv has the column 'text' twice"),
    "label not in train": labels(
        ".csv",
        GOOD_CSV,
        "test.csv row 7",
        "the label 2 is not in train",
        test=csv_of([*TEST, {"text": "x", "label": 2}]),
    ),
    "hidden labels": labels(
        ".csv", GOOD_CSV, "test.csv row 1", "hidden label", test=csv_of([{**row, "label": -1} for row in TEST])
    ),
    "one label": labels(".csv", csv_of([{**row, "label": 1} for row in TRAIN]), "only the label 1"),
    "texts and numbers": labels(
        ".jsonl", jsonl_of(changed(3, label="good")), "train.jsonl line 4", "texts ('good') and numbers"
    ),
    "no label in a row": labels(".csv", csv_of(changed(3, label="")), "train.csv row 4", "the label is empty"),
    "a spreadsheet": labels(".csv", zip_of("xl/workbook.xml"), "train.csv"),
    "test repeats train": labels(".csv", GOOD_CSV, "of test are also in train", test=GOOD_CSV),
    "too few rows to cut": labels(".csv", csv_of(TRAIN[:2]), "of 2 rows is 0"),
    "test empty": labels(".csv", GOOD_CSV, "test.csv", "empty", test=b""),
    "no pair in test": labels(
        ".csv", csv_of([{"text_pair": "p", **row} for row in TRAIN]), "test.csv", "no column 'text_pair'"
    ),
    "column of no task": labels(
        ".csv", GOOD_CSV, "columns.txet", "did you mean 'text'?", more=", columns: {txet: a}"
    ),
    "column map misses": labels(
        ".csv", GOOD_CSV, "has no column 'sentence'", more=", columns: {text: sentence}"
    ),
    "test and share": labels(".csv", GOOD_CSV, "test_share is set", keys=", test_share: 0.5"),
    # files
    "a folder": labels(".csv", None, "train.csv is a folder"),
    "unknown suffix": labels(".xlsx", b"x", "train.xlsx has no known format; use one of"),
    "train as validation": labels(
        ".csv", GOOD_CSV, "given as train and as validation", more=", validation: ./train.csv"
    ),
    # TSV
    "TSV with a tab too many": labels(".tsv", csv_of(TRAIN, "\t") + "a\tb\t1\n", "train.tsv is not TSV"),
    "CSV called TSV": labels(".tsv", GOOD_CSV, "'text'", "'label'"),
    "TSV without a header": labels(
        ".tsv", "".join(csv_of(TRAIN, "\t").splitlines(keepends=True)[1:]), "'text'", "'label'"
    ),
    # JSON
    "JSON cut short": labels(".json", json.dumps(TRAIN)[:-9], "train.json line 1 is not JSON"),
    "JSON of another form": labels(".json", '{"rows": []}', "neither a list of objects nor SQuAD's form"),
    "JSON number": labels(".json", "5", "neither a list of objects nor SQuAD's form"),
    "JSON list of texts": labels(".json", '["a", "b"]', "train.json row 1 is not an object"),
    "JSON without rows": labels(".json", "[]", "train.json has no rows"),
    "JSON too deep": labels(".json", "[" * 100_000, "train.json", "nested"),
    "JSON empty": labels(".json", "", "train.json"),
    # JSONL
    "JSONL line cut short": labels(".jsonl", jsonl_of(TRAIN)[:-12], "train.jsonl line 12 is not JSON"),
    "JSONL list": labels(".jsonl", jsonl_of([*TRAIN, [1, 2]]), "train.jsonl line 13 is not an object"),
    "JSONL number as text": labels(".jsonl", jsonl_of(changed(4, text=5)), "train.jsonl line 5", "5, not text"),
    "JSONL null text": labels(".jsonl", jsonl_of(changed(4, text=None)), "train.jsonl line 5", "not text"),
    "JSONL null label": labels(
        ".jsonl", jsonl_of(changed(4, label=None)), "train.jsonl line 5", "label is None"
    ),
    "JSONL share as label": labels(
        ".jsonl", jsonl_of(changed(4, label=0.5)), "train.jsonl line 5", "label is 0.5"
    ),
    "JSONL NaN as label": labels(
        ".jsonl", jsonl_of(changed(4, label=float("nan"))), "train.jsonl line 5", "label is nan"
    ),
    "JSONL key missing": labels(
        ".jsonl", jsonl_of([*TRAIN[:4], {"text": "a"}, *TRAIN[4:]]), "train.jsonl line 5 has no column 'label'"
    ),
    "JSONL columns missing": labels(".jsonl", jsonl_of([{"a": 1}, {"b": 2}]), "'text'", "'label'"),
    "JSONL half a character": labels(
        ".jsonl", jsonl_of(changed(4, text="\ud800")), "line 5", "half a character"
    ),
    "JSONL huge number": labels(
        ".jsonl", jsonl_of(TRAIN) + '{"text": "a", "label": ' + "9" * 5000 + "}\n", "train.jsonl line 13"
    ),
    "JSONL too deep": labels(
        ".jsonl", jsonl_of(TRAIN) + '{"a":' * 100_000 + "\n", "train.jsonl line 13", "nested"
    ),
    "JSONL twice the id": labels(
        ".jsonl",
        jsonl_of([{"id": "same", **row} for row in TRAIN]),
        "the id 'same'",
        "make it unique",
        more=", columns: {id: id}",
        test=csv_of([{"id": n, **row} for n, row in enumerate(TEST)]),
    ),
    "JSONL empty": labels(".jsonl", "\n\n", "train.jsonl has no rows"),
    "CSV called JSONL": labels(".jsonl", GOOD_CSV, "train.jsonl line 1 is not JSON"),
    # Parquet
    "no Parquet": labels(".parquet", b"PAR1 is how it begins", "train.parquet is not Parquet"),
    "Parquet cut short": labels(
        ".parquet", parquet_of({"text": ["a", "b"], "label": [0, 1]})[:-30], "train.parquet is not Parquet"
    ),
    "Parquet damaged inside": labels(
        ".parquet", b"PAR1" + bytes(200) + parquet_of({"text": ["a"], "label": [0]})[-150:], "train.parquet"
    ),
    "Parquet empty file": labels(".parquet", b"", "train.parquet"),
    "Parquet without rows": labels(
        ".parquet", parquet_of({"text": pyarrow.array([], pyarrow.string())}), "train.parquet has no rows"
    ),
    "Parquet bytes": labels(
        ".parquet", parquet_of({"text": [b"a", b"b"], "label": [0, 1]}), "train.parquet row 1", "not text"
    ),
    "Parquet lists": labels(
        ".parquet",
        parquet_of({"text": ["a", "b"], "label": [[0], [1]]}),
        "train.parquet row 1",
        "the label is [0]",
    ),
    # SQuAD
    "answer not in context": squad(
        squad_of(question(answers=[{"text": "Paris", "answer_start": 3}])), "q1", "not in the context"
    ),
    "answer elsewhere": squad(
        squad_of(question(answers=[{"text": "Rome", "answer_start": 2}])), "q1", "it stands at 3"
    ),
    "answer before the start": squad(
        squad_of(question(answers=[{"text": "Rome", "answer_start": -1}])), "q1", "starts before 0"
    ),
    "answer empty": squad(squad_of(question(answers=[{"text": "", "answer_start": 0}])), "q1", "empty"),
    "answer without its place": squad(squad_of(question(answers=[{"text": "Rome"}])), "q1", "answer_start"),
    "place in words": squad(
        squad_of(question(answers=[{"text": "Rome", "answer_start": "three"}])), "q1", "three"
    ),
    "place null": squad(squad_of(question(answers=[{"text": "Rome", "answer_start": None}])), "q1"),
    "answers null": squad(squad_of(question(answers=None)), "q1"),
    "question null": squad(squad_of(question(question=None)), "q1", "not text"),
    "no question": squad(squad_of({"id": "q1", "answers": []}), "q1", "question"),
    "no id": squad(squad_of({"question": "Where?", "answers": []}), "article 1", "id"),
    "no context": squad(squad_of(question(), paragraphs=[{"qas": [question()]}]), "q1", "context"),
    "no paragraphs": squad(json.dumps({"data": [{"title": "Rome"}]}), "article 1", "paragraphs"),
    "article a text": squad(json.dumps({"data": ["Rome"]}), "article 1"),
    "no articles": squad(json.dumps({"data": []}), "train.json has no rows"),
    "question twice": squad(squad_of(question(), question()), "the id 'q1'", "make it unique"),
    "article in both": squad(
        squad_of(question()),
        "the title 'Rome'",
        "Move its rows to one split",
        test=json.dumps(
            {
                "data": [
                    {"title": "Rome", "paragraphs": [{"context": "x", "qas": [question(id="t", answers=[])]}]}
                ]
            }
        ),
    ),
    "one article to cut": squad(squad_of(question(), title="Oslo"), "all 2 rows have the same title"),
    "labels for questions": squad(json.dumps(TRAIN), "'context'", "'answers'", "'question'"),
}
