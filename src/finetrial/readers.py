"""The five file formats that rows are read from: JSON, JSONL, CSV, TSV and Parquet.

Not for finding files or for what the columns mean (`data.py`). Nothing is guessed and nothing is dropped: a
row that does not read is an error that names it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from finetrial.errors import DataError

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
BLOCK_BYTES = 64 * 2**20  # pyarrow reads a CSV file in blocks and refuses a row longer than one


class Row(NamedTuple):
    """One row as read. `where` says where it stands, for messages and for its id."""

    where: str
    values: dict[str, Any]


def read(path: Path, name: str) -> list[Row]:
    """The rows of one file, by its suffix: .json (a list of objects, or SQuAD's form), .jsonl, .csv (quoted
    as RFC 4180 says), .tsv (no quoting, as GLUE's), .parquet. CSV and TSV values stay text.

    Raises:
        DataError: the file does not hold that format, or no row.
    """
    reader = {".json": _json, ".jsonl": _jsonl, ".csv": _delimited, ".tsv": _delimited, ".parquet": _parquet}
    try:
        rows = [Row(f"{name} {at}", values) for at, values in reader[path.suffix](path)]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno} is not JSON: {error.msg}; mend that line") from error
    if not rows:
        raise DataError(f"{path} has no rows; check that it is the file you mean")
    return rows


def _json(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    whole = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        yield from _squad(path, whole["data"])
    elif isinstance(whole, list):
        yield from ((f"row {n}", _object(path, f"row {n}", value)) for n, value in enumerate(whole, start=1))
    else:
        raise DataError(f"{path} is neither a list of objects nor SQuAD's form ({{data: [articles]}})")


def _jsonl(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue  # a blank line holds no row
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path} line {number} is not JSON: {error.msg}; mend that line") from error
            yield f"line {number}", _object(path, f"line {number}", value)


def _object(path: Path, at: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{path} {at} is not an object like {{"text": ..., "label": ...}}; mend it')
    return value


def _squad(path: Path, articles: list[Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """One row per question of SQuAD's nested form, with the columns of the Hub's flat form."""
    for number, article in enumerate(articles, start=1):
        at = f"article {number}"
        try:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    at = f"question {question['id']}"
                    golds = question.get("answers", [])
                    yield (
                        at,
                        {
                            "id": question["id"],
                            "title": article.get("title", f"article {number}"),
                            "context": paragraph["context"],
                            "question": question["question"],
                            "answers": {key: [gold[key] for gold in golds] for key in ("text", "answer_start")},
                        },
                    )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} {at} is not in SQuAD's form: {error!r} is missing or wrong") from error


def _delimited(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow import csv as arrow_csv

    tabs = path.suffix == ".tsv"
    with path.open(encoding="utf-8-sig", newline="") as lines:
        style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
        header = next(csv.reader(lines, **style), [])
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path} has the column {twice[0]!r} twice; rename one")
    try:
        table = arrow_csv.read_csv(
            path,
            read_options=arrow_csv.ReadOptions(block_size=BLOCK_BYTES),
            parse_options=arrow_csv.ParseOptions(
                delimiter="\t" if tabs else ",", quote_char=False if tabs else '"', newlines_in_values=not tabs
            ),
            # Text stays text: no number, date or missing value is guessed from how a cell looks.
            convert_options=arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(header, pyarrow.string()), strings_can_be_null=False
            ),
        )
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not {'TSV' if tabs else 'CSV'}: {error}; mend that row") from error
    yield from ((f"row {n}", values) for n, values in enumerate(table.to_pylist(), start=1))


def _parquet(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not Parquet: {error}") from error
    yield from ((f"row {n}", values) for n, values in enumerate(table.to_pylist(), start=1))
